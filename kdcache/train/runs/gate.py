"""The gradient gate: distillation counts where it does not work against the rest of the objective.

For each module of the student's encoder by itself, with g the gradient of the terms that are not
gated and g_KD that of those that are, weights included:

    gradient = g + g_KD where <g, g_KD> > 0, else g

Both are those of the whole global batch: of all its micro-batches and ranks, before clipping. A
loss scale of float16 is a positive factor of both, so the sign does not see it.

Source: "Towards Full Utilization on Mask Task for Distilling PLMs into NMT", section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcache.errors import RecipeError
from kdcache.recipe import TrainSection
from kdcache.train.losses.objective import Moment, Objective
from kdcache.train.runs.parallel import Ranks

Size = Literal["parameter", "sublayer", "layer"]


class Gate:
    """Gradients of two groups of terms, kept apart where they may be at odds.

    Args:
        section: the recipe's train section, with a gate.
        objective: its terms.
        module: what a step takes the gradients of, the student within it.
        student: whose encoder is gated.
        ranks: this process and those that train with it.

    Attributes:
        terms: numbers of the gated terms among the objective's.
        modules: parameters of each module.
        share: of the modules that distillation was left out of at the last step; those it gives
            no gradient to do not count.

    Raises:
        RecipeError: a gated term is not there, or none is left to hold it against, or the encoder
            has nothing to gate, or gradients lie spread over the ranks.
    """

    def __init__(
        self,
        section: TrainSection,
        objective: Objective,
        module: nn.Module,
        student: Any,
        ranks: Ranks,
    ) -> None:
        assert section.gate is not None
        if section.parallel == "fsdp" and ranks.world > 1:
            raise RecipeError(
                "train.gate: train.parallel is fsdp, whose gradients lie spread over the ranks; a "
                "gate needs them whole: set train.parallel ddp"
            )
        self.terms = _gated_terms(section, objective)
        self.modules = encoder_modules(student, section.gate.module)
        if not self.modules:
            raise RecipeError(
                "train.gate: the student's encoder has no weights of its own that are trained; "
                "set train.gate null"
            )
        self._gated = [one for parameters in self.modules for one in parameters]
        self._learned = [one for one in module.parameters() if one.requires_grad]
        self._distilled: list[Tensor | None] = [None] * len(self._gated)
        self._ranks, self._tests = ranks, False
        self.share = torch.zeros(())

    def groups(self, moments: Sequence[Moment]) -> list[list[Moment]]:
        """The terms that are not gated, and those that are.

        Where only one of both groups counts at a step, there is nothing to test.
        """
        gated = [one for one in moments if one.number in self.terms]
        rest = [one for one in moments if one.number not in self.terms]
        self._tests = bool(rest)
        return [rest, gated]

    def backward(self, rest: Tensor, gated: Tensor) -> None:
        """Add the gradients of a micro-batch.

        Args:
            rest: total of the terms that are not gated, on the graph of the other one.
            gated: total of those that are.
        """
        if gated.requires_grad:
            self._swap()
            gated.backward(retain_graph=rest.requires_grad)  # type: ignore[no-untyped-call]
            self._swap()
        if rest.requires_grad:
            rest.backward()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Leave in the parameters the mean over the ranks of what counts of both."""
        self._exchange()
        flags = []
        first = 0
        for parameters in self.modules:
            theirs = self._distilled[first : first + len(parameters)]
            pairs = [(p, one) for p, one in zip(parameters, theirs, strict=True) if one is not None]
            first += len(parameters)
            if not pairs:
                continue
            product = sum((_dot(p.grad, one) for p, one in pairs), torch.zeros(()))
            # What overflows stays: it must be seen, and the step left out or stopped.
            keep = (product > 0) | ~torch.isfinite(product) | (not self._tests)
            for parameter, one in pairs:
                kept = torch.where(keep, one, 0.0)
                if parameter.grad is None:
                    parameter.grad = kept
                else:
                    parameter.grad += kept
            flags.append(keep.float())
        self._distilled = [None] * len(self._gated)
        self.share = 1 - torch.stack(flags).mean() if flags else torch.zeros(())

    def _swap(self) -> None:
        """Let gradients of gated parameters go beside those of the other terms, or back."""
        for number, parameter in enumerate(self._gated):
            there = self._distilled[number]
            self._distilled[number], parameter.grad = parameter.grad, there

    def _exchange(self) -> None:
        """Take the mean over the ranks of all gradients; None where no rank has one."""
        if self._ranks.world == 1:
            return
        owners = [*self._learned, *self._gated]
        found = [*(one.grad for one in self._learned), *self._distilled]
        device = owners[0].device
        has = torch.tensor([float(one is not None) for one in found], device=device)
        used = (self._ranks.summed(has) > 0).tolist()
        chosen = [number for number, some in enumerate(used) if some]
        if not chosen:
            return
        parts = []
        for number in chosen:
            own = found[number]
            parts.append(torch.zeros_like(owners[number]) if own is None else own)
        flat = self._ranks.summed(torch.cat([one.flatten() for one in parts])) / self._ranks.world
        pieces = torch.split(flat, [one.numel() for one in parts])
        for number, piece in zip(chosen, pieces, strict=True):
            mean = piece.view_as(owners[number])
            if number < len(self._learned):
                owners[number].grad = mean
            else:
                self._distilled[number - len(self._learned)] = mean


