"""A student of several tasks: built, and with its objective as one module."""

# B samples, S positions, C scores of a task

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.formats.keyed import text_key
from kdcache.formats.manifest import TokenizerRecord
from kdcache.models.loading import quiet_transformers
from kdcache.models.multi_task import (
    OWN_BODIES,
    MultiTaskConfig,
    MultiTaskModel,
    body_config,
    task_scores,
    with_tasks,
    without_pooler,
)
from kdcache.models.tasks import Task
from kdcache.recipe import ScoreKLTerm, ScoreMSETerm, StudentSection, TaskLossTerm
from kdcache.train.batches.batch import Batch, Scores
from kdcache.train.losses.multi_task_objective import MultiTaskObjective, signal_name
from kdcache.train.losses.objective import Moment
from kdcache.train.losses.score_terms import scores_loss
from kdcache.train.losses.task_losses import task_loss
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.layer_copy import with_layers
from kdcache.train.students.student import (
    first_line,
    from_config,
    initialise,
    keyed_generator,
)

HEAD_SIZE = 512


class MultiTaskDistillation(Distillation):
    """A model of several tasks, and the losses of the scores of one of them a batch.

    Args:
        student: a `MultiTaskModel`.
        objective: which losses there are.
    """

    objective: MultiTaskObjective

    def __init__(self, student: Any, objective: MultiTaskObjective) -> None:
        nn.Module.__init__(self)  # there is no vocabulary, and nothing is learned beside
        self.student, self.objective = student, objective
        self.beside = nn.ModuleDict()
        self.layers = {}

    def split(
        self, micro: Batch, counts: Mapping[str, int], groups: Sequence[Sequence[Moment]]
    ) -> tuple[list[Tensor], Tensor]:
        """As of an encoder-decoder, over the samples that a term has a label or scores of.

        All samples are of one task, whose head alone is run.
        """
        assert micro.task is not None, "the order is by tasks"
        tokens = micro.streams[self.objective.source]
        logits = task_scores(self.student, tokens.ids, tokens.mask, tokens.segments, micro.task)
        totals, values = [], logits.new_zeros(len(self.objective.terms), dtype=torch.float32)
        for group in groups:
            total = (logits.float() * 0.0).sum()  # a step without any label moves nothing
            for one in group:
                loss = self._loss(one, logits, micro, 1 / self.objective.count(one.number, counts))
                total = total + one.weight * loss
                values[one.number] = loss.detach()
            totals.append(total)
        return totals, values

    def _loss(self, moment: Moment, logits: Tensor, micro: Batch, share: float) -> Tensor:
        """A term before its weight, every sample by a factor."""
        assert micro.task is not None
        term = self.objective.terms[moment.number]
        if isinstance(term, TaskLossTerm):
            assert micro.gold is not None
            assert micro.unit is not None
            task = self.objective.heads[micro.task]
            return task_loss(task, logits, micro.gold, micro.unit, share)
        assert isinstance(term, ScoreMSETerm | ScoreKLTerm)
        scores = micro.signals[signal_name(term, micro.task)]
        assert isinstance(scores, Scores)
        return scores_loss(term, logits, scores, moment.temperature, share)


def config_at(path: str | Path) -> MultiTaskConfig | None:
    """The config of the model of several tasks in a directory; None where it is none.

    Args:
        path: a transformers directory, or none.
    """
    try:
        tree = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # what is wrong is said when it is loaded
    if tree.get("model_type") != MultiTaskConfig.model_type:
        return None
    return MultiTaskConfig(**{key: value for key, value in tree.items() if key != "model_type"})


def build_multi_task(
    section: StudentSection,
    heads: Mapping[str, Task],
    tokenizer: TokenizerRecord,
    vocab_size: int,
    seed: int,
) -> MultiTaskModel:
    """The student of a recipe, in float32 on the CPU, in training mode.

    Args:
        section: the recipe's student.
        heads: its tasks by name.
        tokenizer: the cache's record of the tokenizer whose ids it reads.
        vocab_size: rows of a new body's embeddings, unless its config says another number.
        seed: recipe seed; what is not loaded is a function of it.

    Raises:
        ModelError: the config or the directory gives no encoder, or other tasks.
    """
    quiet_transformers()
    with keyed_generator(text_key(seed, "student")):
        if section.path is not None:
            return _from_path(section, heads).train()
        keys = dict(section.config or {})
        config = _new_body(keys, tokenizer, vocab_size)
        model = MultiTaskModel(_config(section, config, heads))
        if section.init == "glorot":
            initialise(model)
        return model.train()


