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
    "decoder": ("decoder_layers", "num_decoder_layers", "num_hidden_layers"),
}
#: A model of one side may keep its layers in `transformer` (DistilBERT, GPT-2) or `model` (Llama).
_LAYER = re.compile(
    r"(?P<before>.*\b(?P<side>encoder|decoder|transformer|model)\.(?:layers?|block|h)\.)"
    r"(?P<number>\d+)\."
)
#: T5 keeps the positions of all layers in its first.
_SHARED = "relative_attention_bias"


def with_layers(model: Any, encoder: Sequence[int] | None, decoder: Sequence[int] | None) -> Any:
    """A new model of some layers of another; all else is copied.

    Args:
        model: of transformers, whose layers lie in `layers`, `layer`, `block` or `h` of its
            encoder, decoder, transformer or model.
        encoder: its layers that are kept, from 1, in their order; None for all.
        decoder: the same of the decoder, which a causal LM is.

    Raises:
        ModelError: there is no such layer, or layers lie elsewhere.
    """
    weights = model.state_dict()
    kept: dict[str, list[int]] = {}
    changes: dict[str, Any] = {}
    for side, chosen in (("encoder", encoder), ("decoder", decoder)):
        names = {side} if model.config.is_encoder_decoder else {side, *_alone(model.config, side)}
        found = {int(m["number"]) for m in map(_LAYER.match, weights) if m and m["side"] in names}
        if chosen is None and not model.config.is_encoder_decoder:
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
        kept |= dict.fromkeys(names, kept[side])
        key = next(name for name in _DEPTH[side] if hasattr(model.config, name))
        changes[model.config.attribute_map.get(key, key)] = len(kept[side])
        if types := getattr(model.config, "layer_types", None):
            changes["layer_types"] = [types[number] for number in kept[side]]
    config = type(model.config).from_dict(model.config.to_dict() | changes)
    # Heads over all layers, or over several, leave out the layer over the first token.
    bare = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    student = type(model)(config, **bare)
    if hasattr(model, "generation_config"):
        student.generation_config = model.generation_config
    try:
        student.load_state_dict(_renumbered(weights, kept))
    except RuntimeError:
        raise ModelError(
            f"train.student.layers: the layers of {type(model).__name__} differ in their parts, "
            "and these do not fit into each other's places; keep the first layer first"
        ) from None
    return student


def _alone(config: Any, side: str) -> set[str]:
    """Where a model of one side keeps its layers, if it is this side."""
    from transformers.models.auto import modeling_auto

    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    own = "encoder" if masked and not getattr(config, "is_decoder", False) else "decoder"
    return {"transformer", "model"} if side == own else set()


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
