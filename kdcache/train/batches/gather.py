"""Gathering: some samples of a window as a batch of tensors, a few vectorised takes a signal."""

# B samples, T positions, R rows of a dense signal, L layers, W width

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import FormatError
from kdcache.formats.cache import Cache
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import join_ids
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
from kdcache.labels import LogitsSpec, coded_labels
from kdcache.train.batches.batch import (
    Batch,
    DenseRows,
    Hypotheses,
    Masked,
    Scores,
    SignalBatch,
    Tokens,
)


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
        self, window: WindowReader, parts: Sequence[np.ndarray], gold: np.ndarray | None = None
    ) -> list[Batch]:
        """Several batches, whose pieces are copied out of the files together.

        Args:
            window: that serves the streams and signals.
            parts: of each batch its [B] samples, counted within the window.
            gold: gold labels of the window's samples, see `GoldLabels`; None: not asked for.
        """
        if not parts:
            return []
        index = np.concatenate(parts)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        rows, sample_ids = window.row[index], window.sample_id.take(index, axis=0)
        streams = window.take_streams(index)
        signals = {
            name: window.take_signal(name, index)
            for name in self._records
            if name not in self.layers
        }
        made = []
        for part, end in zip(parts, ends, strict=True):
            span = end - len(part), end
            batch = Batch(
                rows=rows[slice(*span)],
                sample_ids=sample_ids[slice(*span)],
                streams={
                    name: padded(streams[name].part(*span), pad) for name, pad in self._pad.items()
                },
                signals={
                    name: _dense(record, window, part, self.layers[name])
                    if isinstance(record, HiddenRecord | AttentionRecord)
                    else _decodable(
                        record, {key: one.part(*span) for key, one in signals[name].items()}
                    )
                    for name, record in self._records.items()
                },
                gold=None if gold is None else _gold(gold[part]),
            )
            made.append(batch.pinned() if self._pin else batch)
        return made


def _gold(codes: np.ndarray) -> Tensor:
    """[B] targets of some samples."""
    found = torch.from_numpy(codes)
    return found.float() if found.is_floating_point() else found


def _decodable(record: SignalRecord, columns: Mapping[str, Ragged]) -> SignalBatch:
    """Columns of some samples as tensors."""
    if isinstance(record, LogitsRecord):
        knots = tuple(record.temperatures)
        spec = LogitsSpec(record.codec, record.vocab_size, knots, record.imported)
        return coded_labels(spec, columns)
    if isinstance(record, ClassesRecord):
        return _scores(record, columns)
    if isinstance(record, MasksRecord):
        return _masked(record, columns)
    assert isinstance(record, BeamsRecord)
    return _hypotheses(columns)


def padded(stream: Ragged, pad: int) -> Tokens:
    """Ragged tokens as a matrix, padded at the end.

    Args:
        stream: of B samples, in fresh (writable) arrays.
        pad: id that stands outside the mask.
    """
    lengths = stream.lengths
    flat = join_ids(stream.fields).astype(np.int64)
    mask = np.arange(max(1, int(lengths.max(initial=0)))) < lengths[:, None]  # [B, T]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = flat
    beside: dict[str, Tensor] = {}
    for field, dtype in (("segment", np.int64), ("loss", np.bool_)):
        if field in stream.fields:
            values = np.zeros(mask.shape, dtype=dtype)
            values[mask] = stream.fields[field]
            beside[field] = torch.from_numpy(values)
    return Tokens(
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        flat=torch.from_numpy(flat),
        segments=beside.get("segment"),
        loss=beside.get("loss"),
    )


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


def _masked(record: MasksRecord, columns: Mapping[str, Ragged]) -> Masked:
    masked = columns["masked"]
    counts = columns["replicas"].fields["num_masked"].astype(np.int64)
    return Masked(
        positions=torch.from_numpy(masked.fields["position"].astype(np.int64)),
        ids=torch.from_numpy(join_ids(masked.fields).astype(np.int64)),
        counts=torch.from_numpy(counts.reshape(-1, record.replicas)),
    )


def _hypotheses(columns: Mapping[str, Ragged]) -> Hypotheses:
    hypotheses = columns["hypotheses"]
    return Hypotheses(
        ids=torch.from_numpy(join_ids(columns["tokens"].fields).astype(np.int64)),
        lengths=torch.from_numpy(hypotheses.fields["num_tokens"].astype(np.int64)),
        log_probs=torch.from_numpy(hypotheses.fields["log_prob"].astype(np.float32)),
        counts=torch.from_numpy(hypotheses.lengths.copy()),
    )
