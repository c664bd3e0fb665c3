"""How long a text a transformers model takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: Keys of a config that name position limits, one name per family.
POSITION_KEYS = (
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_source_positions",
    "max_target_positions",
)
#: Model types whose first token stands at position pad_token_id + 1 of a table that is
#: max_position_embeddings long (RoBERTa's inheritance from fairseq).
OFFSET_TYPES = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


def max_positions(config: Any) -> int | None:
    """Longest input that a transformers config allows; None where positions are relative."""
    limits = [limit for part in _parts(config) for limit in _limits(part)]
    return min(limits, default=None)


def _parts(config: Any) -> list[Any]:
    """The config and the text configs inside it."""
    inner = [getattr(config, name, None) for name in ("text_config", "encoder", "decoder")]
    return [config, *(part for part in inner if part is not None)]


def _limits(config: Any) -> Iterator[int]:
    """Limits of one config."""
    model_type = getattr(config, "model_type", None)
    absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"
    pad = getattr(config, "pad_token_id", None)
    for key in POSITION_KEYS:
        limit = getattr(config, key, None)
        if not isinstance(limit, int) or limit <= 0:
            continue
        if model_type in OFFSET_TYPES or (model_type == "esm" and absolute):
            limit -= 1 + (1 if model_type == "mpnet" or pad is None else int(pad))
        yield limit
