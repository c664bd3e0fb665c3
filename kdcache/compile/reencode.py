"""Re-encoding: stored soft labels to those of a smaller codec, without the teacher.

What can be had: anything from `full`; from `threshold` one of a larger c, for all of its
temperatures or some; from `topk` and `nucleus` fewer of the most probable ids; from `sampled`
fewer of the draws; from each the same with narrower values. Labels that are drawn stay unbiased.

Every random number is a hash under a purpose that names the new codec. Numbers that chose the
stored entries, at the dump or at an earlier re-encoding, would choose among them with a bias.
"""

# M samples, N positions, E entries, R positions of a block, V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kdcache.compile.servable import check_servable
from kdcache.compile.sparse_labels import SparseLabels
from kdcache.compile.thinning import Thinning
from kdcache.dump.codecs.select import EncodedPositions, encode_logits
from kdcache.formats.codec import Codec
from kdcache.formats.codes import exact_log_probs
from kdcache.formats.keyed import position_hash, sample_keys
from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.formats.signals import LogitsRecord

#: What the random numbers are for; the dump's are for "draw" and "round".
REDRAW, REROUND = "redraw", "reround"

#: Entries of distributions over V that are decoded at once.
_BLOCK_ENTRIES = 1 << 23


def reencoded_record(
    record: LogitsRecord, codec: Codec, temperatures: Sequence[float] | None = None
) -> LogitsRecord:
    """The record of a logits signal once it is re-encoded.

    Args:
        record: of the signal as it is.
        codec: that is asked for.
        temperatures: where to store the tail, ascending; where the signal does without it.

    Raises:
        RecipeError: that cannot be had from what is stored.
    """
    knots = tuple(record.temperatures if temperatures is None else map(float, temperatures))
    check_servable(record, codec, knots)
    fields = {name: getattr(record, name) for name in LogitsRecord.model_fields}
    return LogitsRecord(**{**fields, "codec": codec, "temperatures": knots})


def reencode(
    columns: Mapping[str, Ragged],
    record: LogitsRecord,
    new: LogitsRecord,
    sample_ids: np.ndarray,
    rows: np.ndarray,
) -> dict[str, Ragged]:
    """Re-encode the labels of some samples.

    Args:
        columns: of the signal, for M samples.
        record: of the signal.
        new: from `reencoded_record`.
        sample_ids: [M, 16] uint8.
        rows: [M] int64 corpus rows.

    Returns:
        Columns of the new record's schema, in fresh arrays. What a sample's labels become depends
        on them, on its id and its row, on the signal's name and seed and on nothing else.
    """
    columns = {name: column.take(np.arange(len(column))) for name, column in columns.items()}
    lengths = columns["tokens"].lengths
    draw, rounding = (
        _hashes(purpose, new, sample_ids, rows, lengths) for purpose in (REDRAW, REROUND)
    )
    if record.codec.name == "full":
        return _from_full(columns, record, new, draw, rounding)
    labels = SparseLabels.of(columns, record)
    labels = Thinning(record, new, draw, rounding).apply(labels)
    return labels.columns(new, offsets_of(lengths))


def _hashes(
    purpose: str,
    new: LogitsRecord,
    sample_ids: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:
    """[N] uint64 hash of each position, numbered within its sample's labels from 0."""
    purpose = _purpose(purpose, new.codec)
    keys = sample_keys(new.seed, purpose, new.name, sample_ids, rows)
    return position_hash(np.repeat(keys, lengths), segment_indices(np.zeros_like(lengths), lengths))


def _purpose(purpose: str, codec: Codec) -> str:
    """What numbers are for; a chain of re-encodings never draws for the same codec twice."""
    return f"{purpose} {codec.model_dump_json()}"


def _from_full(
    columns: Mapping[str, Ragged],
    record: LogitsRecord,
    new: LogitsRecord,
    draw: np.ndarray,
    rounding: np.ndarray,
) -> dict[str, Ragged]:
    """Decoded distributions through the very selection that a dump goes through."""
    tokens, codes = columns["tokens"], columns["exact"].fields["code"]
    if record.codec == new.codec:
        return dict(columns)
    codes = codes.reshape(-1, record.vocab_size)  # [N, V]
    step = max(1, _BLOCK_ENTRIES // record.vocab_size)
    draws, roundings = (torch.from_numpy(hashed.view(np.int64)) for hashed in (draw, rounding))
    pieces = []
    for start in range(0, max(1, len(codes)), step):
        block = slice(start, start + step)
        log_probs = torch.from_numpy(exact_log_probs(record.codec, codes[block]))  # [R, V]
        gold = torch.zeros(len(log_probs), dtype=torch.int64)  # its code is there already
        here = draws[block], roundings[block]
        pieces.append(encode_logits(log_probs, gold, *here, new.codec, new.temperatures))
    encoded = EncodedPositions.concat(pieces)
    host = encoded.to_host()
    host["tokens"] |= {name: tokens.fields[name] for name in ("gold", "entropy")}
    counts = {"exact": encoded.num_exact, "drawn": encoded.num_drawn}
    result = {}
    for name, fields in host.items():
        ends = tokens.offsets
        result[name] = Ragged(
            ends if name == "tokens" else offsets_of(counts[name].numpy())[ends], fields
        )
    return result
