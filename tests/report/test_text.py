"""Numbers, listings and tables for terminals."""

from __future__ import annotations

import pytest

from kdcache.report.text import listing, number, size, table


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        (None, "", "-"),
        (True, "", "yes"),
        (1234567, "", "1,234,567"),
        (1536, "bytes", "1.5 KiB"),
        (1536, "label_bytes", "1.5 KiB"),
        (0.123456, "", "0.1235"),
        (2.5, "seconds.total", "2.5 s"),
        (2.5, "latency_seconds", "2.5 s"),
        (2.5, "sentences_per_second", "2.5"),
        ([1, 0.5], "", "1, 0.5"),
        ([], "", "-"),
        ("word", "", "word"),
    ],
)
def test_numbers(value: object, key: str, expected: str) -> None:
    assert number(value, key) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**30, "5.0 GiB"),
        (2**52, "4,096.0 TiB"),
    ],
)
def test_sizes(num_bytes: int, expected: str) -> None:
    assert size(num_bytes) == expected


def test_listing_aligns_and_joins_keys() -> None:
    assert (
        listing({"a": 1, "long_name": {"b": 2.0}, "c": ""}) == "a            1\nlong name.b  2\nc"
    )
    assert listing({}) == ""


def test_listing_keeps_names_of_the_users() -> None:
    values = {"signals": {"my_best": {"data_bytes": 1536}}, "tokens": {"my_src": 3}, "a_b": 1}
    assert listing(values).splitlines() == [
        "signals.my_best.data bytes  1.5 KiB",
        "tokens.my_src               3",
        "a b                         1",
    ]


def test_table_aligns_numbers_right() -> None:
    text = table(("name", "count"), [("a", 1), ("bcdef", 1000)])
    assert text == "name   count\n-----  -----\na          1\nbcdef  1,000"
    assert table(("name",), []) == "name\n----"
