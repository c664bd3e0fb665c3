"""An evaluated run that another is compared with, sample by sample."""

# M samples

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kdcache.errors import IdentityError, ModelError
from kdcache.models.tasks import Task
from kdcache.train.evaluation.predictions import Predictions, parse_predictions
from kdcache.train.evaluation.text_scores import TextScores, parse_text_scores

Said = TypeVar("Said", Predictions, TextScores)

RESULT = "evaluation.json"
PREDICTIONS = "predictions.jsonl"
#: Kinds of students to what tells their results from others.
KINDS = {
    "encoder_decoder": "bleu",
    "multi_task": "tasks",
    "classifier": "labels",
    "masked_lm": "masks",
    "masked_seq2seq": "masks",
    "causal_lm": "num_words",
}
#: That, in words.
WHAT = {
    "bleu": "translations",
    "tasks": "labels of several tasks",
    "labels": "labels of one task",
    "masks": "masked tokens",
    "num_words": "the tokens of a causal language model",
}


@dataclass(frozen=True)
class Baseline:
    """What an evaluation wrote of each sample.

    Attributes:
        run: where it was written.
        path: the run that is compared with it.
        result: its `evaluation.json`.
        lines: its `predictions.jsonl`.
        said: the predictions by task, of those that were checked; under an empty name those of a
            student of one task, or the scores of a language model.
    """

    run: Path
    path: Path
    result: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    said: dict[str, Predictions | TextScores] = field(default_factory=dict)

    @classmethod
    def open(cls, run: Path, path: Path, kind: str) -> Baseline:
        """The results of an evaluated run.

        Args:
            run: that was evaluated.
            path: the run that is to be compared with it.
            kind: of that one's student.

        Raises:
            ModelError: the run was not evaluated, or by an older version.
            IdentityError: it is of another kind, or damaged.
        """
        result = read_evaluation(run)
        check_kind(run, path, result, kind)
        lines = _read_lines(run, run / PREDICTIONS)
        if len(lines) != result["num_texts"]:
            raise IdentityError(
                f"{run / PREDICTIONS} has {len(lines)} lines, its evaluation "
                f"{result['num_texts']}: evaluate {run} again"
            )
        return cls(run, path, result, lines)

    def shared(self, names: Sequence[str]) -> list[str]:
        """Those of some tasks that it has too.

        Raises:
            IdentityError: it has none of them.
        """
        found = [name for name in names if name in self.result["tasks"]]
        if not found:
            raise IdentityError(
                f"{self.run} was evaluated on the tasks {list(self.result['tasks'])}, {self.path} "
                f"on {list(names)}: evaluate both on a task that they share"
            )
        return found

    def check(self, name: str, task: Task, digest: str, rows: np.ndarray) -> None:
        """Read the predictions of a task, once they are known to be of the same samples.

        Args:
            name: of the task; empty: the only one.
            task: as the other run has it.
            digest: of its texts and labels.
            rows: [M] int64, see `Predictions`.

        Raises:
            IdentityError: they are of other labels, texts or rows, or damaged.
        """
        own = self.result["tasks"][name] if name else self.result
        where = f"{self.run}, task {name!r}," if name else str(self.run)
        labels = list(task.labels)
        held = own["labels"]
        if not name and len(held) == 1:  # the name of a number means nothing
            held = []
        if held != labels or own.get("kind", task.kind) != task.kind:
            raise IdentityError(
                f"{where} has {_says(own.get('kind'), held)}, {self.path} "
                f"{_says(task.kind, labels)}: compare runs of the same labels in the same order"
            )
        self._check_digest(where, own, digest)
        lines = [line for line in self.lines if line.get("task", "") == name]
        said = self._parsed(lambda: parse_predictions(task, lines))
        self._check_rows(where, said.rows, rows)
        self.said[name] = said

    def check_texts(
        self,
        digest: str,
        rows: np.ndarray,
        num_tokens: np.ndarray,
        masks: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the scores of a language model, once they are known to be of the same texts.

        Args:
            digest: of the texts.
            rows: [M] int64, see `TextScores`.
            num_tokens: [M] int64, predicted tokens of each.
            masks: how they were masked; None: predicted in their order.

        Raises:
            IdentityError: they are of other texts, masks or rows, or damaged; or neither tokens
                nor words are the same.
        """
        self._check_digest(str(self.run), self.result, digest)
        said = self._parsed(lambda: parse_text_scores(self.lines))
        self._check_rows(str(self.run), said.rows, rows)
        same = np.array_equal(said.num_tokens, num_tokens)
        if masks != self.result.get("masks") or not (same or said.num_words is not None):
            raise IdentityError(
                f"{self.run} and {self.path} were scored on other tokens of the same texts: "
                "compare runs of one tokenizer"
                + (" and one scheme of masks" if masks is not None else "")
            )
        self.said[""] = said

    def _check_digest(self, where: str, own: Mapping[str, Any], digest: str) -> None:
        """Both were scored on the same texts."""
        other = own.get("references_digest")
        if other != digest:
            raise IdentityError(
                f"{where} was scored on other texts or labels than {self.path} "
                f"({own['num_texts']} texts, digest {str(other)[:8]}; here {digest[:8]}): evaluate "
                "both on one corpus"
            )

    def _check_rows(self, where: str, theirs: np.ndarray, rows: np.ndarray) -> None:
        """Both kept the same texts."""
        if not np.array_equal(theirs, rows):
            raise IdentityError(
                f"{where} was scored on {len(theirs)} of the texts, {self.path} is on {len(rows)}, "
                "since their students take other lengths: leave out of the corpus what one of "
                "them does not take"
            )

    def _parsed(self, parse: Callable[[], Said]) -> Said:
        """What the lines say."""
        try:
            return parse()
        except ValueError as error:
            raise IdentityError(
                f"{self.run / PREDICTIONS}: {error}; evaluate {self.run} again"
            ) from None


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """What an earlier evaluation wrote.

    Raises:
        ModelError: the run was not evaluated.
    """
    try:
        found: dict[str, Any] = json.loads((Path(path) / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: not evaluated yet; run `kdcache evaluate {path}` first"
        ) from None
    return found


def check_kind(run: Path, path: Path, result: Mapping[str, Any], kind: str) -> None:
    """Refuse to compare different kinds of students.

    Args:
        run: that was evaluated.
        path: the run that is to be compared with it.
        result: of the first.
        kind: of the second's student.

    Raises:
        IdentityError: it was evaluated as another kind.
    """
    if KINDS[kind] not in result:
        what = next((words for key, words in WHAT.items() if key in result), "something else")
        raise IdentityError(
            f"{run} was evaluated for {what}, {path} is for {WHAT[KINDS[kind]]}: compare runs of "
            "one kind"
        )


def _read_lines(run: Path, path: Path) -> list[dict[str, Any]]:
    """The values of a file of predictions."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file, and a comparison needs it; run `kdcache evaluate {run}` again"
        ) from None
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise IdentityError(
                f"{path}: line {number + 1} is damaged; evaluate {run} again"
            ) from None
    return found


def _says(kind: str | None, labels: Sequence[str]) -> str:
    """What a task's labels are, in words."""
    return f"{kind or 'classification'} labels {list(labels)}" if labels else "numbers"