def encoder_modules(student: Any, size: Size) -> list[list[nn.Parameter]]:
    """Parameters of the encoder's modules; what the rest of a student uses too is in none.

    Args:
        student: a transformers encoder-decoder.
        size: parameter: every tensor; layer: every layer; sublayer: of every layer the attention
            with its norm, and the rest. Outside of the layers every child that has tensors of its
            own is a module in the last two.
    """
    encoder = student.get_encoder()
    inside = {id(module) for module in encoder.modules()}
    shared = {
        id(parameter)
        for module in student.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    }
    shared |= _below(student.get_output_embeddings()) | _below(student.get_decoder())
    found: dict[str, list[nn.Parameter]] = {}
    layers = dict(_layers(encoder, ""))
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad or id(parameter) in shared:
            continue
        layer = next((path for path in layers if name.startswith(f"{path}.")), None)
        if size == "parameter":
            key = name
        elif layer is None:
            key = name.rpartition(".")[0]
        elif size == "layer":
            key = layer
        else:
            key = f"{layer}.{_sublayer(layers[layer], name[len(layer) + 1 :])}"
        found.setdefault(key, []).append(parameter)
    return list(found.values())


def _sublayer(layer: nn.Module, name: str) -> str:
    """Which block of a layer a parameter is in.

    Layers of some models (T5) are lists of blocks; in the others the attention and its norm are
    called after it, and what is left is the feed-forward block.
    """
    child, _, rest = name.partition(".")
    if isinstance(getattr(layer, child), nn.ModuleList):
        return f"{child}.{rest.partition('.')[0]}"
    return "attention" if "attn" in child or "attention" in child else "feed_forward"


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Name and element of the outermost module lists."""
    for name, child in module.named_children():
        here = f"{path}.{name}".removeprefix(".")
        if isinstance(child, nn.ModuleList):
            yield from ((f"{here}.{number}", one) for number, one in enumerate(child))
        else:
            yield from _layers(child, here)


def _below(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(one) for one in module.parameters()}


def _dot(left: Tensor | None, right: Tensor) -> Tensor:
    """Inner product of two gradients, in float64 where the device has it."""
    if left is None:
        return torch.zeros((), device=right.device)
    wide = torch.float32 if right.device.type == "mps" else torch.float64
    return torch.dot(left.flatten().to(wide), right.flatten().to(wide))


def _gated_terms(section: TrainSection, objective: Objective) -> frozenset[int]:
    """Numbers of the gated terms among those that are built."""
    assert section.gate is not None
    where, terms = "train.gate.terms", section.objective
    built = {path: number for number, path in enumerate(objective.paths)}
    found: set[int] = set()
    for given in section.gate.terms:
        if isinstance(given, int):
            named = [given] if 0 <= given < len(terms) else []
        else:
            named = [number for number, term in enumerate(terms) if term.loss == given]
        if not named:
            listed = ", ".join(f"{number} {term.loss}" for number, term in enumerate(terms))
            raise RecipeError(
                f"{where}: {given!r} is no term of train.objective, which has {listed}"
            )
        mine = {built[f"train.objective.{n}"] for n in named if f"train.objective.{n}" in built}
        if not mine:
            raise RecipeError(
                f"{where}: {given!r} names terms of weight 0, which are not built; give one a "
                "weight, or set train.gate null"
            )
        found |= mine
    if len(found) == len(objective.terms):
        raise RecipeError(
            f"{where}: names all terms that have a weight; leave out the one that the others are "
            "held against, such as cross_entropy"
        )
    return frozenset(found)
