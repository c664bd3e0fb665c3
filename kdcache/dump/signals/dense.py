"""What hidden states and attentions share: sides, layers, parts, and the way to a Zarr group."""

# B rows of a batch, R rows of a part, N rows of a batch's items together, L layers, W width

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from kdcache.dump.signals.encoder import Columns, SignalEncoder
from kdcache.dump.signals.items import Items, masked_items, sample_items
from kdcache.dump.signals.values import float_codes, int8_codes, to_host
from kdcache.dump.teacher import Teacher
from kdcache.errors import ModelError, RecipeError
from kdcache.formats.dense import SCALE, VALUES, DenseRecord
from kdcache.formats.manifest import PartRecord
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.shard import SampleShard
from kdcache.formats.units import MAIN_COLUMN
from kdcache.formats.writer import CacheWriter
from kdcache.recipe import AttentionSignal, HiddenSignal


class DenseEncoder(SignalEncoder):
    """Rows of floats, the same number for every row."""

    main = MAIN_COLUMN["hidden"]
    record: DenseRecord
    teacher: Teacher
    _corpus_rows: np.ndarray

    def items(self, samples: SampleShard, inputs: Mapping[str, Columns]) -> Items:
        """The samples, or the maskings of them."""
        record = self.record
        self._corpus_rows = samples.row
        if record.masks is not None:
            return masked_items(samples, record.stream, inputs[record.masks])
        return sample_items(samples, record.stream, record.source)

    def encode(self, items: Items, rows: np.ndarray) -> Callable[[], Columns]:
        """One forward and the rounding, both on the teacher's device."""
        counts = self.counts(items)[rows]
        values = self.describe(items, rows)  # [N, L, W]

        def place(index: Sequence[int]) -> str:
            item = int(np.searchsorted(np.cumsum(counts), index[0], side="right"))
            within = index[0] - int(counts[:item].sum())
            what = self.name_value(items, int(rows[item]), within, index[2])
            return f"{self._name_item(items, int(rows[item]))}, layer {layers[index[1]]}: {what}"

        layers, kind = self.record.layers, self.record.values
        if kind == "int8":
            codes, scale = int8_codes(values, place)
            coded = {VALUES: codes, SCALE: scale}
        else:
            coded = {VALUES: float_codes(values, kind, "bfloat16", place)}
        return lambda: _columns(coded, counts)

    @abstractmethod
    def describe(self, items: Items, rows: np.ndarray) -> Tensor:
        """[N, L, W] what the teacher says of some items, in any float dtype.

        Args:
            items: of the shard.
            rows: [B] which of them; the rows of each follow one another, as many as `counts` says.
        """

    @abstractmethod
    def name_value(self, items: Items, item: int, row: int, column: int) -> str:
        """Words for one value of an item, by its row and column."""

    def _name_item(self, items: Items, item: int) -> str:
        """Words for an item."""
        replica = f", replica {items.variant[item]}" if self.record.masks is not None else ""
        return f"corpus row {self._corpus_rows[items.sample[item]]}{replica}"

    def write(
        self, writer: CacheWriter, shard: int, part: int, span: tuple[int, int], columns: Columns
    ) -> PartRecord:
        """Write one part as a Zarr group."""
        fields = columns[self.main].fields
        name = self.record.name
        return writer.write_dense_part(name, shard, part, *span, fields[VALUES], fields.get(SCALE))


def _columns(coded: Mapping[str, Tensor], counts: np.ndarray) -> Columns:
    """Codes as the column of B samples, in host memory."""
    fields = {name: to_host(codes) for name, codes in coded.items()}
    return {DenseEncoder.main: Ragged(offsets_of(counts), fields)}


def check_side(name: str, signal: HiddenSignal | AttentionSignal, teacher: Teacher) -> None:
    """A teacher must have the side that a signal describes, and be given what it reads.

    Args:
        name: of the signal.
        signal: its section.
        teacher: that speaks.

    Raises:
        ModelError: the teacher has no such signals, or no such side.
        RecipeError: the source is missing, or nothing reads it.
    """
    path, kind = teacher.record.path, teacher.kind
    if signal.kind not in teacher.signals:
        raise teacher.cannot(f"{signal.kind} signals ({name})")
    if signal.side not in teacher.sides:
        raise ModelError(
            f"signals.{name}.side is {signal.side}; {path}, a teacher of kind {kind}, has "
            f"{' and '.join(teacher.sides)}"
        )
    if signal.side == "decoder" and kind == "encoder_decoder" and signal.source is None:
        raise RecipeError(
            f"signals.{name}: the decoder of {path} needs what its encoder reads; set "
            f"signals.{name}.source to a stream"
        )
    if signal.source is not None and kind not in ("encoder_decoder", "custom"):
        raise RecipeError(
            f"signals.{name}.source is {signal.source!r}, but {path}, a teacher of kind {kind}, "
            "reads `stream` alone; leave out source"
        )


def chosen_layers(
    name: str, layers: Literal["all"] | Sequence[int], known: range, whose: str
) -> tuple[int, ...]:
    """Numbers of the layers that a recipe names.

    Args:
        name: of the signal.
        layers: all, or a list; negative numbers count from the end.
        known: the numbers there are.
        whose: the teacher and its side, for messages.

    Returns:
        L numbers, ascending.

    Raises:
        ModelError: there is no such layer.
        RecipeError: a layer is named twice.
    """
    if layers == "all":
        return tuple(known)
    numbers = [layer if layer >= 0 else known.stop + layer for layer in layers]
    for layer, number in zip(layers, numbers, strict=True):
        if number not in known:
            raise ModelError(
                f"signals.{name}.layers has {layer}; {whose} has {known.stop - 1} layers, so "
                f"expected {known.start} to {known.stop - 1}, or {-len(known)} to -1"
            )
    if len(set(numbers)) < len(numbers):
        raise RecipeError(
            f"signals.{name}.layers is {list(layers)}, which names a layer twice; of {whose} "
            f"these are {numbers}"
        )
    return tuple(sorted(numbers))
