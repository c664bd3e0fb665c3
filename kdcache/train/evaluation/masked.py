"""What a masked LM is worth: loss and accuracy at masked tokens of a test set."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache.errors import CorpusError, RecipeError
from kdcache.formats.identity import sample_id
from kdcache.recipe import CorpusSection, EvaluateSection, MasksSignal, Recipe
from kdcache.text.corpus import read_corpus
from kdcache.text.masking import scheme_of
from kdcache.train.evaluation.baseline import Baseline
from kdcache.train.evaluation.text_scores import TextScores
from kdcache.train.families.masked_lm import masked_sums, masked_texts
from kdcache.train.students.student import max_positions


def evaluate_masked(
    model: Any,
    tokenizer: Any,
    section: EvaluateSection,
    recipe: Recipe,
    baseline: Baseline | None = None,
) -> tuple[dict[str, Any], dict[str, TextScores]]:
    """Score a masked LM on a corpus, masked as its recipe says, once and always the same.

    Args:
        model: on its device.
        tokenizer: its own.
        section: with a corpus.
        recipe: of the run.
        baseline: what it will be compared with; refused before anything is scored if it cannot be.

    Returns:
        num_texts, num_tokens (masked ones), loss_nats a token, perplexity, accuracy, masks (scheme
        and figures), and references_digest; and the scores of the texts under an empty name.

    Raises:
        RecipeError: the corpus lacks the field that the student reads.
        CorpusError: nothing of it fits the model.
        IdentityError: the baseline was scored on other texts, or other tokens of them.
    """
    assert section.corpus is not None
    signal = masks_of(recipe)
    texts, rows = texts_of(section.corpus, recipe)
    scheme = scheme_of(signal)
    masked = masked_texts(tokenizer, texts, scheme, max_positions(model))
    num_tokens = np.array([len(one) for one in masked.positions], np.int64)
    if not num_tokens.sum():
        raise CorpusError("evaluate.corpus has no text to score that fits the model's positions")
    digest, own = sample_id(texts).hex(), rows[masked.rows]
    masks = {"scheme": scheme.name, **scheme.parameters()}
    if baseline is not None:
        baseline.check_texts(digest, own, num_tokens, masks)
    sums = masked_sums(model, masked, model.device, section.batch_tokens)
    found = TextScores(own, sums[:, 0], num_tokens, sums[:, 1].astype(np.int64))
    return {
        "num_texts": len(own),
        "num_tokens": int(num_tokens.sum()),
        **found.metrics(),
        "masks": masks,
        "references_digest": digest,
    }, {"": found}


def masks_of(recipe: Recipe) -> MasksSignal:
    """The masks that a recipe trains on; BERT's where its dump section does not say."""
    signals = recipe.dump.signals
    named: list[str] = []
    for term in recipe.train.objective:
        named += [name for name in [getattr(term, "masks", None)] if name is not None]
        for label in getattr(term, "signals", []):
            named += [n for n in [getattr(signals.get(label), "masks", None)] if n is not None]
    found = [signals[name] for name in named if isinstance(signals.get(name), MasksSignal)]
    stream = recipe.train.source
    return found[0] if found else MasksSignal(kind="masks", stream=stream)  # type: ignore[return-value]


def texts_of(corpus: CorpusSection, recipe: Recipe) -> tuple[list[str], np.ndarray]:
    """Texts of the field that the run's stream reads, and [M] int64 their rows."""
    stream = recipe.train.source
    streams = recipe.dump.streams
    field = streams[stream].field if stream in streams else stream
    if field not in corpus.fields:
        raise RecipeError(
            f"evaluate.corpus.fields has {sorted(corpus.fields)}; scoring needs {field!r}"
        )
    batches = list(read_corpus(corpus))
    texts = [text for batch in batches for text in batch.fields[field]]
    return texts, np.concatenate([batch.rows for batch in batches])
