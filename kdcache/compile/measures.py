"""Quantities of samples that filters look at, read from a cache shard by shard.

# M samples of the cache, N positions of a part
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from kdcache.compile.hypotheses import SentenceBleu, Texts, tokens_of
from kdcache.compile.options import Condition
from kdcache.compile.source import Source
from kdcache.errors import RecipeError
from kdcache.formats.codes import entropy_nats, gold_log_probs
from kdcache.formats.ragged import Ragged
from kdcache.formats.signals import BeamsRecord, LogitsRecord, SignalRecord

_OPERATORS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_KIND_OF: dict[str, type[SignalRecord]] = {
    "loss": LogitsRecord,
    "entropy": LogitsRecord,
    "bleu": BeamsRecord,
}
#: Samples whose hypotheses are decoded at once.
BLOCK_SAMPLES = 4096


def has_measure(source: Source, condition: Condition) -> bool:
    """Whether a cache can tell of its samples whether they fulfil a condition.

    Raises:
        RecipeError: it has a signal of that name, of another kind.
        FormatError: the signal is unfinished.
    """
    name, quantity = condition.name, condition.quantity
    if quantity == "length":
        return name in source.cache.manifest.streams
    if quantity == "number":
        return name in source.cache.manifest.corpus.fields
    if name not in source.cache.signals:
        return False
    record = source.cache.signal(name)
    if not isinstance(record, _KIND_OF[quantity]):
        expected = "logits" if _KIND_OF[quantity] is LogitsRecord else "beams"
        raise RecipeError(
            f"filter '{condition}': {name!r} is of kind {record.kind}, {quantity} is of {expected}"
        )
    source.cache.require_complete(name)
    return True


def fulfilled(condition: Condition, values: np.ndarray) -> np.ndarray:
    """[M] bool, which samples fulfil a condition; none does of which nothing is known.

    Args:
        condition: the condition.
        values: [M] from `measure`; NaN where nothing is known.
    """
    return _OPERATORS[condition.operator](values, condition.number) & ~np.isnan(values)


def measure(
    source: Source, condition: Condition, wanted: np.ndarray, bleu_tokenizer: str
) -> np.ndarray:
    """A condition's quantity of samples of a cache.

    Args:
        source: the cache.
        condition: names the quantity.
        wanted: [M] bool, the samples that are asked about.
        bleu_tokenizer: sacrebleu's.

    Returns:
        [M] float64; NaN for samples without labels, and for those that are not asked about.
    """
    if condition.quantity == "length":
        lengths = source.lengths([condition.name])[condition.name]
        return np.where(wanted, lengths, np.nan)
    values, index = np.full(source.num_samples, np.nan), np.flatnonzero(wanted)
    if condition.quantity == "number":
        for at in range(0, len(index), BLOCK_SAMPLES):
            some = index[at : at + BLOCK_SAMPLES]
            values[some] = [_number(text) for text in source.take_texts(condition.name, some)]
        return values
    if condition.quantity == "bleu":
        values[index] = _best_bleu(source, condition.name, index, bleu_tokenizer)
        return values
    record = source.cache.logits(condition.name)
    for shard, start, stop in source.shards():
        if not wanted[start:stop].any():
            continue
        for first, last, columns in source.columns(condition.name, shard):
            tokens = columns["tokens"]
            if condition.quantity == "loss":
                nats = -gold_log_probs(tokens.fields["gold"])
            else:
                nats = entropy_nats(tokens.fields["entropy"], record.vocab_size)
            values[first:last] = sample_means(tokens, nats)
    values[~wanted] = np.nan
    return values


def _number(text: str) -> float:
    """What a text says; NaN where it is no number."""
    try:
        return float(text)
    except ValueError:
        return np.nan


def sample_means(column: Ragged, values: np.ndarray) -> np.ndarray:
    """[M] float64 mean of each sample's records; NaN where it has none.

    Args:
        column: says which records are whose.
        values: [N], one for each record.
    """
    ends = np.zeros(len(values) + 1)
    np.cumsum(values, dtype=np.float64, out=ends[1:])
    sums = ends[column.offsets[1:]] - ends[column.offsets[:-1]]
    counts = column.lengths
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _best_bleu(source: Source, signal: str, index: np.ndarray, tokenizer: str) -> np.ndarray:
    """[R] float64 sentence BLEU of the best hypothesis against the reference."""
    record = source.cache.signal(signal)
    field = source.cache.stream(record.stream).field
    texts, bleu = Texts(source.cache, record.stream), SentenceBleu(tokenizer)
    scores = np.empty(len(index))
    for at in range(0, len(index), BLOCK_SAMPLES):
        some = index[at : at + BLOCK_SAMPLES]
        best = tokens_of(source.take_columns(signal, some), np.zeros(len(some), dtype=np.int64))
        pairs = zip(texts.decode(best), source.take_texts(field, some), strict=True)
        scores[at : at + len(some)] = [bleu.score(text, reference) for text, reference in pairs]
    return scores
