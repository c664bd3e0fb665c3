"""The table: what every row came to, beside its paper."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from systems.rows import Row, Statement

#: Difference in BLEU or chrF that a bootstrap has to find below this to count.
SIGNIFICANT = 0.05


def row_result(
    row: Row, seeds: Sequence[int], found: Sequence[Mapping[str, Any]], speed: float
) -> dict[str, Any]:
    """One row.

    Args:
        row: as it was planned.
        seeds: of its runs.
        found: their evaluations, in the same order.
        speed: target tokens a second over those of the row that it is compared with.
    """
    result: dict[str, Any] = {
        "system": row.name,
        "recipe": row.recipe,
        "overrides": dict(row.overrides),
        "cache": row.cache,
        "seeds": list(seeds),
        "parameters": found[0]["parameters"]["total"],
        "speed_over_base": round(speed, 3),
        "test_loss_nats": round(statistics.mean(one["loss_nats"] for one in found), 4),
    }
    for metric in ("bleu", "chrf"):
        scores = [one[metric]["score"] for one in found]
        result[metric] = {
            "mean": round(statistics.mean(scores), 2),
            "spread": round(max(scores) - min(scores), 2),
        }
        if row.base is not None:
            tests = [one["against"][metric] for one in found]
            result[metric] |= {
                "over_base": round(statistics.mean(test["difference"] for test in tests), 2),
                "p_values": [test["p_value"] for test in tests],
            }
    if row.published is not None:
        bleu, base = row.published
        held = (result["bleu"]["over_base"] > 0) == (bleu > base)
        result["published"] = {"paper": row.paper, "bleu": bleu, "over_base": round(bleu - base, 2)}
        result["direction_held"] = held
    return result


def teacher_result(found: Mapping[str, Any]) -> dict[str, Any]:
    """What its students are to be measured by.

    Args:
        found: the evaluation of the teacher of the main pair.
    """
    return {
        "parameters": found["parameters"]["total"],
        "test_loss_nats": round(found["loss_nats"], 4),
        "bleu": round(found["bleu"]["score"], 2),
        "chrf": round(found["chrf"]["score"], 2),
    }


def _bleu(row: Mapping[str, Any]) -> float:
    """What a row of the translation table is judged by."""
    return float(row["bleu"]["mean"])


def judged(
    statement: Statement,
    rows: Mapping[str, Mapping[str, Any]],
    chance: Callable[[str, str], Sequence[float]],
    worth: Callable[[Mapping[str, Any]], float] = _bleu,
) -> dict[str, Any] | None:
    """Whether a statement holds here; None where its rows are not there.

    Args:
        statement: of a paper.
        rows: by name.
        chance: p-values of the difference of one row from another, to either side, a seed each.
        worth: what a row is judged by, larger where it is better.
    """
    better = [rows[name] for name in statement.better if name in rows]
    worse = rows.get(statement.worse)
    if not better or worse is None:
        return None
    best = max(better, key=worth)
    difference = worth(best) - worth(worse)
    held = difference > 0 if statement.strictly else difference >= 0
    values = list(chance(best["system"], statement.worse))
    return {
        "statement": statement.text,
        "paper": statement.paper,
        "best": best["system"],
        "difference": round(difference, 2),
        "held": held,
        "p_values": values,
        "significant_seeds": sum(value < SIGNIFICANT for value in values),
        "seeds": len(values),
    }


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| system | parameters | BLEU | over base (p) | chrF | speed over base | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bleu = row["bleu"]
        over = ""
        if "over_base" in bleu:
            values = ", ".join(f"{value:.3f}" for value in bleu["p_values"])
            over = f"{bleu['over_base']:+.2f} ({values})"
        published = row.get("published")
        beside = f"{published['bleu']} ({published['over_base']:+.2f})" if published else ""
        cells = [
            row["system"],
            f"{row['parameters']:,}",
            f"{bleu['mean']:.2f} ± {bleu['spread']:.2f}",
            over,
            f"{row['chrf']['mean']:.2f}",
            f"{row['speed_over_base']:.2f}",
            beside,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
