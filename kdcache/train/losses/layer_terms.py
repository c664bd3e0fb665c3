"""Terms over what a student computes on its way: hidden states, attentions, class scores.

Each has a part of the student, its layers of it, and learned linear layers where widths differ.
"""

# B samples, S positions, R rows (tokens, pairs of them, or samples), D student width,
# W teacher width, C classes

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.keyed import text_key
from kdcache.formats.signals import AttentionRecord, ClassesRecord, HiddenRecord, SignalRecord
from kdcache.recipe import (
    AttentionMSETerm,
    HiddenCosineTerm,
    HiddenTerm,
    LayersTerm,
    ScoreKLTerm,
    ScoreMSETerm,
)
from kdcache.train.batches.batch import Batch, DenseRows, Scores
from kdcache.train.losses.feature_losses import attention_mse, hidden_cosine, hidden_mse, score_mse
from kdcache.train.students.masked_pass import MaskedPass
from kdcache.train.students.student_outputs import Layers, StudentOutputs, attention_rows


class LayersLoss(nn.Module):
    """Hidden states or attentions of some layers against the teacher's, each pair as much.

    Several layers of the teacher are fused: F = W [l_1; l_2; ...] + b, learned with the student; or
    the student's, W s + b, meets all of them side by side. One alone is taken as it is, and where
    it is wider or narrower the student's is projected.
    Where the teacher's states are pooled, the student's are pooled alike.

    Args:
        where: the term's path in the recipe.
        term: what the recipe says.
        record: of its signal.
        streams: side to the stream it reads.
        config: the student's.
        seed: recipe seed; new linear layers are a function of it.

    Attributes:
        wanted: what it needs of the student.
        layers: the teacher's numbers of the layers it reads.

    Raises:
        RecipeError: the signal cannot serve the term, or there is no such layer.
        IdentityError: it describes another stream than the student reads on that side.

    Source: fusion: Wu et al. 2020, Why Skip If You Can Combine (CKD), section 3; of the student's
    states: the code that they released.
    """

    def __init__(
        self,
        where: str,
        term: LayersTerm,
        record: HiddenRecord | AttentionRecord,
        streams: Mapping[str, str],
        config: Any,
        seed: int,
    ) -> None:
        super().__init__()
        self.term, self.record, self._stream = term, record, streams[record.side]
        kind = "hidden" if isinstance(record, HiddenRecord) else "attention"
        self.wanted: Layers = (record.side, kind)  # type: ignore[assignment]
        if record.stream != self._stream:
            raise IdentityError(
                f"{where}: signal {record.name!r} describes stream {record.stream!r}, the "
                f"student's {record.side} reads {self._stream!r}; set train.source and "
                "train.target to the signal's streams"
            )
        depth = int(getattr(config, f"{record.side}_layers", None) or config.num_hidden_layers)
        pairs = _pairs(where, term, list(record.layers), depth, kind)
        self._pairs = pairs
        self.layers = sorted({layer for _, layers in pairs for layer in layers})
        width = int(getattr(config, "d_model", None) or config.hidden_size)
        self.projections, self.fusions = nn.ModuleDict(), nn.ModuleDict()
        for number, (student, layers) in enumerate(pairs):
            key = (term.signal, student, *layers[1:])
            if isinstance(record, AttentionRecord):
                if len(layers) > 1:
                    raise RecipeError(
                        f"{where}.layers.{number}: fuses the attentions of {layers}; give one layer"
                    )
            elif len(layers) > 1:
                both = len(layers) * record.width
                if isinstance(term, HiddenTerm) and term.fuse == "student":
                    self.projections[str(number)] = linear(width, both, seed, *key, bias=True)
                else:
                    self.fusions[str(number)] = linear(both, width, seed, *key, bias=True)
            elif record.width != width:
                self.projections[str(number)] = linear(width, record.width, seed, *key)
        if isinstance(record, AttentionRecord) and not record.averaged:
            _check_heads(where, record, config)

    def forward(
        self,
        outputs: StudentOutputs | MaskedPass,
        batch: Batch,
        row_weight: Tensor | None,
        count: int,
    ) -> Tensor:
        """The loss of a micro-batch, over the rows of the whole global batch.

        Args:
            outputs: of the student, over masked inputs where the signal is of such.
            batch: what it read.
            row_weight: [R] factors of the rows; None: 1.
            count: rows of the global batch.
        """
        rows = batch.signals[self.term.signal]
        assert isinstance(rows, DenseRows)
        teacher = rows.decode()
        read = batch.streams[self._stream]
        mask = outputs.mask if isinstance(outputs, MaskedPass) else read.mask
        layers = outputs.layers[self.wanted]
        share = 1 / (max(1, count) * (len(self._pairs) if self.term.over_layers == "mean" else 1))
        weight = teacher.new_full((len(teacher),), share)
        weight = weight if row_weight is None else weight * row_weight
        total = teacher.new_zeros(())
        for number, (mine, theirs) in enumerate(self._pairs):
            chosen = teacher[:, [rows.layers.index(layer) for layer in theirs]].flatten(1)
            if isinstance(self.record, AttentionRecord):
                own = attention_rows(layers[mine - 1], mask, self.record.averaged)
                total = total + attention_mse(own, chosen, weight)
                continue
            own = self._rows(layers[mine], mask)
            if str(number) in self.projections:
                own = self.projections[str(number)](own)
            fused = str(number) in self.fusions
            if fused:
                chosen = self.fusions[str(number)](chosen.to(own.dtype))
            loss = hidden_cosine if isinstance(self.term, HiddenCosineTerm) else hidden_mse
            total = total + loss(own, chosen, weight, fused=fused)
        return total

    def _rows(self, states: Tensor, mask: Tensor) -> Tensor:
        """[R, D] states of tokens, or of samples as the signal is pooled, of [B, S, D]."""
        assert isinstance(self.record, HiddenRecord)
        if self.record.pool == "cls":
            return states[:, 0]
        if self.record.pool == "mean":
            on = mask[:, :, None].to(states.dtype)
            return (states * on).sum(1) / on.sum(1).clamp(min=1)
        return states[mask]


