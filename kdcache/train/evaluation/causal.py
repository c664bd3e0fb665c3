"""What a causal LM is worth: loss, accuracy and both perplexities on a test set."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache.errors import CorpusError
from kdcache.formats.identity import sample_id
from kdcache.recipe import EvaluateSection, Recipe
from kdcache.train.evaluation.baseline import Baseline
from kdcache.train.evaluation.masked import texts_of
from kdcache.train.evaluation.text_scores import TextScores
from kdcache.train.families.causal_lm import causal_sums, causal_texts, check_ids
from kdcache.train.students.student import max_positions


def evaluate_causal(
    model: Any,
    tokenizer: Any,
    section: EvaluateSection,
    recipe: Recipe,
    baseline: Baseline | None = None,
) -> tuple[dict[str, Any], dict[str, TextScores]]:
    """Score a causal LM on a corpus, text by text: no text sees another.

    Args:
        model: on its device.
        tokenizer: its own.
        section: with a corpus.
        recipe: of the run.
        baseline: what it will be compared with; refused before anything is scored if it cannot be.

    Returns:
        num_texts that are scored (those with nothing to predict are not); num_too_long, texts left
        out because they are longer than the model's positions; num_tokens (predicted: every token
        but a text's first, of a chat those that the assistant wrote); loss_nats a predicted token;
        perplexity of a token, exp(loss_nats); num_words, runs without white space in the texts
        scored, as the corpus has them, before `detokenize`; word_perplexity, exp(total nats /
        num_words), which can be compared between tokenizers (both None of a chat); accuracy, share
        of predicted tokens that are the first choice; and references_digest. And the scores of
        the texts under an empty name.

    Raises:
        RecipeError: the corpus lacks the field that the student reads.
        CorpusError: nothing of it fits the model.
        IdentityError: the baseline was scored on other texts.
    """
    assert section.corpus is not None
    stream = recipe.dump.streams.get(recipe.train.source)
    chat = stream is not None and stream.template == "chat"
    texts, rows = texts_of(section.corpus, recipe)
    encoded = causal_texts(tokenizer, texts, chat, max_positions(model))
    if not encoded.num_predicted:
        raise CorpusError(
            "evaluate.corpus has no text to score: none has a token to predict and fits the "
            "model's positions"
        )
    check_ids(encoded, model)
    num_words = None
    if not chat:
        plain = section.corpus.model_copy(update={"detokenize": "none"})
        words = texts if plain == section.corpus else texts_of(plain, recipe)[0]
        num_words = np.array([len(words[row].split()) for row in encoded.rows.tolist()], np.int64)
    digest, own = sample_id(texts).hex(), rows[encoded.rows]
    num_tokens = np.array([int(one.sum()) for one in encoded.predicted], np.int64)
    if baseline is not None:
        baseline.check_texts(digest, own, num_tokens)
    sums = causal_sums(model, encoded, model.device, section.batch_tokens)
    found = TextScores(own, sums[:, 0], num_tokens, sums[:, 1].astype(np.int64), num_words)
    return {
        "num_texts": len(own),
        "num_too_long": encoded.num_long,
        "num_tokens": encoded.num_predicted,
        "num_words": None if num_words is None else int(num_words.sum()),
        "word_perplexity": None,
        **found.metrics(),
        "references_digest": digest,
    }, {"": found}
