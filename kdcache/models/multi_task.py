"""Models of several tasks: one body that reads a text or a pair, and a head for every task.

Teachers and students may be such a model. Its directory is one that `save_pretrained` writes and
`MultiTaskModel.from_pretrained` reads.
"""

# B batch, S positions, D width of the body, C scores of a task

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from kdcache.errors import ModelError
from kdcache.models.tasks import Task

#: Bodies that are no transformers encoder: model type to module, config class and body class.
OWN_BODIES = {"bi_attentive": ("kdcache.models.bi_attentive", "BiAttentiveConfig", "BiAttentive")}

Pooling = Literal["cls", "mean_cls"]


class MultiTaskConfig(PreTrainedConfig):
    """A body's config, the tasks, and how heads read the body.

    Args:
        text_config: of the body: of transformers, or of one of `OWN_BODIES`; or its plain values
            with `model_type`.
        tasks: by name, see `Task`; plain values.
        pooling: what heads read of a transformers body: cls: the last layer's first token;
            mean_cls: the mean over the layers of their first token (embeddings not counted).
        head_size: width between the two layers of a head; 0: a head is one linear layer.
    """

    model_type = "kdcache_multi_task"

    def __init__(
        self,
        text_config: Any = None,
        tasks: Mapping[str, Mapping[str, Any]] | None = None,
        pooling: Pooling = "cls",
        head_size: int = 512,
        **keys: Any,
    ) -> None:
        body = {"model_type": "bert"} if text_config is None else text_config
        self.text_config = body_config(body) if isinstance(body, Mapping) else body
        self.tasks = {name: Task.of(tree).to_dict() for name, tree in (tasks or {}).items()}
        self.pooling, self.head_size = pooling, head_size
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            keys.setdefault(name, getattr(self.text_config, name, None))
        if keys.get("tokenizer_class") is None:  # or a tokenizer that names no class has none
            keys["tokenizer_class"] = TOKENIZER_MAPPING_NAMES.get(self.text_config.model_type)
        super().__init__(**keys)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.text_config.hidden_size)

    @property
    def task_list(self) -> dict[str, Task]:
        """The tasks by name."""
        return {name: Task.of(tree) for name, tree in self.tasks.items()}


class MultiTaskModel(PreTrainedModel):
    """A body, and a head for every task.

    A head is linear -> ReLU -> linear, or one linear layer.

    Source: Liu et al. 2019, MKD, sections 3.3 and 4.
    """

    config_class = MultiTaskConfig
    config: MultiTaskConfig
    body: Any
    base_model_prefix = "body"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MultiTaskConfig) -> None:
        super().__init__(config)
        self.body = make_body(config.text_config)
        width, middle = config.hidden_size, config.head_size
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(width, task.num_scores)
                if not middle
                else nn.Sequential(
                    nn.Linear(width, middle), nn.ReLU(), nn.Linear(middle, task.num_scores)
                )
                for name, task in config.task_list.items()
            }
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The body's."""
        found: nn.Module = self.body.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> None:
        """None: it writes no tokens."""

    def _init_weights(self, module: nn.Module) -> None:
        """Heads of one layer as BERT's start, those of two Glorot-uniform; the body by itself.

        BERT's 0.02 twice in a row passes so little on from a narrow body that several tasks at once
        are hardly learned.
        """
        if not isinstance(module, nn.Linear):
            return
        if self.config.head_size:
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """[B, D] what the heads read.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S] 1 on tokens.
            token_type_ids: [B, S] int64, 0 for the first text of a pair; left out for a body that
                takes none.
        """
        if is_own(self.config.text_config):
            found: Tensor = self.body(input_ids, attention_mask, token_type_ids)
            return found
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        every = self.config.pooling == "mean_cls"
        out = self.body(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=every, **more
        )
        if not every:
            first: Tensor = out.last_hidden_state[:, 0]
            return first
        return torch.stack([layer[:, 0] for layer in out.hidden_states[1:]]).mean(0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        task: str | None = None,
    ) -> SequenceClassifierOutput:
        """[B, C] scores of one task, as `logits`.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S] 1 on tokens.
            token_type_ids: [B, S] int64; None: one text.
            task: whose head speaks; None where there is but one.

        Raises:
            ModelError: there is no such head.
        """
        head = self.heads[self.one_task(task)]
        pooled = self.pooled(input_ids, attention_mask, token_type_ids)
        return SequenceClassifierOutput(logits=head(pooled))

    def one_task(self, task: str | None) -> str:
        """The name of a head.

        Args:
            task: its name; None where there is but one.

        Raises:
            ModelError: there is no such head, or several.
        """
        names = list(self.heads)
        if task is None and len(names) == 1:
            return names[0]
        if task not in names:
            raise ModelError(f"a model of the tasks {names} is asked for {task!r}; name one")
        return task

    @property
    def reads_segments(self) -> bool:
        """Whether its body takes token types."""
        return "token_type_ids" in inspect.signature(self.body.forward).parameters


