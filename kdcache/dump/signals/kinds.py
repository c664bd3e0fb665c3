"""Which encoder makes which kind of signal, and in which order signals are made."""

from __future__ import annotations

from kdcache.dump.signals.attention import AttentionEncoder
from kdcache.dump.signals.beams import BeamsEncoder
from kdcache.dump.signals.classes import ClassesEncoder
from kdcache.dump.signals.encoder import SignalEncoder
from kdcache.dump.signals.hidden import HiddenEncoder
from kdcache.dump.signals.logits import LogitsEncoder
from kdcache.dump.signals.masks import MasksEncoder
from kdcache.recipe import DumpSection

#: Kind of a signal to what makes it; called with a cache and a request.
ENCODERS: dict[str, type[SignalEncoder]] = {
    "masks": MasksEncoder,
    "logits": LogitsEncoder,
    "hidden": HiddenEncoder,
    "attention": AttentionEncoder,
    "beams": BeamsEncoder,
    "classes": ClassesEncoder,
}

#: Kinds that others are made from come first.
_FIRST = ("masks", "beams")


def in_order(section: DumpSection) -> list[str]:
    """Names of a recipe's signals, those that others are made from first."""

    def rank(name: str) -> int:
        kind = section.signals[name].kind
        return _FIRST.index(kind) if kind in _FIRST else len(_FIRST)

    return sorted(section.signals, key=rank)