class ScoresLoss(nn.Module):
    """Class scores, which a linear layer makes of the encoder's last states, against the teacher's.

    Args:
        term: what the recipe says.
        record: of its signal.
        source: stream that the student's encoder reads.
        width: D.
        seed: recipe seed.
    """

    def __init__(
        self, term: ScoreMSETerm, record: ClassesRecord, source: str, width: int, seed: int
    ) -> None:
        super().__init__()
        self.term, self._source = term, source
        self.head = linear(width, len(record.labels), seed, term.signal, 0, bias=True)

    def forward(
        self, outputs: StudentOutputs, batch: Batch, row_weight: Tensor | None, count: int
    ) -> Tensor:
        """The loss of a micro-batch, over the samples of the whole global batch that have scores.

        Args:
            outputs: of the student.
            batch: what it read.
            row_weight: [samples with scores] factors; None: 1.
            count: scores of the global batch.
        """
        scores = batch.signals[self.term.signal]
        assert isinstance(scores, Scores)
        mask = batch.streams[self._source].mask[:, :, None].to(outputs.encoded.dtype)
        means = (outputs.encoded * mask).sum(1) / mask.sum(1).clamp(min=1)  # [B, D]
        own = self.head(means[scores.counts > 0])
        teacher = scores.values.view(-1, len(scores.labels))
        each = len(scores.labels) ** (2 if self.term.over_classes == "sum" else 1)
        weight = teacher.new_full((len(teacher),), each / max(1, count))
        return score_mse(own, teacher, weight if row_weight is None else weight * row_weight)


def check_layers_signal(where: str, term: LayersTerm, record: SignalRecord | None) -> None:
    """Refuse a signal that is not of the term's kind.

    Raises:
        RecipeError: it is not.
    """
    kind = AttentionRecord if isinstance(term, AttentionMSETerm) else HiddenRecord
    name = "attention" if kind is AttentionRecord else "hidden"
    if not isinstance(record, kind):
        raise RecipeError(f"{where}.signal: {_unfit(term.signal, record, name)}")


