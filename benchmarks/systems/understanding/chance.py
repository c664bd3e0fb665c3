"""P-values of the difference between any two rows, from what their runs said of each sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdcache.models.tasks import Task
from kdcache.train.evaluation.baseline import PREDICTIONS, Baseline
from kdcache.train.evaluation.paired import Said, compare
from kdcache.train.evaluation.predictions import parse_predictions
from kdcache.train.evaluation.text_scores import parse_text_scores
from kdcache.train.runs.run import last_stage
from systems.understanding.rows import METRICS
from systems.work import bleu_p_value, evaluation

#: Task to run of one seed; a run of all tasks, or of the only one, under an empty name.
Runs = Mapping[str, Path]


def p_value(group: str, own: Runs, other: Runs, references: Sequence[str]) -> float:
    """P-value of the difference of two rows of a group, of one seed.

    Args:
        group: mkd, bert, gpt2 or mass.
        own: runs of one row.
        other: and of the other, evaluated on the same samples.
        references: of the test set of mass.
    """
    metric = METRICS[group][0]
    if group == "mass":
        return bleu_p_value(last_stage(own[""]), last_stage(other[""]), references)
    mine, theirs = _said(group, own), _said(group, other)
    path = next(iter(other.values()))
    baseline = Baseline(path, path, {"tasks": dict.fromkeys(theirs)}, [], theirs)
    return float(compare(mine, baseline)[metric]["p_value"])


def _said(group: str, runs: Runs) -> dict[str, Said]:
    """What some runs said, by task; under an empty name of the only one."""
    found: dict[str, Said] = {}
    for run in map(last_stage, runs.values()):
        text = (run / PREDICTIONS).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        result = evaluation(run)
        if group == "gpt2":
            found[""] = parse_text_scores(lines)
        elif group == "bert":
            found[""] = parse_predictions(Task(labels=tuple(result["labels"])), lines)
        else:
            for name, one in result["tasks"].items():
                task = Task(one["kind"], tuple(one["labels"]))
                own = [line for line in lines if line["task"] == name]
                found[name] = parse_predictions(task, own)
    return found
