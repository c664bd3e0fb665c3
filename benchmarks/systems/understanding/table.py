"""The table: what every row came to, beside its paper."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.train.runs.run import last_stage
from systems.table import judged
from systems.understanding.chance import Runs, p_value
from systems.understanding.rows import METRICS, STATEMENTS, Row
from systems.understanding.texts import COLUMNS
from systems.work import evaluation


def results(
    rows: Sequence[Row], runs: Mapping[str, Sequence[Runs]], references: Sequence[str]
) -> dict[str, Any]:
    """Every row, and whether the papers' findings held.

    Args:
        rows: of the table, those first that others are compared with.
        runs: row to its runs, of each seed.
        references: of the test set of translations.
    """
    groups = {row.name: row.group for row in rows}
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row.base is not None):
        found[row.name] = _result(row, runs[row.name], found.get(row.base or ""))

    def chance(better: str, worse: str) -> list[float]:
        both = zip(runs[better], runs[worse], strict=False)  # of the same seeds
        return [p_value(groups[better], *pair, references) for pair in both]

    held = [judged(statement, found, chance, _worth) for statement in STATEMENTS]
    return {
        "rows": [found[row.name] for row in rows],
        "statements": [one for one in held if one is not None],
        "towards_teacher": _towards_teacher(rows, found),
    }


def _towards_teacher(
    rows: Sequence[Row], found: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What distillation of MKD changed in each task, beside the teacher's lead in it.

    Args:
        rows: of the table.
        found: what they came to, by name.

    Returns:
        For every row that a teacher of five tasks taught and every task, `gain` over the row
        without distillation and `lead` of the teacher over that row, in points.
    """
    cells = []
    teacher = next((found[row.name] for row in rows if row.teacher and row.group == "mkd"), None)
    for statement in STATEMENTS:
        (name,), without = statement.better, found.get(statement.worse)
        if teacher is None or name not in found or without is None:
            continue
        if without["group"] != "mkd" or "no distillation" not in without["system"]:
            continue
        for task in COLUMNS:
            own, other, best = (
                row["tasks"][task]["mean"] for row in (found[name], without, teacher)
            )
            gain, lead = round(own - other, 2), round(best - other, 2)
            cells.append({"system": name, "task": task, "gain": gain, "lead": lead})
    return cells


def _worth(row: Mapping[str, Any]) -> float:
    """What a row is judged by, larger where it is better."""
    mean = float(row["mean"])
    return mean if row["higher_is_better"] else -mean


def _scores(row: Row, runs: Runs) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores of one seed by task, 100 times those up to 1, and the first of the evaluations."""
    read = {name: evaluation(last_stage(run)) for name, run in runs.items()}
    one = next(iter(read.values()))
    if row.group == "mkd":
        found = {task: read.get(task, one)["tasks"][task]["score"] for task in COLUMNS}
        return {task: 100 * score for task, score in found.items()}, one
    if row.group == "mass":
        return {"": one["bleu"]["score"]}, one
    return {"": one["word_perplexity"] if row.group == "gpt2" else 100 * one["accuracy"]}, one


def _p_values(row: Row, runs: Runs) -> dict[str, float]:
    """P-values of the difference from the base, of one seed, by task.

    That of the row as a whole is under an empty name: where one run has all tasks, or the only one.
    """
    metric, found = METRICS[row.group][0], {}
    for run in runs.values():
        tests = evaluation(last_stage(run)).get("against", {})
        parts = tests.get("tasks", {}) | ({"": tests} if metric in tests else {})
        found |= {task: part[metric]["p_value"] for task, part in parts.items()}
    return found


def _loss(found: Mapping[str, Any]) -> float:
    """Of an evaluation: nats a token, or the mean loss of a text (of one task, where it has it)."""
    return float(found["loss_nats"] if "loss_nats" in found else found["loss"])


def _result(row: Row, runs: Sequence[Runs], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """One row, see `results`."""
    scores, found = zip(*(_scores(row, one) for one in runs), strict=True)
    means = [statistics.mean(one.values()) for one in scores]
    metric, higher = METRICS[row.group]
    result: dict[str, Any] = {
        "system": row.name,
        "group": row.group,
        "recipe": row.recipe,
        "overrides": dict(row.overrides),
        "caches": list(row.cache),
        "runs_a_seed": len(runs[0]),
        "parameters": found[0]["parameters"],
        "metric": metric,
        "higher_is_better": higher,
        "values": [round(mean, 3) for mean in means],
        **_spread(means),
        "test_loss": round(statistics.mean(_loss(one) for one in found), 4),
    }
    if row.group == "mkd":
        result["tasks"] = {task: _spread([one[task] for one in scores]) for task in COLUMNS}
    if row.group == "gpt2":
        result["num_too_long"] = found[0]["num_too_long"]
    if base is not None:
        pairs = list(zip(means, base["values"], strict=False))  # of the same seeds
        differences = [mean - other for mean, other in pairs]
        result["base"] = base["system"]
        result["over_base"] = round(statistics.mean(differences), 2)
        result["seeds_better"] = sum((one > 0) == higher and one != 0 for one in differences)
        tests = [_p_values(row, one) for one in runs]
        for task in tests[0]:
            held = result["tasks"][task] if task else result
            held["p_values"] = [one[task] for one in tests]
    if row.published is not None:
        figure, other = row.published
        over = figure - other
        result["published"] = {"paper": row.paper, metric: figure, "over_base": round(over, 2)}
        result["direction_held"] = result["over_base"] * over > 0
    return result


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, and the largest less the smallest."""
    spread = max(values) - min(values)
    return {"mean": round(statistics.mean(values), 2), "spread": round(spread, 2)}


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as two Markdown tables: five tasks, and LightPAFF."""
    tables = []
    several = [row for row in rows if "tasks" in row]
    if several:
        head = ("system", "parameters, without embeddings", *COLUMNS, "mean", "over base", "paper")
        tables.append((head, [_cells(row, list(COLUMNS)) for row in several]))
    others = [row for row in rows if "tasks" not in row]
    if others:
        head = ("system", "parameters, without embeddings", "result", "over base", "paper")
        tables.append((head, [_cells(row, []) for row in others]))
    return "\n\n".join(
        "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))
        for head, body in tables
    )


def _cells(row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """A line of a table."""
    counts = row["parameters"]
    over = ""
    if "over_base" in row:
        over = f"{row['over_base']:+.2f} ({row['seeds_better']} of {len(row['values'])})"
    over += _chance(row)
    published = row.get("published")
    paper = f"{published[row['metric']]} ({published['over_base']:+.1f})" if published else ""
    figures = [row["tasks"][task] for task in tasks]
    return [
        row["system"],
        f"{counts['total']:,}, {counts['without_embeddings']:,}",
        *(f"{one['mean']:.2f} ± {one['spread']:.2f}{_chance(one)}" for one in figures),
        f"{row['mean']:.2f} ± {row['spread']:.2f}",
        over,
        paper,
    ]


def _chance(held: Mapping[str, Any]) -> str:
    """The p-values of a figure, one a seed, if it has some."""
    values = held.get("p_values", ())
    return f", p {', '.join(f'{value:.3f}' for value in values)}" if values else ""
