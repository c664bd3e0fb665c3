"""What a masked LM is worth: loss and accuracy at masked tokens of a test set."""

from __future__ import annotations

from typing import Any

from kdcache.errors import CorpusError, RecipeError
from kdcache.formats.identity import sample_id
from kdcache.recipe import CorpusSection, EvaluateSection, MasksSignal, Recipe
from kdcache.text.corpus import read_corpus
from kdcache.text.masking import scheme_of
from kdcache.train.families.masked_lm import masked_texts, score_masked
from kdcache.train.students.student import max_positions


def evaluate_masked(
    model: Any, tokenizer: Any, section: EvaluateSection, recipe: Recipe
) -> dict[str, Any]:
    """Score a masked LM on a corpus, masked as its recipe says, once and always the same.

    Args:
        model: on its device.
        tokenizer: its own.
        section: with a corpus.
        recipe: of the run.

    Returns:
        num_texts, num_tokens (masked ones), loss_nats a token, perplexity, accuracy, masks (scheme
        and figures), and references_digest.

    Raises:
        RecipeError: the corpus lacks the field that the student reads.
        CorpusError: nothing of it fits the model.
    """
    assert section.corpus is not None
    signal = masks_of(recipe)
    texts = texts_of(section.corpus, recipe)
    scheme = scheme_of(signal)
    masked = masked_texts(tokenizer, texts, scheme, max_positions(model))
    if not sum(map(len, masked.positions)):
        raise CorpusError("evaluate.corpus has no text to score that fits the model's positions")
    found = score_masked(model, masked, model.device, section.batch_tokens)
    return {
        "num_texts": len(masked.tokens),
        "num_tokens": found.num_tokens,
        "loss_nats": found.loss_nats,
        "perplexity": found.perplexity,
        "accuracy": found.accuracy,
        "masks": {"scheme": scheme.name, **scheme.parameters()},
        "references_digest": sample_id(texts).hex(),
    }


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


def texts_of(corpus: CorpusSection, recipe: Recipe) -> list[str]:
    """Texts of the field that the run's stream reads."""
    stream = recipe.train.source
    streams = recipe.dump.streams
    field = streams[stream].field if stream in streams else stream
    if field not in corpus.fields:
        raise RecipeError(
            f"evaluate.corpus.fields has {sorted(corpus.fields)}; scoring needs {field!r}"
        )
    return [text for batch in read_corpus(corpus) for text in batch.fields[field]]
