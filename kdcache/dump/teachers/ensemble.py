"""Several teachers that speak as one: the mean of what they say."""

# B batch, T positions, R rows of a piece, V vocabulary, C classes

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdcache.dump.batches import Batch
from kdcache.dump.teacher import Teacher
from kdcache.dump.teachers.identity import ensemble_record
from kdcache.errors import ModelError


class Ensemble(Teacher):
    """The mean of probabilities; of scores that are no probabilities, their mean.

    Probabilities are averaged at temperature 1. What comes out are their logarithms, in float32.
    """

    kind = "ensemble"

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        """Take over loaded teachers of one kind.

        Raises:
            ModelError: they do not fit together.
        """
        first = teachers[0]
        for other in teachers[1:]:
            _check_fit(first, other)
        self.teachers = list(teachers)
        self.kind = first.kind
        self.places = first.places
        self.signals = tuple(
            signal for signal in first.signals if signal in ("logits", "beams", "classes")
        )
        dtypes = sorted({teacher.record.dtype for teacher in teachers})
        records = [teacher.record for teacher in teachers]
        self.record = ensemble_record(records, "probabilities", " + ".join(dtypes))
        self.device = first.device
        self.vocab_size = first.vocab_size
        self.input_size = _smallest([teacher.input_size for teacher in teachers])
        self.max_positions = _smallest([teacher.max_positions for teacher in teachers])
        self.pad_id = first.pad_id
        self.labels, self.problem = first.labels, first.problem
        self.members = [member for teacher in teachers for member in teacher.members]
        if not self.signals:
            raise ModelError(
                f"{self.record.path}: an ensemble averages probabilities or scores, and a teacher "
                f"of kind {self.kind} has neither; use one of them, or average: parameters"
            )

    def for_task(self, task: str | None) -> Teacher:
        """All members as they speak for one task, see `Teacher.for_task`."""
        return Ensemble([teacher.for_task(task) for teacher in self.teachers])

    @torch.inference_mode()
    def logits_in_pieces(self, batch: Batch, at: Tensor, piece_entries: int) -> Iterator[Tensor]:
        """[R, V] float32 log-probs of the mean, see `Teacher.logits_in_pieces`."""
        pieces = [teacher.logits_in_pieces(batch, at, piece_entries) for teacher in self.teachers]
        for several in zip(*pieces, strict=True):
            yield _log_mean(torch.log_softmax(piece.float(), dim=-1) for piece in several)

    @torch.inference_mode()
    def scores(self, batch: Batch) -> Tensor:
        """[B, C] float32 log-probs of the mean, or means, see `Teacher.scores`."""
        several = [teacher.scores(batch).float() for teacher in self.teachers]
        if self.problem == "classification":
            return _log_mean(torch.log_softmax(scores, dim=-1) for scores in several)
        if self.problem == "regression":
            return torch.stack(several).mean(dim=0)
        # The logit of the mean probability, from both its sides so that neither rounds to 0.
        yes = _log_mean(torch.nn.functional.logsigmoid(scores) for scores in several)
        no = _log_mean(torch.nn.functional.logsigmoid(-scores) for scores in several)
        return yes - no


def _smallest(limits: Sequence[int | None]) -> int | None:
    """The limit that holds for all members, if there is one."""
    return min((limit for limit in limits if limit is not None), default=None)


def _log_mean(log_probs: Iterator[Tensor]) -> Tensor:
    """Logarithm of the mean of probabilities that are given as logarithms."""
    total, count = next(log_probs), 1
    for more in log_probs:
        total, count = torch.logaddexp(total, more), count + 1
    return total - math.log(count)


def _check_fit(first: Teacher, other: Teacher) -> None:
    """Members must be able to say the same things."""
    for what in ("kind", "vocab_size", "labels", "problem", "pad_id"):
        one, two = getattr(first, what), getattr(other, what)
        if one != two:
            raise ModelError(
                f"an ensemble's members must have the same {what}: {first.record.path} has "
                f"{one!r}, {other.record.path} has {two!r}"
            )
