"""The mask task: what a classifier on the student's encoder says of masked tokens."""

# K masked positions, D student width, V the teacher's vocabulary

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.signals import LogitsRecord, SignalRecord
from kdcache.labels.coded_labels import CodedLabels
from kdcache.recipe import MaskedKLTerm
from kdcache.train.batches.batch import Batch
from kdcache.train.losses.layer_terms import linear
from kdcache.train.losses.linear_loss import linear_losses
from kdcache.train.losses.loss_plan import LossTerm
from kdcache.train.losses.soft_terms import check_tails, soft_target
from kdcache.train.students.masked_pass import MaskedPass


class MaskedLoss(nn.Module):
    """A linear classifier over the teacher's vocabulary against the teacher, at masked positions.

    It reads the encoder's last states, is learned with the student and is no part of it.

    Args:
        term: what the recipe says.
        record: of its signal.
        width: D.
        seed: recipe seed; the classifier starts as a function of it.

    Source: "Towards Full Utilization on Mask Task for Distilling PLMs into NMT", section 3.2.
    """

    def __init__(self, term: MaskedKLTerm, record: LogitsRecord, width: int, seed: int) -> None:
        super().__init__()
        self.term = term
        self.classifier = linear(width, record.vocab_size, seed, term.signal, 0, bias=True)

    def forward(
        self,
        outputs: MaskedPass,
        batch: Batch,
        row_weight: Tensor | None,
        count: int,
        temperature: float,
    ) -> Tensor:
        """The loss of a micro-batch, over the masked positions of the whole global batch.

        Args:
            outputs: the student's pass over what the teacher read.
            batch: what it is of.
            row_weight: [K] factors of the positions; None: 1.
            count: masked positions of the global batch.
            temperature: of both sides.
        """
        coded = batch.signals[self.term.signal]
        assert isinstance(coded, CodedLabels)
        target = soft_target(coded, self.term, temperature, self.classifier.out_features)
        states = outputs.masked_states
        share = torch.full((len(states),), 1 / max(1, count), device=states.device)
        term = LossTerm(
            target, temperature, 1.0, share if row_weight is None else share * row_weight
        )
        total, _ = linear_losses(states, self.classifier.weight, self.classifier.bias, [term])
        return total


def check_masked_signal(
    where: str, term: MaskedKLTerm, signals: Mapping[str, SignalRecord], source: str
) -> None:
    """Refuse a signal that has no labels at masked tokens of what the student's encoder reads.

    Raises:
        RecipeError: it has none, or cannot serve the term's temperatures, or is not there.
        IdentityError: it labels another stream.
    """
    record = signals.get(term.signal)
    if not isinstance(record, LogitsRecord) or record.at != "masked":
        name = term.signal if record is None else "masked_logits"
        found = "is not in the cache" if record is None else f"is of kind {record.kind}"
        if isinstance(record, LogitsRecord):
            found += f" at {record.at}"
        usable = [
            name
            for name, one in sorted(signals.items())
            if isinstance(one, LogitsRecord) and one.at == "masked"
        ]
        raise RecipeError(
            f"{where}.signal: {term.signal!r} {found}; {term.loss} needs a teacher's logits at "
            f"masked tokens, of which the cache has {usable}: dump with a masked model "
            f"masks: {{kind: masks, stream: {source}}} and "
            f"{name}: {{at: masked, stream: {source}, masks: masks}}"
        )
    if record.stream != source:
        raise IdentityError(
            f"{where}: signal {term.signal!r} labels stream {record.stream!r}, the student's "
            f"encoder reads {source!r}; set train.source to the signal's stream"
        )
    check_tails(where, term, record)
