"""Gathering: some samples of a window as a batch of tensors, a few vectorised takes a signal."""

# B samples, T positions, R rows of a dense signal, L layers, W width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import FormatError
from kdcache.formats.cache import Cache
from kdcache.formats.ragged import Ragged
from kdcache.formats.signals import (
    AttentionRecord,
    BeamsRecord,
    ClassesRecord,
    HiddenRecord,
    LogitsRecord,
    MasksRecord,
    SignalRecord,
)
from kdcache.formats.window import WindowReader
from kdcache.labels.coded_labels import LogitsSpec, wide_labels
from kdcache.train.batches.batch import (
    Batch,
    DenseRows,
    Hypotheses,
    Masked,
    Scores,
    SignalBatch,
)
from kdcache.train.batches.cut import by_name, cut, record_counts, split
from kdcache.train.batches.pad import padded_tokens

#: Tensors of coded labels to the column whose records they count.
_LABELS = {
    **dict.fromkeys(("num_exact", "num_drawn", "gold", "entropy", "tail"), "tokens"),
    **dict.fromkeys(("exact_id", "exact_code"), "exact"),
    **dict.fromkeys(("drawn_id", "drawn_code"), "drawn"),
}


class Gatherer:
    """Makes batches of the streams and signals that were asked for.

    Args:
        cache: an open cache.
        streams: names of streams.
        signals: names of signals.
        pin: whether batches are put into page-locked memory.
        layers: dense signal to the teacher's numbers of the layers to read; all of the others.

    Attributes:
        layers: dense signal to the indices of those layers in its record.

    Raises:
        FormatError: the cache lacks a stream, a signal or a layer.
    """

    def __init__(
        self,
        cache: Cache,
        streams: Sequence[str],
        signals: Sequence[str],
        pin: bool,
        layers: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._pin = pin
        self.layers = _layer_indices(cache, signals, layers or {})
        tokenizers = cache.manifest.tokenizers
        self._pad = {
            name: tokenizers[cache.stream(name).tokenizer].pad_id or 0
            for name in dict.fromkeys(streams)
        }
        self._records = {name: cache.signal(name) for name in dict.fromkeys(signals)}

    def batches(
        self,
        window: WindowReader,
        index: np.ndarray,
        ends: np.ndarray,
        gold: np.ndarray | None = None,
    ) -> list[Batch]:
        """Several batches, whose pieces are copied out of the files together.

        Args:
            window: that serves the streams and signals.
            index: [R] int64 samples of all batches, counted within the window.
            ends: [batches + 1] int64 samples before each batch, and of all.
            gold: gold labels of the window's samples, see `GoldLabels`; None: not asked for.
        """
        # Memory is copied first: whoever comes after it finds little of himself in the caches.
        streams = window.take_padded(index, ends, self._pad)
        columns = {
            name: window.take_signal(name, index, wide=True)
            for name, record in self._records.items()
            if not isinstance(record, HiddenRecord | AttentionRecord)
        }
        rows, sample_ids = window.take_names(index)
        sizes = (ends[1:] - ends[:-1]).tolist()
        tokens = {name: padded_tokens(streams[name], sizes) for name in self._pad}
        signals: dict[str, Sequence[SignalBatch]] = {}
        for name, record in self._records.items():
            if isinstance(record, HiddenRecord | AttentionRecord):
                parts = np.split(index, ends[1:-1])
                signals[name] = [_dense(record, window, part, self.layers[name]) for part in parts]
            else:
                signals[name] = _parted(record, columns[name], ends)
        spans = [slice(*span) for span in pairwise(ends.tolist())]
        targets: Sequence[Tensor | None] = [None] * len(sizes)
        if gold is not None:
            targets = split(_gold(gold.take(index)), sizes)
        made = map(
            Batch,
            [rows[span] for span in spans],
            [sample_ids[span] for span in spans],
            by_name(tokens, len(sizes)),
            by_name(signals, len(sizes)),
            targets,
        )
        return [batch.pinned() for batch in made] if self._pin else list(made)


def _gold(codes: np.ndarray) -> Tensor:
    """[B] targets of some samples."""
    found = torch.from_numpy(codes)
    return found.float() if found.is_floating_point() else found


def _parted(
    record: SignalRecord, columns: Mapping[str, Ragged], ends: np.ndarray
) -> Sequence[SignalBatch]:
    """Columns of several batches in their wide form, as tensors of each of them."""
    records = {name: record_counts(column, ends) for name, column in columns.items()}
    records[""] = np.diff(ends).tolist()
    if isinstance(record, LogitsRecord):
        knots = tuple(record.temperatures)
        spec = LogitsSpec(record.codec, record.vocab_size, knots, record.imported)
        return cut(wide_labels(spec, columns), _LABELS, records)
    if isinstance(record, ClassesRecord):
        return cut(_scores(record, columns), {"values": "scores"}, records)
    if isinstance(record, MasksRecord):
        return cut(_masked(columns), {"positions": "masked", "ids": "masked"}, records)
    assert isinstance(record, BeamsRecord)
    units = {"ids": "tokens", "lengths": "hypotheses", "log_probs": "hypotheses"}
    return cut(_hypotheses(columns), units, records)


def _layer_indices(
    cache: Cache, signals: Sequence[str], layers: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Indices of the layers of each dense signal that are read."""
    records = {name: cache.signal(name) for name in signals}
    dense = {n: r for n, r in records.items() if isinstance(r, HiddenRecord | AttentionRecord)}
    for name in layers:
        if name not in dense:
            raise FormatError(
                f"{cache.path}: layers are asked of signal {name!r}; the signals with layers that "
                f"are read are {sorted(dense)}"
            )
    found = {}
    for name, record in dense.items():
        asked = list(layers.get(name, record.layers))
        missing = [number for number in asked if number not in record.layers]
        if missing or not asked:
            raise FormatError(
                f"{cache.path}: signal {name!r} is asked for the layers {asked}; it has "
                f"{list(record.layers)}"
            )
        found[name] = tuple(list(record.layers).index(number) for number in asked)
    return found


def _dense(
    record: HiddenRecord | AttentionRecord,
    window: WindowReader,
    index: np.ndarray,
    layers: Sequence[int],
) -> DenseRows:
    values, scale, counts = window.take_dense(record.name, index, layers)
    tensor = torch.from_numpy(values)
    if record.values == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    return DenseRows(
        values=tensor,
        scale=None if scale is None else torch.from_numpy(scale),
        counts=torch.from_numpy(counts),
        layers=tuple(record.layers[layer] for layer in layers),
    )


def _scores(record: ClassesRecord, columns: Mapping[str, Ragged]) -> Scores:
    scores = columns["scores"]
    (values,) = scores.fields.values()
    return Scores(
        values=torch.from_numpy(values.astype(np.float32)),
        counts=torch.from_numpy(scores.lengths.copy()),
        labels=tuple(record.labels),
    )


def _masked(columns: Mapping[str, Ragged]) -> Masked:
    masked, replicas = columns["masked"], columns["replicas"]
    counts = replicas.fields["num_masked"].reshape(len(replicas), -1)
    return Masked(
        positions=torch.from_numpy(masked.fields["position"]),
        ids=torch.from_numpy(masked.fields["id"]),
        counts=torch.from_numpy(counts),
    )


def _hypotheses(columns: Mapping[str, Ragged]) -> Hypotheses:
    hypotheses = columns["hypotheses"]
    return Hypotheses(
        ids=torch.from_numpy(columns["tokens"].fields["id"]),
        lengths=torch.from_numpy(hypotheses.fields["num_tokens"]),
        log_probs=torch.from_numpy(hypotheses.fields["log_prob"].astype(np.float32)),
        counts=torch.from_numpy(hypotheses.lengths.copy()),
    )
