"""Wide fields: records as a trainer computes with them, made of the fields that are stored.

Numbers are stored in as few bytes as they need, an id beyond 65,535 in two fields, the tail's knots
in one field each. The wide form has int64 counts and positions, whole ids (int64 in a stream; in
labels, of which there are many, uint16 where two bytes hold them, else int32) and one [N, n] field
of knots.
"""

# N records, n knots

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import join_ids

TAIL = "tail"
#: Columns of label entries.
_ENTRIES = ("exact", "drawn")
_COUNTS = ("num_exact", "num_drawn", "num_masked", "num_tokens", "position")


@dataclass(frozen=True)
class WideField:
    """One field of the wide form.

    Attributes:
        name: of the field.
        stored: names of the stored fields that it is made of.
        dtype: of its values.
        step: values at each record: n for knots, else 1.
    """

    name: str
    stored: tuple[str, ...]
    dtype: np.dtype
    step: int = 1


def wide_fields(column: str, stored: Mapping[str, np.dtype]) -> list[WideField]:
    """The wide form of a column.

    Args:
        column: its name; of a stream any other than those of labels.
        stored: dtype of each stored field, in their order.
    """
    found = []
    knots = tuple(name for name in stored if name.startswith(f"{TAIL}_"))
    for name, dtype in stored.items():
        if name == "id":
            parts = ("id", "id_high") if "id_high" in stored else ("id",)
            wide: np.dtype = np.dtype(np.int64)
            if column in _ENTRIES:
                wide = np.dtype(np.int32) if "id_high" in stored else dtype
            found.append(WideField(name, parts, wide))
        elif name == f"{TAIL}_0":
            found.append(WideField(TAIL, knots, dtype, len(knots)))
        elif name != "id_high" and name not in knots:
            wide = np.dtype(np.int64) if name in _COUNTS else dtype
            found.append(WideField(name, (name,), wide))
    return found


def widened(column: str, narrow: Ragged) -> Ragged:
    """The wide form of some records.

    Args:
        column: name of the column.
        narrow: its records as they are stored; what is wide already is shared.
    """
    fields = {}
    stored = {name: array.dtype for name, array in narrow.fields.items()}
    for field in wide_fields(column, stored):
        first = narrow.fields[field.stored[0]]
        if field.name == "id" and first.dtype != field.dtype:
            fields["id"] = join_ids(narrow.fields).astype(field.dtype, copy=False)
        elif field.name == TAIL and field.stored != (TAIL,):
            fields[TAIL] = np.stack([narrow.fields[name] for name in field.stored], axis=1)
        else:
            fields[field.name] = first.astype(field.dtype, copy=False)
    return Ragged(narrow.offsets, fields)