def task_scores(
    model: MultiTaskModel, ids: Tensor, mask: Tensor, segments: Any, task: str
) -> Tensor:
    """[B, C] scores of one task.

    Args:
        model: on the device of the rest.
        ids: [B, S] int64.
        mask: [B, S] bool, true on tokens.
        segments: [B, S] int64 token types of pairs, or None; a body that takes none gets none.
        task: whose head speaks.

    Raises:
        ModelError: there is no such head, or a token type has no row.
    """
    if not model.reads_segments:
        segments = None
    known = getattr(model.config.text_config, "type_vocab_size", None)
    if segments is not None and known is not None and int(segments.max()) >= known:
        raise ModelError(
            f"a model with {known} token types reads a stream that has type "
            f"{int(segments.max())}; set config.type_vocab_size, or dump with a tokenizer of the "
            "model's kind"
        )
    out = model(input_ids=ids, attention_mask=mask.long(), token_type_ids=segments, task=task)
    scores: Tensor = out.logits
    return scores


def is_own(config: Any) -> bool:
    """Whether the config of a body is of one of `OWN_BODIES`."""
    return config.model_type in OWN_BODIES


def body_config(tree: Mapping[str, Any]) -> Any:
    """The config of a body from its plain values.

    Args:
        tree: with `model_type`.
    """
    model_type = tree["model_type"]
    keys = {key: value for key, value in tree.items() if key != "model_type"}
    if model_type in OWN_BODIES:
        return _own(model_type, 1)(**keys)
    return AutoConfig.for_model(model_type, **keys)


def make_body(config: Any) -> nn.Module:
    """A body, with weights of its own kind's initialisation.

    Args:
        config: of transformers, or of one of `OWN_BODIES`.
    """
    if is_own(config):
        made: nn.Module = _own(config.model_type, 2)(config)
        return made
    body: nn.Module = AutoModel.from_config(config, **without_pooler(config))
    return body


def without_pooler(config: Any) -> dict[str, Any]:
    """Options that leave out a layer over the first token that heads do not read."""
    from transformers import MODEL_MAPPING

    known = inspect.signature(MODEL_MAPPING[type(config)]).parameters  # type: ignore[arg-type]
    return {"add_pooling_layer": False} if "add_pooling_layer" in known else {}


def with_tasks(model: MultiTaskModel, tasks: Mapping[str, Task]) -> MultiTaskModel:
    """A model with the heads of some tasks: its own where it has them, else new ones.

    Args:
        model: whose body is taken over.
        tasks: in the order that the new one has them.
    """
    tree = model.config.to_dict() | {"tasks": {name: one.to_dict() for name, one in tasks.items()}}
    made = MultiTaskModel(MultiTaskConfig(**{k: v for k, v in tree.items() if k != "model_type"}))
    made.body.load_state_dict(model.body.state_dict())
    for name in tasks:
        if name in model.heads:
            made.heads[name].load_state_dict(model.heads[name].state_dict())
    return made


def _own(model_type: str, which: int) -> Any:
    """The config class (1) or the body class (2) of a body that is not of transformers."""
    found = OWN_BODIES[model_type]
    return getattr(importlib.import_module(found[0]), found[which])


AutoConfig.register(MultiTaskConfig.model_type, MultiTaskConfig, exist_ok=True)
