"""Terms over the vocabulary: from a batch's codes to what the losses take."""

# N target positions, B samples, V vocabulary

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.codec import WIDE_RANGE_NATS
from kdcache.formats.codes import code_log_probs
from kdcache.formats.signals import LogitsRecord, SignalRecord
from kdcache.labels import CodedLabels, SparseTarget, decode, entropy_nats, resolve_tail
from kdcache.recipe import SampleWeight, SoftTerm
from kdcache.train.losses.divergences import (
    RowLosses,
    jensen_shannon_rows,
    logit_mse_rows,
    reverse_kl_rows,
    total_variation_rows,
)
from kdcache.train.losses.narrowing import narrowed

#: Losses that are no sum over entries, by name.
DIVERGENCES: Mapping[str, RowLosses] = {
    "reverse_kl": reverse_kl_rows,
    "jensen_shannon": jensen_shannon_rows,
    "total_variation": total_variation_rows,
    "logit_mse": logit_mse_rows,
}
#: Those of them that are not defined for drawn entries.
_NEED_DENSITY = ("reverse_kl", "logit_mse")


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


def check_soft_signal(
    where: str,
    term: SoftTerm,
    signals: Mapping[str, SignalRecord],
    source: str,
    target: str,
) -> LogitsRecord:
    """The signal of a term, if it can serve it at all of its temperatures.

    Raises:
        RecipeError: it cannot, or it is not there.
        IdentityError: it labels other streams than the student reads.
    """
    record = check_reference_signal(where, term.signal, term.loss, signals, source, target)
    check_tails(where, term, record)
    return record


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
        raise RecipeError(f"{where}: signal {term.signal!r}: {error}") from None
    if term.temperature_schedule is not None and len(set(tails)) > 1:
        raise RecipeError(
            f"{where}: signal {term.signal!r}: drawn entries serve some of the temperatures "
            f"{term.temperatures} only; set tail uniform or bucket for all of them"
        )
    if term.temperature_schedule is not None and "sampled" in tails:
        raise RecipeError(
            f"{where}: signal {term.signal!r}: drawn entries do not serve the temperatures between "
            f"{term.temperatures}; set tail uniform or bucket"
        )
    full = record.codec.name == "full"
    if term.loss in _NEED_DENSITY and not full and not set(tails) <= {"uniform", "bucket"}:
        raise RecipeError(
            f"{where}: signal {term.signal!r}: {term.loss} needs a density outside the entries, "
            f"which tail {tails[0]!r} has not; set tail uniform or bucket"
        )


def check_reference_signal(
    where: str,
    name: str,
    what: str,
    signals: Mapping[str, SignalRecord],
    source: str,
    target: str,
) -> LogitsRecord:
    """A signal of soft labels at the tokens that the student predicts.

    Args:
        where: path in the recipe.
        name: of the signal.
        what: needs it.
        signals: of the cache.
        source: stream the student's encoder reads.
        target: stream it predicts.

    Raises:
        RecipeError: it is none, or not there.
        IdentityError: it labels other streams.
    """
    record = signals.get(name)
    if record is None:
        raise RecipeError(
            f"{where}.signal: cache has no signal {name!r}; it has {sorted(signals)}; dump "
            "it, or wait until the dump that is on its way comes to it"
        )
    if not isinstance(record, LogitsRecord) or not _of_references(record):
        usable = sorted(other for other, found in signals.items() if _of_references(found))
        raise RecipeError(
            f"{where}.signal: {name!r} is {_described(record)}; {what} needs logits "
            f"at the reference's targets, of which the cache has {usable}"
        )
    for role, found, expected in (
        ("labels stream", record.stream, target),
        ("was made from source stream", record.source, source),
    ):
        if found != expected:
            raise IdentityError(
                f"{where}: signal {name!r} {role} {found!r}, the student uses {expected!r}; "
                "set train.source and train.target to the signal's streams"
            )
    return record


def _of_references(record: SignalRecord) -> bool:
    """Whether a signal labels the tokens that a student is to predict."""
    labels = isinstance(record, LogitsRecord) and record.at == "targets"
    return labels and record.hypotheses is None


def _described(record: SignalRecord) -> str:
    """A signal in a word or three."""
    if not isinstance(record, LogitsRecord):
        return f"of kind {record.kind}"
    if record.hypotheses is not None:
        return f"logits of hypotheses ({record.hypotheses})"
    return f"logits at {record.at}"
