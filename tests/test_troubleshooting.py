"""Messages and figures that pages quote are those of the code and of the records."""

from __future__ import annotations

import ast
import json
import re
from functools import cache

import pytest

from tests.pages.blocks import ROOT, read

QUOTED = [
    match
    for page in ("docs/troubleshooting.md",)
    for match in re.findall(r"^\| `([^`]+)` \|", read(page), re.MULTILINE)
]


@cache
def templates() -> list[str]:
    """Every string of the package, what is filled in being one character that no page has."""
    found = []
    for path in sorted((ROOT / "kdcache").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_enough_messages_are_explained_and_none_twice() -> None:
    assert len(QUOTED) > 45
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_of_the_code(message: str) -> None:
    fixed = [part.strip() for part in message.split("…") if part.strip(" :;")]
    assert sum(map(len, fixed)) >= 10, "too short to be looked for"
    pattern = re.compile(".*".join(map(re.escape, fixed)), re.DOTALL)
    assert any(pattern.search(text) for text in templates()), message


def rows(page: str, first: str) -> list[list[str]]:
    """Cells of the tables' rows whose first cell has these words, marks taken out."""
    lines = [line for line in read(page).splitlines() if line.startswith("| ")]
    cells = [[c.strip().replace("`", "") for c in line.strip("| ").split(" | ")] for line in lines]
    return [row for row in cells if re.match(first, row[0])]


def test_the_codecs_sizes_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks/results/bench_size.json").read_text("utf-8"))["codecs"]
    found = [
        r for r in rows("docs/codecs.md", r"threshold|sampled|topk|nucleus|full") if len(r) == 7
    ]
    assert len(found) == 13
    for name, size, noise, bias, *errors in found:
        codec = record[re.sub(r", \w+ = ", " ", name)]
        assert size == f"{codec['bytes_per_token']:,.1f}", name
        assert noise == f"{codec['noise']:.3f}", name
        assert bias == (f"{codec['bias_l1']:.2f}" if codec["bias_l1"] else "0"), name
        over = codec["noise_over_signal"]
        assert errors == [f"{over[t]:.2f}" if t in over else "-" for t in ("1", "2", "5")], name


def test_the_codecs_fidelity_is_that_of_the_record() -> None:
    text = (ROOT / "benchmarks/results/bench_fidelity.json").read_text("utf-8")
    record = json.loads(text)["methods"]
    found = [r for r in rows("docs/codecs.md", r"threshold|sampled|topk|full") if len(r) == 4]
    assert len(found) == 5
    for name, *gaps in found:
        numbers = re.findall(r"\d+", name)
        method = record["_".join([re.match(r"\w+", name)[0], *numbers[-1:]])]
        here = [method[epochs]["dev_loss"]["median_gap_to_online"] for epochs in ("1", "5", "20")]
        assert gaps == [f"{gap:.3f}".replace("-0.000", "0.000") for gap in here], name
