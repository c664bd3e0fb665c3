"""Hypotheses of a beams signal: which of them is chosen, its tokens, its text, its labels.

# R samples, H hypotheses of all of them, N positions, E entries, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from kdcache.compile.options import Choice
from kdcache.formats.cache import Cache
from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.formats.schema import join_ids
from kdcache.formats.signals import LogitsRecord

#: Largest 64-bit hash plus one.
_HASHES = 2.0**64


class Texts:
    """Texts of token ids, under one tokenizer of a cache."""

    def __init__(self, cache: Cache, stream: str) -> None:
        """Load nothing yet.

        Args:
            cache: that has the tokenizer.
            stream: whose tokenizer it is.
        """
        self._cache, self._name = cache, cache.stream(stream).tokenizer
        self._backend: Any = None

    def decode(self, tokens: Ragged) -> list[str]:
        """R texts of R lists of `id` int32, special tokens left out.

        Raises:
            ModelError: transformers cannot load the tokenizer.
        """
        if self._backend is None:
            from kdcache.models.loading import load_tokenizer

            self._backend = load_tokenizer(self._cache.tokenizer_dir(self._name))
        flat = tokens.fields["id"]
        lists = [flat[a:b].tolist() for a, b in pairwise(tokens.offsets.tolist())]
        found: list[str] = self._backend.batch_decode(
            lists, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return found


class SentenceBleu:
    """BLEU of single sentences, by sacrebleu with effective order."""

    def __init__(self, tokenizer: str) -> None:
        """Set up sacrebleu.

        Args:
            tokenizer: sacrebleu's name of it, as 13a, intl, zh or char.
        """
        from sacrebleu.metrics.bleu import BLEU

        self._bleu = BLEU(effective_order=True, tokenize=tokenizer)

    def score(self, hypothesis: str, reference: str) -> float:
        """From 0 to 100."""
        return float(self._bleu.sentence_score(hypothesis, [reference]).score)


def tokens_of(columns: Mapping[str, Ragged], chosen: np.ndarray) -> Ragged:
    """Tokens of one hypothesis of each sample.

    Args:
        columns: of a beams signal.
        chosen: [R] integer, which hypothesis of each.

    Returns:
        [R] ragged `id` int32.
    """
    starts, lengths = _span(columns, chosen)
    index = segment_indices(starts + columns["tokens"].offsets[:-1], lengths)
    fields = {name: values[index] for name, values in columns["tokens"].fields.items()}
    return Ragged(offsets_of(lengths), {"id": join_ids(fields)})


def all_tokens(columns: Mapping[str, Ragged]) -> Ragged:
    """[H] ragged `id` int32: tokens of every hypothesis, sample after sample."""
    lengths = columns["hypotheses"].fields["num_tokens"].astype(np.int64)
    return Ragged(offsets_of(lengths), {"id": join_ids(columns["tokens"].fields)})


def draw(columns: Mapping[str, Ragged], hashes: np.ndarray) -> np.ndarray:
    """One hypothesis of each sample at random, by the softmax of their log-probs.

    Args:
        columns: of a beams signal.
        hashes: [R] uint64, a random number for each sample.

    Returns:
        [R] int64.
    """
    hypotheses = columns["hypotheses"]
    first, counts = hypotheses.offsets[:-1].astype(np.int64), hypotheses.lengths
    log_probs = hypotheses.fields["log_prob"].astype(np.float64)
    largest = np.maximum.reduceat(log_probs, first)
    weights = np.exp(log_probs - np.repeat(largest, counts))
    ends = np.cumsum(weights)
    before = ends[first] - weights[first]
    total = ends[first + counts - 1] - before
    point = before + hashes.astype(np.float64) / _HASHES * total
    # The first hypothesis whose end lies beyond the point; rounding must not leave the sample.
    found = np.searchsorted(ends, point, side="right") - first
    return np.clip(found, 0, counts - 1)


def closest(
    columns: Mapping[str, Ragged], texts: list[str], references: list[str], bleu: SentenceBleu
) -> np.ndarray:
    """The hypothesis of each sample whose sentence BLEU is the highest, the first of equals.

    Args:
        columns: of a beams signal.
        texts: H, of `all_tokens`.
        references: R.
        bleu: scores one against the other.

    Returns:
        [R] int64.
    """
    ends = columns["hypotheses"].offsets.tolist()
    best = []
    for m, reference in enumerate(references):
        scores = [bleu.score(text, reference) for text in texts[ends[m] : ends[m + 1]]]
        best.append(scores.index(max(scores)))
    return np.array(best, dtype=np.int64)


def labels_of(
    record: LogitsRecord,
    columns: Mapping[str, Ragged],
    hypotheses: Mapping[str, Ragged],
    chosen: np.ndarray,
) -> dict[str, Ragged]:
    """Labels of the chosen hypotheses alone.

    Args:
        record: of the logits signal, made on one hypothesis or on all.
        columns: its columns for R samples, in arrays of their own.
        hypotheses: columns of the beams signal for the same samples.
        chosen: [R] integer, which hypothesis of each; the one of the record where it has one.
    """
    if record.hypothesis != "all":
        return dict(columns)
    tokens = columns["tokens"]
    starts, lengths = _span(hypotheses, chosen)
    starts = starts + tokens.offsets[:-1]
    index = segment_indices(starts, lengths)
    ends = offsets_of(lengths)
    kept = {"tokens": Ragged(ends, {name: values[index] for name, values in tokens.fields.items()})}
    for name in columns:
        if name == "tokens":
            continue
        positions = len(tokens.fields["gold"])
        counts = tokens.fields.get(f"num_{name}", np.full(positions, record.vocab_size))
        before = offsets_of(counts.astype(np.int64))
        first, last = before[starts], before[starts + lengths]
        entries = segment_indices(first, last - first)
        fields = {key: values[entries] for key, values in columns[name].fields.items()}
        kept[name] = Ragged(offsets_of(last - first), fields)
    return kept


def _span(columns: Mapping[str, Ragged], chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[R] first token of the chosen hypothesis within its sample, and [R] how many it has."""
    hypotheses = columns["hypotheses"]
    counts = hypotheses.fields["num_tokens"].astype(np.int64)
    before = offsets_of(counts)
    first = hypotheses.offsets[:-1].astype(np.int64)
    return before[first + chosen] - before[first], counts[first + chosen]


def choose(
    choice: Choice,
    columns: Mapping[str, Ragged],
    hashes: np.ndarray | None,
    closest_to_reference: np.ndarray | None,
) -> np.ndarray:
    """[R] int64 the chosen hypothesis of each sample.

    Args:
        choice: how.
        columns: of a beams signal.
        hashes: [R] uint64, for `sampled`.
        closest_to_reference: [R], for `reference`.
    """
    if choice == "sampled":
        assert hashes is not None
        return draw(columns, hashes)
    if choice == "reference":
        assert closest_to_reference is not None
        return closest_to_reference
    return np.zeros(len(columns["hypotheses"]), dtype=np.int64)