def check_scores_signal(
    where: str,
    term: ScoreMSETerm | ScoreKLTerm,
    record: SignalRecord | None,
    source: str,
    name: str | None = None,
) -> None:
    """Refuse a signal that is none of class scores of what the student's encoder reads.

    Args:
        where: the term's path in the recipe.
        term: over it.
        record: of the signal; None: it is not there.
        source: stream that the student's encoder reads.
        name: of the signal; None: the term's own.

    Raises:
        RecipeError: it is of another kind, or of masked inputs.
        IdentityError: it describes another stream.
    """
    name = term.signal if name is None else name
    if not isinstance(record, ClassesRecord):
        raise RecipeError(f"{where}.signal: {_unfit(name, record, 'classes')}")
    if record.masks:
        raise RecipeError(
            f"{where}.signal: {name!r} is of masked inputs; {term.loss} needs plain ones: dump "
            "masked copies as samples in its place (corpus.augment)"
        )
    if record.stream != source:
        raise IdentityError(
            f"{where}: signal {name!r} describes stream {record.stream!r}, the student's "
            f"encoder reads {source!r}; set train.source to the signal's stream"
        )


def _unfit(name: str, record: SignalRecord | None, kind: str) -> str:
    """What is wrong with a signal that is not of a kind, and what to dump."""
    if record is not None:
        return f"{name!r} is {record.kind}; expected kind {kind}"
    return f"cache has no signal {name!r}; dump one of kind {kind} (dump.signals.{name})"


def _pairs(
    where: str, term: LayersTerm, have: list[int], depth: int, kind: str
) -> list[tuple[int, list[int]]]:
    """Layers of student and teacher that belong together."""
    first = 0 if kind == "hidden" else 1
    if term.layers is None:
        pairs = _spread([n for n in have if n >= 1], depth)
        return [(0, [0]), *pairs] if first == 0 and 0 in have else pairs
    if not term.layers:
        raise RecipeError(f"{where}.layers: is empty; give a pair of layers, or null")
    for pair in term.layers:
        if not first <= pair.student <= depth:
            raise RecipeError(
                f"{where}.layers: student layer {pair.student}; the student has {first} to {depth}"
            )
        missing = [layer for layer in pair.teacher if layer not in have]
        if missing:
            raise RecipeError(
                f"{where}.layers: teacher layer {missing[0]}; signal {term.signal!r} has {have}; "
                f"dump it with that layer (dump.signals.{term.signal}.layers)"
            )
    return [(pair.student, pair.teacher) for pair in term.layers]


def _spread(have: list[int], depth: int) -> list[tuple[int, list[int]]]:
    """The fewer layers evenly over the more, last beside last.

    Source: the uniform strategy of Jiao et al. 2020, TinyBERT, section 3.1.
    """
    if len(have) >= depth:
        return [(n, [have[math.ceil(n * len(have) / depth) - 1]]) for n in range(1, depth + 1)]
    ends = [math.ceil(n * depth / len(have)) for n in range(1, len(have) + 1)]
    return [(end, [layer]) for end, layer in zip(ends, have, strict=True)]


def _check_heads(where: str, record: AttentionRecord, config: Any) -> None:
    heads = getattr(config, f"{record.side}_attention_heads", None) or config.num_attention_heads
    if heads != record.heads:
        raise RecipeError(
            f"{where}: the teacher has {record.heads} heads, the student {heads}; give the student "
            "as many, or dump the signal with heads mean"
        )


def linear(width: int, out: int, seed: int, *key: object, bias: bool = False) -> nn.Linear:
    """A linear layer with Glorot-uniform weights that are a function of the seed.

    Args:
        width: features that it reads.
        out: features that it makes.
        seed: recipe seed.
        key: what tells it from others of that seed.
        bias: whether it has one; zeros.
    """
    layer = nn.Linear(width, out, bias=bias)
    generator = torch.Generator().manual_seed(text_key(seed, "projection", *key) >> 1)
    with torch.no_grad():
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        if bias:
            layer.bias.zero_()
    return layer
