"""Items: what the teacher reads in one row of a forward, for all samples of a shard.

An item is a sample, one of its maskings or one of its hypotheses. The items of a sample stand
together, in order.
"""

# F items, M samples, B rows of a batch, T tokens, S source tokens, P labelled positions

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.dump.batches import Batch, pad
from kdcache.formats.masks import masked_stream
from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.formats.schema import join_ids
from kdcache.formats.shard import SampleShard


@dataclass(frozen=True)
class Items:
    """Rows of forwards over one shard.

    Attributes:
        sample: [F] int64 sample of the shard that each item is of, ascending.
        variant: [F] int64 replica or hypothesis of the sample; 0 where there is one.
        tokens: [F] ragged: `id` int32, and `segment` uint8 for pairs. What is described.
        source: [F] ragged `id`: what an encoder reads beside them; None where there is none.
        labels: [F] ragged: `position` of each labelled token within its item, ascending, and
            `gold`, the token that stands there in truth; of segments also `place`, the token's
            position within the sample. None for signals without labels.
        from_start: whether a decoder begins with its start token, see `Batch`.
    """

    sample: np.ndarray
    variant: np.ndarray
    tokens: Ragged
    source: Ragged | None = None
    labels: Ragged | None = None
    from_start: bool = False

    def __len__(self) -> int:
        """Number of items."""
        return len(self.sample)

    def of_samples(self, start: int, stop: int) -> tuple[int, int]:
        """The items [first, last) of the samples [start, stop)."""
        first, last = np.searchsorted(self.sample, (start, stop))
        return int(first), int(last)

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """[F] source tokens (0 without a source) and [F] tokens of each item."""
        tokens = self.tokens.lengths
        return np.zeros_like(tokens) if self.source is None else self.source.lengths, tokens

    def batch(self, rows: np.ndarray, pad_id: int, device: torch.device) -> Batch:
        """Some items as the padded input of one forward.

        Args:
            rows: [B] items.
            pad_id: fills the rest.
            device: the teacher's.
        """
        ids, mask = pad(self.tokens, rows, pad_id)
        segments = source_ids = source_mask = None
        if "segment" in self.tokens.fields:
            segments, _ = pad(self.tokens, rows, 0, "segment")
        if self.source is not None:
            source_ids, source_mask = pad(self.source, rows, pad_id)
        parts = (ids, mask, segments, source_ids, source_mask)
        return Batch.from_numpy(*parts, device=device, from_start=self.from_start)

    def labelled(self, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
        """Where the labels of some items are.

        Args:
            rows: [B] items.
            device: the teacher's.

        Returns:
            [B, T] bool, T as in `batch`, and [P] int64 indices into the fields of `labels`.
        """
        assert self.labels is not None, "asked for by signals with labels alone"
        counts = self.labels.lengths[rows]
        index = segment_indices(self.labels.offsets[rows].astype(np.int64), counts)
        width = max(1, int(self.tokens.lengths[rows].max(initial=0)))
        at = np.zeros((len(rows), width), dtype=bool)
        at[np.repeat(np.arange(len(rows)), counts), self.labels.fields["position"][index]] = True
        return torch.from_numpy(at).to(device), index


def stream_ids(samples: SampleShard, stream: str) -> Ragged:
    """A stream's tokens: `id` int32, and its other fields as they are."""
    column = samples.streams[stream]
    kept = {k: v for k, v in column.fields.items() if k not in ("id", "id_high")}
    return Ragged(column.offsets, {"id": join_ids(column.fields), **kept})


def sample_items(samples: SampleShard, stream: str, source: str | None = None) -> Items:
    """One item for every sample, without labels."""
    tokens = stream_ids(samples, stream)
    return Items(
        sample=np.arange(len(tokens), dtype=np.int64),
        variant=np.zeros(len(tokens), dtype=np.int64),
        tokens=tokens,
        source=None if source is None else stream_ids(samples, source),
    )


def target_items(samples: SampleShard, stream: str, source: str) -> Items:
    """One item for every sample, every token labelled."""
    items = sample_items(samples, stream, source)
    return Items(items.sample, items.variant, items.tokens, items.source, _all(items.tokens))


def position_items(samples: SampleShard, stream: str) -> Items:
    """One item for every sample; labelled is every token but the first that has a loss."""
    items = sample_items(samples, stream)
    every = _all(items.tokens)
    keep = every.fields["position"] > 0
    if "loss" in items.tokens.fields:
        keep &= items.tokens.fields["loss"].astype(bool)
    return Items(items.sample, items.variant, items.tokens, None, _where(every, keep))


def hypothesis_items(
    samples: SampleShard, source: str, beams: Mapping[str, Ragged], which: int | str
) -> Items:
    """One item for every chosen hypothesis, every token labelled.

    Args:
        samples: the shard.
        source: stream the encoder reads.
        beams: columns of the beams signal's shard.
        which: a hypothesis, or "all". A sample that has fewer has no item.
    """
    counts = beams["hypotheses"].lengths
    sample = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    variant = segment_indices(np.zeros(len(counts), dtype=np.int64), counts)
    offsets = offsets_of(beams["hypotheses"].fields["num_tokens"].astype(np.int64))
    tokens = Ragged(offsets, {"id": join_ids(beams["tokens"].fields)})
    if which != "all":
        chosen = np.flatnonzero(variant == which)
        sample, variant, tokens = sample[chosen], variant[chosen], tokens.take(chosen)
    read = stream_ids(samples, source).take(sample)
    return Items(sample, variant, tokens, read, _all(tokens), from_start=True)


def masked_items(samples: SampleShard, stream: str, masks: Mapping[str, Ragged]) -> Items:
    """One item for every masking of a sample: the masked tokens, labelled where they are.

    Args:
        samples: the shard.
        stream: that is masked.
        masks: columns of the masks signal's shard.
    """
    truth = stream_ids(samples, stream)
    replicas = masks["replicas"].lengths
    sample = np.repeat(np.arange(len(replicas), dtype=np.int64), replicas)
    variant = segment_indices(np.zeros(len(replicas), dtype=np.int64), replicas)
    tokens = masked_stream(truth, masks, sample, variant)
    offsets = offsets_of(masks["replicas"].fields["num_masked"].astype(np.int64))
    position = masks["masked"].fields["position"].astype(np.int64)
    starts = np.repeat(truth.offsets[sample].astype(np.int64), np.diff(offsets))
    gold = truth.fields["id"][starts + position]
    labels = Ragged(offsets, {"position": position, "gold": gold})
    return Items(sample, variant, tokens, None, labels)


def segment_items(samples: SampleShard, stream: str, masks: Mapping[str, Ragged]) -> Items:
    """One item for every masking: its encoder reads the masked tokens, its decoder writes them.

    Args:
        samples: the shard.
        stream: that is masked.
        masks: columns of the masks signal's shard.
    """
    masked = masked_items(samples, stream, masks)
    assert masked.labels is not None, "masked items have labels"
    tokens = Ragged(masked.labels.offsets, {"id": masked.labels.fields["gold"]})
    place = masked.labels.fields["position"]
    labels = Ragged(masked.labels.offsets, {**_all(tokens).fields, "place": place})
    return Items(masked.sample, masked.variant, tokens, masked.tokens, labels, from_start=True)


def placed_segment_items(samples: SampleShard, stream: str, masks: Mapping[str, Ragged]) -> Items:
    """One item for every masking: the decoder writes masked tokens at their positions.

    Args:
        samples: the shard.
        stream: that is masked.
        masks: columns of the masks signal's shard.
    """
    masked = masked_items(samples, stream, masks)
    truth = stream_ids(samples, stream).take(masked.sample)
    tokens = Ragged(truth.offsets, {"id": truth.fields["id"]})
    parts = masked.sample, masked.variant, tokens, masked.tokens, masked.labels
    return Items(*parts, from_start=True)


def _all(tokens: Ragged) -> Ragged:
    """Labels at every token."""
    lengths = tokens.lengths
    position = segment_indices(np.zeros(len(lengths), dtype=np.int64), lengths)
    return Ragged(offsets_of(lengths), {"position": position, "gold": tokens.fields["id"]})


def _where(labels: Ragged, keep: np.ndarray) -> Ragged:
    """Some of the labels."""
    ends = np.zeros(len(keep) + 1, dtype=np.int64)
    np.cumsum(keep, out=ends[1:])
    fields = {name: values[keep] for name, values in labels.fields.items()}
    return Ragged(ends[labels.offsets], fields)
