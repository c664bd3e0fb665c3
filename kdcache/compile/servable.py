"""Servable codecs: what a stored codec can be made into without its teacher, and why not else."""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.errors import RecipeError
from kdcache.formats.codec import Codec, NucleusCodec, SampledCodec, ThresholdCodec, TopKCodec
from kdcache.formats.signals import LogitsRecord

#: Kinds of values from the narrowest on.
_VALUES = ("uint8", "float16", "float32")


def check_servable(record: LogitsRecord, codec: Codec, temperatures: Sequence[float]) -> None:
    """Check that a signal's labels can be re-encoded.

    Args:
        record: of the signal.
        codec: that is asked for.
        temperatures: where to store the tail.

    Raises:
        RecipeError: they cannot; says what is there, what was asked for, what can be had.
    """
    fault = _codec_fault(record.codec, codec) or _values_fault(record.codec, codec)
    fault = fault or _temperatures_fault(record, codec, temperatures)
    if fault:
        raise RecipeError(
            f"signals.{record.name}: {_words(record.codec)} cannot become {_words(codec)} without "
            f"the teacher: {fault}"
        )


def _codec_fault(old: Codec, new: Codec) -> str:
    """Why one codec's choice of entries does not follow from another's; empty if it does."""
    if old.name == "full":
        return ""
    if isinstance(old, ThresholdCodec):
        if isinstance(new, ThresholdCodec) and new.c >= old.c:
            known = set(new.temperatures) <= set(old.temperatures)
            return "" if known else f"it draws for temperatures {_listed(old.temperatures)} only"
        return f"ask for threshold with c of {old.c:g} or more"
    if isinstance(old, TopKCodec):
        fewer = isinstance(new, TopKCodec) and new.k <= old.k
        fewer |= isinstance(new, NucleusCodec) and new.k_max <= old.k
        return "" if fewer else f"ask for topk with k, or nucleus with k_max, of {old.k} or less"
    if isinstance(old, NucleusCodec):
        fewer = isinstance(new, NucleusCodec) and new.p <= old.p and new.k_max <= old.k_max
        wanted = f"p of {old.p:g} or less and k_max of {old.k_max} or less"
        return "" if fewer else f"ask for nucleus with {wanted}"
    assert isinstance(old, SampledCodec), "the last of the codecs"
    fewer = isinstance(new, SampledCodec) and new.n <= old.n
    return "" if fewer else f"ask for sampled with n of {old.n} or less"


def _values_fault(old: Codec, new: Codec) -> str:
    """Why values do not follow from others; empty if they do."""
    stores_none = isinstance(new, SampledCodec)
    if old.name == "full" or stores_none or _VALUES.index(new.values) <= _VALUES.index(old.values):
        return ""
    return f"its values are {old.values}, which {new.values} would not make finer; ask for those"


def _temperatures_fault(record: LogitsRecord, codec: Codec, temperatures: Sequence[float]) -> str:
    """Why tails cannot be stored at some temperatures; empty if they can."""
    asked = _listed(temperatures)
    if list(temperatures) != sorted(set(temperatures)) or any(t <= 0 for t in temperatures):
        return f"temperatures {asked} must be above 0 and ascend, each once"
    if record.codec.name != "full" and not set(temperatures) <= set(record.temperatures):
        return f"the tail is stored at {_listed(record.temperatures)}, {asked} was asked for"
    if codec.has_drawn_log_probs and not set(codec.drawn_temperatures) <= set(temperatures):
        drawn = _listed(codec.drawn_temperatures)
        return f"to draw for {drawn} the tail is needed there, {asked} was asked for"
    return ""


def _words(codec: Codec) -> str:
    """A codec and what is set of it: threshold(c 0.125, values uint8)."""
    fields = codec.model_dump(exclude={"name"})
    if fields.get("temperatures") == (1.0,):
        del fields["temperatures"]
    values = fields.pop("values")
    if not isinstance(codec, SampledCodec):
        fields["values"] = values
    told = [f"{name} {_said(value)}" for name, value in fields.items()]
    return f"{codec.name}({', '.join(told)})"


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return _listed(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(numbers: Sequence[float]) -> str:
    return "/".join(f"{t:g}" for t in numbers) or "none"
