"""Students that say of a whole text, or of a pair, which class it is of, or a number."""

# M texts, B of a batch, S positions, C classes

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import ModelError, RecipeError
from kdcache.formats.manifest import TokenizerRecord
from kdcache.formats.signals import SignalRecord
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import ScoreKLTerm, ScoreMSETerm, StudentSection, TrainSection
from kdcache.train.batches.batch import Batch
from kdcache.train.batches.gold import GoldLabels, shown
from kdcache.train.batches.tasks import TaskGold
from kdcache.train.evaluation.labelled import LabelledTexts, labelled_texts
from kdcache.train.families.family import Family, Setting
from kdcache.train.losses.classifier_objective import ClassifierObjective
from kdcache.train.losses.objective import Objective
from kdcache.train.students.classifier import ClassifierDistillation
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.student import build_student

#: How transformers calls a classifier.
HEAD = "ForSequenceClassification"


class Classifier(Family):
    """It reads train.source, and scores it."""

    def objective(self, section: TrainSection, signals: Mapping[str, SignalRecord]) -> Objective:
        """See `ClassifierObjective`."""
        if section.source != section.target:
            raise RecipeError(
                f"train.source is {section.source!r} and train.target {section.target!r}; a "
                "classifier reads one stream: give both the same"
            )
        student = section.student
        assert student is not None
        labels: Sequence[str] | None = student.labels
        soft = any(t.used and isinstance(t, ScoreMSETerm | ScoreKLTerm) for t in section.objective)
        if labels is None and not soft and student.path is not None:
            labels = labels_at(Path(student.path).expanduser())
        parts = section.objective, signals, section.source
        return ClassifierObjective(*parts, labels, student.task, student.range)

    def build(
        self,
        section: StudentSection,
        objective: Objective,
        tokenizer: TokenizerRecord,
        vocab_size: int,
        seed: int,
        source: TokenizerRecord | None,
    ) -> Any:
        """A student with as many scores as the objective has labels, and their names.

        Raises:
            ModelError: it cannot be built, is no encoder, or has other labels.
        """
        assert isinstance(objective, ClassifierObjective)
        labels = objective.labels
        given = {"id2label", "label2id", "num_labels", "problem_type"} & set(section.config or ())
        if given:
            raise ModelError(
                f"train.student.config.{min(given)}: follows from the labels; give "
                "train.student.labels in its place"
            )
        if section.path is not None:
            own = labels_at(Path(section.path).expanduser())
            # Names that transformers made up say nothing, so a recipe may give better ones.
            made_up = own is not None and own == [f"LABEL_{n}" for n in range(len(labels))]
            if own is not None and own != list(labels) and not made_up:
                raise ModelError(
                    f"{section.path}: a classifier of {shown(own)}, the student's labels are "
                    f"{shown(labels)}; name its own, or start from a model without that head"
                )
        problem = "regression" if len(labels) == 1 else "single_label_classification"
        head = {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: number for number, name in enumerate(labels)},
            "problem_type": problem,
        }
        model = build_student(section, tokenizer, vocab_size, seed, source, head)
        if not reads_both_ways(model.config):
            raise ModelError(
                f"train.student: {model.config.model_type} is no encoder, which a classifier is; "
                "take bert, distilbert, roberta, modernbert or another of them"
            )
        return model

    def distillation(self, student: Any, objective: Objective, seed: int) -> Distillation:
        """See `ClassifierDistillation`."""
        assert isinstance(objective, ClassifierObjective)
        return ClassifierDistillation(student, objective, seed)

    def check_labels(self, micro: Batch, objective: Objective) -> None:
        """Nothing: labels are of whole samples, and their names were compared."""

    def development(self, setting: Setting) -> LabelledTexts:
        """Texts with gold labels that fit the student."""
        section, objective = setting.section, setting.objective
        corpus, stream = section.validation.corpus, setting.cache.stream(section.source)
        assert corpus is not None
        assert isinstance(objective, ClassifierObjective)
        assert section.student is not None
        gold = objective.gold
        assert not isinstance(gold, TaskGold)
        found = labelled_texts(
            "train.validation.corpus",
            corpus,
            (stream.field, stream.pair, corpus.label or setting.cache.manifest.corpus.label),
            load_tokenizer(setting.source),
            GoldLabels(
                objective.labels, None if gold is None else gold.task, range=section.student.range
            ),
            setting.positions,
        )
        limited = found.limited(section.validation.limit_tokens)
        limited.check_ids(setting.model)
        return limited


def labels_at(path: Path) -> list[str] | None:
    """Names of the classes of the classifier in a directory; None where it is none.

    Args:
        path: a transformers directory, or none.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # what is wrong is said when it is loaded
    if not any(str(name).endswith(HEAD) for name in config.get("architectures") or ()):
        return None
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return [names[number] for number in sorted(names, key=int)]


def reads_both_ways(config: Any) -> bool:
    """Whether a config is of an encoder."""
    from transformers.models.auto import modeling_auto

    known = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return known and not config.is_encoder_decoder and not getattr(config, "is_decoder", False)
