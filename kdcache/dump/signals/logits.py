"""The logits signal: the teacher's distribution at every labelled position."""

# F items, B rows of a batch, T tokens, N labelled positions, R rows of a piece, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from kdcache.dump.codecs.block import NotFiniteError
from kdcache.dump.codecs.select import EncodedPositions, encode_logits
from kdcache.dump.signals.encoder import Columns, Request, SignalEncoder, common_fields
from kdcache.dump.signals.items import (
    Items,
    hypothesis_items,
    masked_items,
    placed_segment_items,
    position_items,
    segment_items,
    target_items,
)
from kdcache.dump.teacher import Teacher
from kdcache.errors import ModelError
from kdcache.formats.cache import Cache
from kdcache.formats.keyed import position_hash, sample_keys
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import LogitsRecord
from kdcache.recipe import LogitsSignal

#: Logits made at a time: what a processor's cache holds, and a GiB in float32 elsewhere.
PIECE_ENTRIES_CPU, PIECE_ENTRIES = 1 << 22, 1 << 28
#: How items are made of maskings.
_OF_MASKS = {
    "masked": masked_items,
    "segment": segment_items,
    "segment_in_place": placed_segment_items,
}


class LogitsEncoder(SignalEncoder):
    """Soft labels of one signal."""

    main = "tokens"
    record: LogitsRecord
    teacher: Teacher

    def __init__(self, cache: Cache, request: Request) -> None:
        super().__init__(cache, request)
        signal, teacher = request.signal, request.teacher
        assert isinstance(signal, LogitsSignal), "the runner chooses by kind"
        assert teacher is not None, "logits were checked to have a teacher"
        assert teacher.vocab_size is not None, "a teacher of logits has a vocabulary"
        self.record = LogitsRecord(
            **common_fields(cache, request),
            at=signal.at,
            masks=signal.masks,
            hypotheses=signal.hypotheses,
            hypothesis=signal.hypothesis,
            vocab_size=teacher.vocab_size,
            codec=signal.codec,
            temperatures=tuple(signal.temperatures),
        )
        self._keys: dict[str, np.ndarray] = {}
        self._corpus_rows = np.empty(0, dtype=np.int64)

    @classmethod
    def check(cls, request: Request) -> None:
        """The teacher must label that kind of position."""
        signal, name, teacher = request.signal, request.name, request.teacher
        assert isinstance(signal, LogitsSignal), "the runner chooses by kind"
        assert teacher is not None, "logits were checked to have a teacher"
        if signal.at not in teacher.places or teacher.vocab_size is None:
            able = ", ".join(teacher.places) or "nothing"
            raise ModelError(
                f"signals.{name}: {teacher.record.path} is of kind {teacher.kind}, which labels "
                f"{able}; found at: {signal.at}; choose another teacher or another `at`"
            )

    def items(self, samples: SampleShard, inputs: Mapping[str, Columns]) -> Items:
        """Samples, their maskings or their hypotheses, with the tokens that are labelled."""
        record = self.record
        if record.hypotheses is not None:
            assert record.source is not None, "hypotheses are of an encoder-decoder"
            beams = inputs[record.hypotheses]
            items = hypothesis_items(samples, record.source, beams, record.hypothesis)
        elif record.at == "targets":
            assert record.source is not None, "targets are of an encoder-decoder"
            items = target_items(samples, record.stream, record.source)
        elif record.at == "positions":
            items = position_items(samples, record.stream)
        else:
            assert record.masks is not None, "the recipe was checked"
            items = _OF_MASKS[record.at](samples, record.stream, inputs[record.masks])
        self._corpus_rows = samples.row
        self._keys = {
            purpose: _item_keys(record, purpose, items, samples) for purpose in ("draw", "round")
        }
        return items

    def counts(self, items: Items) -> np.ndarray:
        """[F] labelled tokens."""
        assert items.labels is not None, "items of logits have labels"
        return items.labels.lengths

    def encode(self, items: Items, rows: np.ndarray) -> Callable[[], Columns]:
        """One forward and the selection, both on the teacher's device."""
        device, record = self.teacher.device, self.record
        at, index = items.labelled(rows, device)  # [B, T], [N]
        assert items.labels is not None, "items of logits have labels"
        fields = items.labels.fields
        counts = items.labels.lengths[rows]
        gold = torch.from_numpy(fields["gold"][index].astype(np.int64)).to(device)
        draw, round_ = (
            torch.from_numpy(
                position_hash(
                    np.repeat(self._keys[purpose][rows], counts), fields["position"][index]
                ).view(np.int64)
            ).to(device)
            for purpose in ("draw", "round")
        )
        batch = items.batch(rows, self.teacher.pad_id, device)
        if record.at == "segment_in_place":
            batch = replace(batch, seen=at)
        entries = PIECE_ENTRIES_CPU if device.type == "cpu" else PIECE_ENTRIES
        pieces, done = [], 0
        for logits in self.teacher.logits_in_pieces(batch, at, entries):  # [R, V]
            here = slice(done, done + len(logits))
            labels = gold[here], draw[here], round_[here]
            try:
                pieces.append(encode_logits(logits, *labels, record.codec, record.temperatures))
            except NotFiniteError as error:
                place = done + error.position
                raise NotFiniteError(place, self._place(items, rows, place)) from None
            done += len(logits)
        encoded = EncodedPositions.concat(pieces)
        return lambda: _columns(encoded, counts)

    def _place(self, items: Items, rows: np.ndarray, label: int) -> str:
        """Words for one label of a batch."""
        assert items.labels is not None, "items of logits have labels"
        counts = items.labels.lengths[rows]
        at = int(np.searchsorted(np.cumsum(counts), label, side="right"))
        item, within = int(rows[at]), label - int(counts[:at].sum())
        fields = items.labels.fields
        places = fields.get("place", fields["position"])
        position = places[int(items.labels.offsets[item]) + within]
        variant = ""
        if self.record.inputs:
            word = "replica" if self.record.masks else "hypothesis"
            variant = f", {word} {items.variant[item]}"
        return f"corpus row {self._corpus_rows[items.sample[item]]}{variant}, position {position}"


def _item_keys(
    record: LogitsRecord, purpose: str, items: Items, samples: SampleShard
) -> np.ndarray:
    """[F] uint64 hash key of each item."""
    keys = np.empty(len(items), dtype=np.uint64)
    for variant in np.unique(items.variant):
        mine = items.variant == variant
        which = {"hypothesis" if record.hypotheses else "replica": int(variant)}
        keys[mine] = sample_keys(
            record.seed,
            purpose,
            record.name,
            samples.sample_id[items.sample[mine]],
            samples.row[items.sample[mine]],
            **which,
        )
    return keys


def _columns(encoded: EncodedPositions, counts: np.ndarray) -> Columns:
    """Encoded positions as columns of B samples, in host memory.

    Args:
        encoded: N positions.
        counts: [B] int64 of them that each item has.
    """
    ends = offsets_of(counts)
    per_position = {"exact": encoded.num_exact, "drawn": encoded.num_drawn}
    columns = {}
    for name, fields in encoded.to_host().items():
        offsets = ends
        if name != "tokens":
            offsets = offsets_of(per_position[name].cpu().numpy())[ends]
        columns[name] = Ragged(offsets, fields)
    return columns
