"""Values of options, parsed for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from kdcache.errors import KDCacheError


def count(text: str) -> int:
    """A number from 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is given, expected a number from 0")
    return int(text)


def positive(text: str) -> int:
    """A number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is given, expected a number from 1")
    return int(text)


def number(text: str) -> float:
    """A number or a fraction such as 1/20."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number or fraction") from None


def told(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser whose error argparse prints as it is.

    Args:
        parse: says by a KDCacheError what is wrong.
    """

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except KDCacheError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def condition(text: str) -> object:
    """A filter, for argparse behind `told`."""
    from kdcache.compile.options import parse_condition

    return parse_condition(text)
