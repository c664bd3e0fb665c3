"""The benchmark of the systems of the papers, at its smallest scale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.recipe import builtin_names

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
#: Dumps and what teachers begin with, which are no rows, and one shape of another row.
APART = {"nmt-all", "distilbert-slim", "masked-lm", "masked-lm-span", "mkd-all"}
#: Rows of the other table as a sweep.
APART |= {f"lightpaff-{name}-ablations" for name in ("bert", "gpt2", "mass")}
#: Those of the other table.
UNDERSTAND = {"mkd", "mkd-no-kd", "mkd-bilstm", "mkd-bilstm-plain", "mkd-bilstm-words", "pkd-bert"}
UNDERSTAND |= {
    "mkd-teacher",
    "causal-lm",
    "tinybert",
    "lightpaff-bert",
    "lightpaff-gpt2",
    "lightpaff-mass",
}


def small_families() -> set[str]:
    """Names of the built-in recipes of scale small."""
    return {name.removesuffix("-small") for name in builtin_names() if name.endswith("-small")}


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
    assert {row["recipe"] for row in rows.values()} == small_families() - APART - UNDERSTAND
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


@pytest.mark.slow
def test_every_system_of_language_understanding_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("KDCACHE_DATA", raising=False)
    words = "--table", "understanding"
    found, ran = table(tmp_path, *words)
    assert found["generated_data"]
    rows = {row["system"]: row for row in found["rows"]}
    assert {row["recipe"].partition(":")[0] for row in rows.values()} == UNDERSTAND
    for name, row in rows.items():
        assert row["parameters"]["without_embeddings"] > 0
        assert -100 <= row["mean"] <= (100 if row["higher_is_better"] else 1e5)
        assert 0 < row["test_loss"] < 20
        if "tasks" in row:
            mean = sum(task["mean"] for task in row["tasks"].values()) / 5
            assert row["mean"] == pytest.approx(mean, abs=0.01)
        if row.get("base") is not None:
            over = row["values"][0] - rows[row["base"]]["values"][0]
            assert row["over_base"] == pytest.approx(over, abs=0.01), name
            tested = row["tasks"].values() if "tasks" in row else [row]
            assert all(0 < value <= 1 for one in tested for value in one["p_values"]), name
    # Every way is another training.
    for group in ("mkd", "bert", "gpt2", "mass"):
        losses = [row["test_loss"] for row in rows.values() if row["group"] == group]
        assert len(set(losses)) == len(losses)
    # A run a task has no test of the mean.
    apart = {name for name, row in rows.items() if "base" in row and "p_values" not in row}
    assert apart == {name for name, row in rows.items() if row["runs_a_seed"] > 1}
    assert len(found["statements"]) == 26
    none, taught = (
        [f"{student}, {way}" for student in ("Transformer", "BiLSTM") for way in ways]
        for ways in (
            ("no distillation, a run a task", "no distillation"),
            ("single-task distillation", "multi-task distillation"),
        )
    )
    cells = {(one["system"], one["task"]): one for one in found["towards_teacher"]}
    assert len(cells) == 5 * len(taught)
    for task, best in rows["teacher, of five tasks"]["tasks"].items():
        for name, without in zip(taught, none, strict=True):
            own, other = rows[name]["tasks"][task]["mean"], rows[without]["tasks"][task]["mean"]
            cell = cells[name, task]
            assert cell["gain"] == pytest.approx(own - other, abs=0.01)
            assert cell["lead"] == pytest.approx(best["mean"] - other, abs=0.01)
    assert sum(line.startswith("kdcache dump mkd-all") for line in ran) == 1
    students = [line for line in ran if line.startswith("kdcache train mkd")]
    assert all(f"--cache {tmp_path}/caches/mkd" in line for line in students)
    again, more = table(tmp_path, *words)  # nothing is done twice
    assert not more
    assert again["rows"] == found["rows"]
    some, more = table(tmp_path, *words, "--rows", "pkd-bert")
    assert [row["system"] for row in some["rows"]] == ["BERT, FT", "pkd-bert"]
    assert not more
