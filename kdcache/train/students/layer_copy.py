"""Students that begin as some of the layers of a larger model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kdcache.errors import ModelError

#: Config keys that count a side's layers, the family's own first.
_DEPTH = {
    "encoder": ("encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_LAYER = re.compile(
    r"(?P<before>.*\b(?P<side>encoder|decoder)\.(?:layers?|block)\.)(?P<number>\d+)\."
)
#: T5 keeps the positions of all layers in its first.
_SHARED = "relative_attention_bias"


def with_layers(model: Any, encoder: Sequence[int] | None, decoder: Sequence[int] | None) -> Any:
    """A new model of some layers of another; all else is copied.

    Args:
        model: of transformers, an encoder-decoder or an encoder, whose layers lie in `layers`,
            `layer` or `block` of its encoder and decoder.
        encoder: its layers that are kept, from 1, in their order; None for all.
        decoder: the same of the decoder.

    Raises:
        ModelError: there is no such layer, or layers lie elsewhere.
    """
    weights = model.state_dict()
    kept: dict[str, list[int]] = {}
    changes: dict[str, int] = {}
    for side, chosen in (("encoder", encoder), ("decoder", decoder)):
        found = {int(m["number"]) for m in map(_LAYER.match, weights) if m and m["side"] == side}
        if side == "decoder" and chosen is None and not model.config.is_encoder_decoder:
            continue
        if not found:
            raise ModelError(
                f"train.student.layers: {type(model).__name__} keeps its {side}'s layers where "
                "kdcache does not look for them; train.student.path takes the whole model"
            )
        kept[side] = list(range(len(found)) if chosen is None else (n - 1 for n in chosen))
        wrong = [number + 1 for number in kept[side] if number not in found]
        if wrong:
            raise ModelError(
                f"train.student.layers.{side}: the model has no layer {wrong[0]}; its {side} has "
                f"{len(found)}"
            )
        key = next(name for name in _DEPTH[side] if hasattr(model.config, name))
        changes[key] = len(kept[side])
    config = type(model.config).from_dict(model.config.to_dict() | changes)
    # Heads over all layers, or over several, leave out the layer over the first token.
    bare = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    student = type(model)(config, **bare)
    if hasattr(model, "generation_config"):
        student.generation_config = model.generation_config
    student.load_state_dict(_renumbered(weights, kept))
    return student


def _renumbered(weights: Mapping[str, Tensor], kept: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The weights of the layers that are kept, under their new numbers."""
    found = {}
    for name, tensor in weights.items():
        place = _LAYER.match(name)
        if place is None:
            found[name] = tensor
            continue
        number, rest = int(place["number"]), name[place.end() :]
        news = [new for new, old in enumerate(kept[place["side"]]) if old == number]
        if _SHARED in rest:
            news = [0]
        found |= {f"{place['before']}{new}.{rest}": tensor for new in news}
    return found
