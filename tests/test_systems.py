"""The benchmark of the systems of the papers, at its smallest scale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.recipe import builtin_names

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def table(out: Path, *words: str) -> tuple[dict, list[str]]:
    """The result that a run prints, and the commands that it ran."""
    command = [sys.executable, str(BENCHMARKS / "bench_systems.py"), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stderr.splitlines() if line.startswith("kdcache ")]
    return json.loads(done.stdout.splitlines()[-1]), ran


@pytest.mark.slow
def test_every_system_runs_from_one_dump(tmp_path, monkeypatch):
    monkeypatch.delenv("KDCACHE_DATA", raising=False)
    found, ran = table(tmp_path)
    assert found["generated_data"]
    rows = {row["system"]: row for row in found["rows"]}
    families = {name.removesuffix("-small") for name in builtin_names() if name.endswith("-small")}
    apart = {"nmt-all", "distilbert-slim", "masked-lm", "masked-lm-span"}  # dumps, and one shape
    apart |= {"causal-lm", "lightpaff-bert", "lightpaff-gpt2"}  # they translate nothing
    apart |= {name for name in families if name.startswith("mkd")}  # so do these
    apart |= {"lightpaff-mass"}  # of two stages
    assert {row["recipe"] for row in rows.values()} == families - apart
    assert rows["no-kd"]["speed_over_base"] == 1
    for row in rows.values():
        assert row["parameters"] > 0
        assert 0 < row["test_loss_nats"] < 7
        assert set(row["bleu"]) >= {"mean", "spread"}
    assert len({row["test_loss_nats"] for row in rows.values()}) > len(rows) // 2
    assert {one["paper"] for one in found["statements"]} >= {"Kim & Rush", "CKD, Tr-En"}
    assert found["saving"]["teacher_tokens_online_over_cached"] > 0
    assert sum(line.startswith("kdcache dump nmt-all") for line in ran) == 1
    again, more = table(tmp_path)  # nothing is done twice
    assert not more
    assert again["rows"] == found["rows"]
