"""Terms over the vocabulary: from a batch's codes to what the losses take."""

# N target positions, B samples, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from kdcache.errors import RecipeError
from kdcache.formats.codec import WIDE_RANGE_NATS
from kdcache.formats.codes import code_log_probs
from kdcache.formats.signals import LogitsRecord, SignalRecord
from kdcache.labels.coded_labels import CodedLabels, entropy_nats
from kdcache.labels.decoding import decode, resolve_tail
from kdcache.labels.sparse_target import SparseTarget
from kdcache.recipe import LogitMSETerm, SampleWeight, SoftTerm, WalkedTerm
from kdcache.train.losses.divergences import (
    RowLosses,
    jensen_shannon_rows,
    logit_mse_rows,
    reverse_kl_rows,
    total_variation_rows,
)
from kdcache.train.losses.label_signals import check_label_signal
from kdcache.train.losses.narrowing import narrowed

#: Losses that walk all ids, by name.
_WALKED: Mapping[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl_rows,
    "jensen_shannon": jensen_shannon_rows,
    "total_variation": total_variation_rows,
}
#: Losses that are not defined for drawn entries.
_NEED_DENSITY = ("reverse_kl", "logit_mse")


def divergence(term: SoftTerm) -> RowLosses | None:
    """The losses of a term that are no sum over entries; None of one whose losses are."""
    if isinstance(term, WalkedTerm):
        return partial(_WALKED[term.loss], compiled=term.compiled)
    return logit_mse_rows if isinstance(term, LogitMSETerm) else None


def soft_target(
    coded: CodedLabels, term: SoftTerm, temperature: float, vocab_size: int
) -> SparseTarget:
    """The labels of a term over the ids that the student has.

    Args:
        coded: of N positions.
        term: whose tail is taken.
        temperature: of both sides.
        vocab_size: V, of the loss.
    """
    target = decode(coded, temperature, term.tail)
    if coded.spec.vocab_size > vocab_size:
        spec = coded.spec
        tail = resolve_tail(spec.codec, spec.temperatures, temperature, term.tail)
        return narrowed(target, spec.vocab_size, vocab_size, drawn=tail == "sampled")
    return target


def sample_factors(weight: SampleWeight, coded: CodedLabels, mask: Tensor) -> Tensor:
    """[B] factors of the samples, float32.

    Args:
        weight: what they are functions of.
        coded: labels of the N tokens of the mask.
        mask: [B, T] bool, true on target tokens.
    """
    if weight.by == "teacher_entropy":
        nats = entropy_nats(coded)
    else:
        table = code_log_probs(WIDE_RANGE_NATS).astype("float32")
        nats = -torch.from_numpy(table).to(mask.device)[coded.gold.long()]
    lengths = mask.sum(1)
    sample = torch.repeat_interleave(torch.arange(len(mask), device=mask.device), lengths)
    sums = torch.zeros(len(mask), device=mask.device).index_add_(0, sample, nats)
    means = sums / lengths.clamp(min=1)
    return torch.exp(-weight.strength * (means - weight.centre)).clamp(max=weight.limit)


def check_soft_signals(
    where: str,
    term: SoftTerm,
    signals: Mapping[str, SignalRecord],
    source: str,
    target: str,
) -> list[LogitsRecord]:
    """The signals of a term, if each can serve it at all of its temperatures.

    Raises:
        RecipeError: one cannot, or it is not there.
        IdentityError: it labels other streams than the student reads.
    """
    found = [
        check_label_signal(where, name, term.loss, signals, source, target) for name in term.signals
    ]
    for record in found:
        check_tails(where, term, record)
    return found


def check_tails(where: str, term: SoftTerm, record: LogitsRecord) -> None:
    """Refuse a signal that cannot serve a term at all of its temperatures.

    Raises:
        RecipeError: it cannot.
    """
    try:
        tails = [
            resolve_tail(record.codec, record.temperatures, temperature, term.tail)
            for temperature in term.temperatures
        ]
    except RecipeError as error:
        raise RecipeError(f"{where}: signal {record.name!r}: {error}") from None
    if term.temperature_schedule is not None and len(set(tails)) > 1:
        raise RecipeError(
            f"{where}: signal {record.name!r}: drawn entries serve some of the temperatures "
            f"{term.temperatures} only; set tail uniform or bucket for all of them"
        )
    if term.temperature_schedule is not None and "sampled" in tails:
        raise RecipeError(
            f"{where}: signal {record.name!r}: drawn entries do not serve the temperatures between "
            f"{term.temperatures}; set tail uniform or bucket"
        )
    full = record.codec.name == "full"
    if term.loss in _NEED_DENSITY and not full and not set(tails) <= {"uniform", "bucket"}:
        raise RecipeError(
            f"{where}: signal {record.name!r}: {term.loss} needs a density outside the entries, "
            f"which tail {tails[0]!r} has not; set tail uniform or bucket"
        )