def _config(section: StudentSection, body: Any, heads: Mapping[str, Task]) -> MultiTaskConfig:
    """A config over that of a body."""
    return MultiTaskConfig(
        text_config=body,
        tasks={name: task.to_dict() for name, task in heads.items()},
        pooling=section.pooling or "cls",
        head_size=HEAD_SIZE if section.head_size is None else section.head_size,
    )


def _new_body(keys: dict[str, Any], tokenizer: TokenizerRecord, vocab_size: int) -> Any:
    """The config of a body that a recipe describes."""
    model_type = keys.get("model_type")
    if model_type not in OWN_BODIES:
        with torch.device("meta"):  # its config alone is wanted
            config = from_config("multi_task", keys, tokenizer, vocab_size, None).config
        check_encoder(config)
        return config
    filled = {"vocab_size": vocab_size, "pad_token_id": tokenizer.pad_id}
    try:
        default = body_config({"model_type": model_type})
        unknown = sorted(set(keys) - {"model_type"} - set(default.to_dict()))
        if not unknown:
            return body_config(filled | keys)
    except (ValueError, TypeError) as error:
        raise ModelError(f"train.student.config: {model_type}: {first_line(error)}") from None
    raise ModelError(
        f"train.student.config: a {model_type} config has no {', '.join(unknown)}; it has "
        f"{sorted(set(default.to_dict()))}"
    )


def check_encoder(config: Any) -> None:
    """Refuse a body that does not see later tokens.

    Raises:
        ModelError: it is of a decoder, or of an encoder-decoder.
    """
    from transformers.models.auto import modeling_auto

    known = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not known or config.is_encoder_decoder or getattr(config, "is_decoder", False):
        raise ModelError(
            f"train.student: {config.model_type} is no encoder, which a multi_task student is; "
            f"take bert, distilbert, roberta, modernbert or another, or {', '.join(OWN_BODIES)}"
        )


def _from_path(section: StudentSection, heads: Mapping[str, Task]) -> MultiTaskModel:
    """A student whose body, and maybe heads, lie in a directory."""
    path = Path(str(section.path)).expanduser()
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no transformers model there; train.student.path needs one")
    own = config_at(path)
    if own is None:
        body = _loaded(path, None)
        check_encoder(body.config)
        body = _kept(body, section)
        model = MultiTaskModel(_config(section, body.config, heads))
        model.body.load_state_dict(body.state_dict())
        return model
    _check_heads(path, section, own, heads)
    model = _loaded(path, MultiTaskModel)
    if section.layers is not None:
        model.body = _kept(model.body, section)
        model.config.text_config = model.body.config
    if section.pooling is not None:
        model.config.pooling = section.pooling
    return with_tasks(model, heads)


def _kept(body: Any, section: StudentSection) -> Any:
    """Some layers of a body, or all of them."""
    if section.layers is None:
        return body
    return with_layers(body, section.layers.encoder, section.layers.decoder)


def _loaded(path: Path, kind: Any) -> Any:
    """A model of a directory, none of whose weights are made up.

    Args:
        path: its directory.
        kind: its class; None: the body that transformers finds there.
    """
    import transformers

    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    try:
        if kind is None:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            kind, options = transformers.AutoModel, options | without_pooler(config)
            options["trust_remote_code"] = False
        model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from None
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise ModelError(f"{path}: it lacks {len(missing)} weights, {missing[0]} among them")
    return model


def _check_heads(
    path: Path, section: StudentSection, own: MultiTaskConfig, heads: Mapping[str, Task]
) -> None:
    """Refuse a recipe that calls a head of the model in a directory something else."""
    for name, task in own.task_list.items():
        asked = heads.get(name, task)
        if (asked.kind, asked.labels) != (task.kind, task.labels):
            raise ModelError(
                f"{path}: its head {name!r} is a {task.kind} of {list(task.labels)}, "
                f"train.student.tasks.{name} a {asked.kind} of {list(asked.labels)}; give the task "
                "another name, or leave it out of train.student.tasks"
            )
    if section.head_size not in (None, own.head_size):
        raise ModelError(
            f"{path}: its heads have size {own.head_size}, train.student.head_size is "
            f"{section.head_size}; leave it null"
        )
