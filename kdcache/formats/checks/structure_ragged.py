"""Structural promises of every signal that is kept in Arrow: pure, one line a fault.

# M samples of a part, H hypotheses, R replicas, E entries, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcache.formats.checks.structure import (
    beyond,
    label_faults,
    logits_faults,
    offset_faults,
    range_faults,
    sum_faults,
)
from kdcache.formats.checks.structure_entries import first_fall
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.signals import (
    BeamsRecord,
    ClassesRecord,
    LogitsRecord,
    MasksRecord,
    SignalRecord,
)
from kdcache.formats.units import MAIN_COLUMN

#: A hypothesis' log-prob may be above 0 by this much, for rounding in float32 sums.
ABOVE_ZERO_NATS = 0.01


def ragged_faults(
    record: SignalRecord,
    columns: Mapping[str, Ragged],
    expected: np.ndarray | None,
    lengths: np.ndarray,
) -> list[str]:
    """Check one part of a signal.

    Args:
        record: of the signal.
        columns: its ragged columns.
        expected: [M] records of the main column, from `units.label_counts`.
        lengths: [M] tokens of each sample in the signal's stream.
    """
    if isinstance(record, LogitsRecord):
        assert expected is not None, "labels belong to tokens that are known"
        return logits_faults(record.codec, record.vocab_size, columns, expected)
    faults = [fault for name, column in columns.items() for fault in offset_faults(name, column)]
    main = MAIN_COLUMN[record.kind]
    faults = faults or label_faults(main, columns[main], expected)
    if faults:
        return faults
    if isinstance(record, BeamsRecord):
        return _beams_faults(record, columns["hypotheses"], columns["tokens"])
    if isinstance(record, MasksRecord):
        return _masks_faults(record, columns["replicas"], columns["masked"], lengths)
    assert isinstance(record, ClassesRecord), record.kind
    return _finite_faults("scores.value", columns["scores"].fields["value"])


def _beams_faults(record: BeamsRecord, hypotheses: Ragged, tokens: Ragged) -> list[str]:
    """1 to num_hypotheses a sample, whose tokens and scores make sense."""
    faults = []
    counts = hypotheses.lengths
    wrong = np.flatnonzero((counts < 1) | (counts > record.num_hypotheses))
    if len(wrong):
        m = int(wrong[0])
        faults.append(
            f"hypotheses: {len(wrong)} samples have none or too many, the first is sample {m} of "
            f"the part: {int(counts[m])}, expected 1 to {record.num_hypotheses}"
        )
    fields = hypotheses.fields
    ends = offsets_of(fields["num_tokens"])
    faults += sum_faults("tokens", hypotheses, tokens, ends, "num_tokens")
    faults += range_faults("tokens", tokens.fields, record.vocab_size)
    log_probs = fields["log_prob"]
    faults += _finite_faults("hypotheses.log_prob", log_probs)
    faults += _finite_faults("hypotheses.score", fields["score"])
    above = np.count_nonzero(log_probs > ABOVE_ZERO_NATS)
    if above:
        faults.append(f"hypotheses.log_prob: {above} values are above 0")
    return faults


def _masks_faults(
    record: MasksRecord, replicas: Ragged, masked: Ragged, lengths: np.ndarray
) -> list[str]:
    """Positions ascend within a replica and lie in their sample."""
    counts = replicas.fields["num_masked"]
    ends = offsets_of(counts)
    faults = sum_faults("masked", replicas, masked, ends, "num_masked")
    faults += range_faults("masked", masked.fields, record.vocab_size)
    if faults:
        return faults
    sample = np.repeat(np.arange(len(lengths)), replicas.lengths)  # [R] sample of each replica
    position = masked.fields["position"]
    fall = first_fall(position, ends)
    if fall is not None:
        at = int(sample[int(np.searchsorted(ends, fall, side="right")) - 1])
        return [f"masked: positions of sample {at} of the part do not ascend"]
    filled = np.flatnonzero(counts)
    last = position[ends[filled + 1] - 1].astype(np.int64)  # the largest of their replica
    beyond_end = np.flatnonzero(last >= lengths[sample[filled]])
    if not len(beyond_end):
        return []
    first = int(beyond_end[0])
    at = int(sample[filled[first]])
    return [
        f"masked: position {int(last[first])} of sample {at} of the part, which has "
        f"{int(lengths[at])} tokens"
    ]


def _finite_faults(name: str, values: np.ndarray) -> list[str]:
    """Nothing that a teacher says here may be NaN or infinite."""
    largest = np.finfo(values.dtype).max
    if not beyond(values, largest, -largest):
        return []
    bad = np.count_nonzero(~np.isfinite(values))
    return [f"{name}: {bad} values are NaN or infinite"]
