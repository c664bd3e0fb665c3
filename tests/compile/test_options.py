"""The words of a compilation: what they mean, and what is refused in one line."""

from __future__ import annotations

import pytest

from kdcache.compile.id_list import IdList
from kdcache.compile.options import (
    CompileOptions,
    Condition,
    Targets,
    parse_codec,
    parse_condition,
    parse_targets,
    split_pair,
)
from kdcache.errors import RecipeError, StorageError
from kdcache.formats.codec import ThresholdCodec


@pytest.mark.parametrize(
    ("text", "condition", "shown"),
    [
        ("logits.loss < 3", Condition("logits", "loss", "<", 3.0), "logits.loss < 3"),
        ("tgt.length<=50", Condition("tgt", "length", "<=", 50.0), "tgt.length <= 50"),
        (" b_2.bleu >= 1/3 ", Condition("b_2", "bleu", ">=", 1 / 3), f"b_2.bleu >= {1 / 3!r}"),
        ("x.entropy!=-1e-3", Condition("x", "entropy", "!=", -1e-3), "x.entropy != -0.001"),
    ],
)
def test_conditions(text, condition, shown):
    assert parse_condition(text) == condition
    assert str(condition) == shown
    assert parse_condition(shown) == condition


def test_other_words():
    assert parse_targets("beams=reference") == Targets("beams", "reference")
    codec = parse_codec("logits", {"name": "threshold", "c": "1/8"})
    assert isinstance(codec, ThresholdCodec)
    assert codec.c == 1 / 8
    assert split_pair("a = b=c", "rename", "x=y") == ("a", "b=c")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_condition("logits.loss"), "filter 'logits.loss': expected one such as"),
        (lambda: parse_condition("a.b < 1"), "quantity 'b', expected one of loss, entropy"),
        (lambda: parse_condition("a.loss < 1/0"), "'1/0' is no number"),
        (lambda: parse_condition("a.loss < 1e"), "'1e' is no number"),
        (lambda: parse_targets("beams"), "expected the name of a beams signal and one of best"),
        (lambda: parse_targets("beams=worst"), "expected the name of a beams signal"),
        (lambda: parse_codec("x", {"name": "topk"}), "codec of 'x': topk.k: Field required"),
        (lambda: parse_codec("x", {"name": "bogus"}), "codec of 'x': Input tag 'bogus'"),
        (lambda: split_pair("=b", "rename", "a=b"), "rename '=b': expected NAME=VALUE, as in a=b"),
        (lambda: CompileOptions(fraction=0.5, count=3).check(1), "fraction and count are both"),
        (lambda: CompileOptions(fraction=0).check(1), r"fraction is 0, expected one in \(0, 1\]"),
        (lambda: CompileOptions(fraction=float("nan")).check(1), "fraction is nan"),
        (lambda: CompileOptions(count=0).check(1), "count is 0, expected at least 1"),
        (lambda: CompileOptions(shard_tokens=0).check(1), "shard_tokens is 0"),
        (lambda: CompileOptions(missing="x").check(1), "missing is 'x', expected refuse or drop"),
        (lambda: CompileOptions(mix=[1, 2]).check(3), "mix has 2 weights for 3 caches"),
        (lambda: CompileOptions(mix=[1, -2]).check(2), "mix has the weight -2"),
        (lambda: CompileOptions(mix=[float("inf")]).check(1), "mix has the weight inf"),
        (lambda: CompileOptions(rename={"a": "B"}).check(1), "rename to 'B', expected a name"),
    ],
)
def test_what_is_no_option_is_refused(call, message):
    with pytest.raises(RecipeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_lists_of_samples(tmp_path):
    path = tmp_path / "list"
    path.write_text("\n".join(["0f" * 16, "", "12", " 7 ", "0F" * 16, "12", "00" * 16]))
    found = IdList.read(path)
    assert found.rows.tolist() == [7, 12]
    assert len(found) == 4
    assert found.ids.tobytes() == bytes(16) + b"\x0f" * 16
    path.write_text("7\r\n12\r\n" + "00" * 16 + "\n" + "0f" * 16)
    assert IdList.read(path).digest == found.digest
    path.write_text("7\n13\n" + "00" * 16 + "\n" + "0f" * 16)
    assert IdList.read(path).digest != found.digest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"7\nabc\n", "line 2: 'abc', expected a sample_id"),
        (b"\n\n", "it lists no sample"),
        (b"\xff", "not UTF-8"),
        ("7\n\u0667\n".encode(), "line 2"),
    ],
)
def test_what_is_no_list_is_refused(data, message, tmp_path):
    (tmp_path / "list").write_bytes(data)
    with pytest.raises(RecipeError, match=message):
        IdList.read(tmp_path / "list")


def test_a_list_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StorageError, match="list: cannot be read: No such file"):
        IdList.read(tmp_path / "list")
