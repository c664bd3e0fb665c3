"""DistillKit's compression of top-k log-probs: how its bytes are read, and a plain way to write.

A position has its ids, bit-packed in the order of their log-probs, and bytes of log-probs: the
first `exact_k` as they are, then the coefficients of a curve through the others, then bins of what
the curve leaves over. The rules are those of arcee-ai/DistillKit, folder `compression`.
"""

# N positions, k entries of each, B bytes of a position

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcache.errors import RecipeError

FloatName = Literal["float16", "bfloat16", "float32", "float64"]

#: The file that a capture leaves beside its Parquet.
CONFIG_FILE = "compression_config.yaml"


class Bin(BaseModel):
    """Some of what the curve leaves over: a scale, and whole numbers of a few bits."""

    scale_dtype: FloatName
    element_bits: int = Field(ge=1, le=32)
    num_elements: int = Field(ge=1)


class CompressionConfig(BaseModel):
    """How a file's positions are packed, under the names of its `compression_config.yaml`."""

    model_config = ConfigDict(extra="ignore")

    d: int = Field(ge=2)
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    exact_dtype: FloatName = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: FloatName = "float32"
    residual_bins: list[Bin] = Field(default_factory=list)
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of one id."""
        return (self.d - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's ids."""
        return -(-self.k * self.id_bits // 8)

    @property
    def value_bytes(self) -> int:
        """Bytes of a position's log-probs."""
        terms = len(self.polynomial_terms or []) * _width(self.term_dtype)
        bins = (
            _width(one.scale_dtype) + -(-one.element_bits * one.num_elements // 8)
            for one in self.residual_bins
        )
        return self.exact_k * _width(self.exact_dtype) + terms + sum(bins)


def read_config(path: str | Path) -> CompressionConfig:
    """Read a `compression_config.yaml`, or what a training config says under the same names.

    Raises:
        RecipeError: there is none, or it says something else.
    """
    from kdcache.recipe.tree import read_yaml

    try:
        tree: Any = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {str(error).split(chr(10))[0]}") from None
    if isinstance(tree, Mapping) and isinstance(tree.get("teacher"), Mapping):
        tree = tree["teacher"]
    if isinstance(tree, Mapping) and "logprob_compressor" in tree:
        tree = tree["logprob_compressor"]
    try:
        return CompressionConfig.model_validate(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        at = ".".join(map(str, fault["loc"])) or "it"
        raise RecipeError(
            f"{path}: {at}: {fault['msg']}; expected DistillKit's d, k, exact_k and their like"
        ) from None


def unpack_ids(packed: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """[N, k] int64 from [N, B] uint8: whole numbers of `id_bits` each, highest bit first."""
    return _unpack(packed, config.id_bits, config.k)


def unpack_log_probs(packed: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """[N, k] float64 nats, descending but for the curve's errors, from [N, B] uint8."""
    reader = _Bytes(packed)
    exact = reader.floats(config.exact_k, config.exact_dtype)
    rest = config.k - config.exact_k
    curve = np.zeros((len(packed), rest))
    if config.polynomial_terms:
        coefficients = reader.floats(len(config.polynomial_terms), config.term_dtype)
        curve = coefficients @ _terms(config, rest).T  # [N, terms] x [terms, rest]
    at = 0
    for one in config.residual_bins:
        scale = reader.floats(1, one.scale_dtype)
        packed_bin = reader.take(-(-one.element_bits * one.num_elements // 8))
        steps = _unpack(packed_bin, one.element_bits, one.num_elements).astype(np.float64)
        signed = 2 * steps - 1 if one.element_bits == 1 else steps - 2 ** (one.element_bits - 1)
        curve[:, at : at + one.num_elements] += signed * scale
        at += one.num_elements
    values = np.concatenate([exact, curve], axis=1)
    return np.cumsum(values, axis=1) if config.delta_encoding else values


def pack_ids(ids: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """[N, B] uint8 of [N, k] ids."""
    shifts = np.arange(config.id_bits - 1, -1, -1)
    bits = (ids[:, :, None] >> shifts) & 1  # [N, k, bits]
    return np.packbits(bits.reshape(len(ids), -1).astype(np.uint8), axis=1)


def exact_config(vocab_size: int, k: int) -> CompressionConfig:
    """Every log-prob as it is, in float32: what an export writes."""
    return CompressionConfig(d=vocab_size, k=k, exact_k=k, delta_encoding=False)


def _terms(config: CompressionConfig, rest: int) -> np.ndarray:
    """[rest, terms] float64 of the curve, rounded as the coefficients' type rounds them."""
    points = np.linspace(0, 1, rest) if config.normalize_t else np.arange(rest, dtype=np.float64)
    kinds = {"sqrt": np.sqrt, "exp": np.exp}
    columns = [
        kinds[term](points) if isinstance(term, str) else points ** float(term)
        for term in config.polynomial_terms or []
    ]
    return _rounded(np.stack(columns, axis=1), config.term_dtype)


def _rounded(values: np.ndarray, name: FloatName) -> np.ndarray:
    """Float64 values as another type has them."""
    if name == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        return values.astype(name).astype(np.float64)


def _width(name: FloatName) -> int:
    return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[name]


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """[N, count] int64 from [N, B] uint8, highest bit first."""
    flat = np.unpackbits(packed, axis=1, count=bits * count).reshape(len(packed), count, bits)
    return flat.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


class _Bytes:
    """[N, B] uint8, taken from the left."""

    def __init__(self, packed: np.ndarray) -> None:
        self._packed, self._at = packed, 0

    def take(self, count: int) -> np.ndarray:
        """[N, count] uint8."""
        self._at += count
        return self._packed[:, self._at - count : self._at]

    def floats(self, count: int, name: FloatName) -> np.ndarray:
        """[N, count] float64, little-endian."""
        data = np.ascontiguousarray(self.take(count * _width(name)))
        if name == "bfloat16":
            return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return data.view(np.dtype(name).newbyteorder("<")).astype(np.float64)
