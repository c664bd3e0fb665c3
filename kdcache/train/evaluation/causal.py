"""What a causal LM is worth: loss, accuracy and both perplexities on a test set."""

from __future__ import annotations

import math
from typing import Any

from kdcache.errors import CorpusError
from kdcache.formats.identity import sample_id
from kdcache.recipe import EvaluateSection, Recipe
from kdcache.train.evaluation.masked import texts_of
from kdcache.train.families.causal_lm import causal_texts, check_ids, score_causal
from kdcache.train.students.student import max_positions


def evaluate_causal(
    model: Any, tokenizer: Any, section: EvaluateSection, recipe: Recipe
) -> dict[str, Any]:
    """Score a causal LM on a corpus, text by text: no text sees another.

    Args:
        model: on its device.
        tokenizer: its own.
        section: with a corpus.
        recipe: of the run.

    Returns:
        num_texts that are scored (those with nothing to predict are not); num_too_long, texts left
        out because they are longer than the model's positions; num_tokens (predicted: every token
        but a text's first, of a chat those that the assistant wrote); loss_nats a predicted token;
        perplexity of a token, exp(loss_nats); num_words, runs without white space in the texts
        scored, as the corpus has them, before `detokenize`; word_perplexity, exp(total nats /
        num_words), which can be compared between tokenizers (both None of a chat); accuracy, share
        of predicted tokens
        that are the first choice; and references_digest.

    Raises:
        RecipeError: the corpus lacks the field that the student reads.
        CorpusError: nothing of it fits the model.
    """
    assert section.corpus is not None
    stream = recipe.dump.streams.get(recipe.train.source)
    chat = stream is not None and stream.template == "chat"
    texts = texts_of(section.corpus, recipe)
    encoded = causal_texts(tokenizer, texts, chat, max_positions(model))
    if not encoded.num_predicted:
        raise CorpusError(
            "evaluate.corpus has no text to score: none has a token to predict and fits the "
            "model's positions"
        )
    check_ids(encoded, model)
    found = score_causal(model, encoded, model.device, section.batch_tokens)
    num_words = None
    if not chat:
        plain = section.corpus.model_copy(update={"detokenize": "none"})
        words = texts if plain == section.corpus else texts_of(plain, recipe)
        num_words = sum(len(words[row].split()) for row in encoded.rows.tolist())
    return {
        "num_texts": len(encoded.tokens),
        "num_too_long": encoded.num_long,
        "num_tokens": found.num_tokens,
        "loss_nats": found.loss_nats,
        "perplexity": found.perplexity,
        "num_words": num_words,
        "word_perplexity": _over_words(found.loss_nats * found.num_tokens, num_words),
        "accuracy": found.accuracy,
        "references_digest": sample_id(texts).hex(),
    }


def _over_words(nats: float, num_words: int | None) -> float | None:
    """Perplexity of a word, as Radford et al. (2019) report it."""
    if not num_words:
        return None
    return math.exp(nats / num_words) if nats / num_words < 700 else math.inf
