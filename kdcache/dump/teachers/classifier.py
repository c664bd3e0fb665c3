"""Teachers that give a text classes or scores."""

# B batch, T positions, C classes

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcache.dump.batches import Batch
from kdcache.dump.teacher import Problem
from kdcache.dump.teachers.encoder import EncoderTeacher
from kdcache.errors import ModelError
from kdcache.formats.signals import TeacherRecord


class ClassifierTeacher(EncoderTeacher):
    """A sequence classification model, or a regressor."""

    kind = "classifier"
    signals = ("classes", "hidden", "attention")

    def __init__(
        self, model: Any, record: TeacherRecord, device: torch.device, has_attention: bool = True
    ) -> None:
        super().__init__(model, record, device, has_attention)
        names = model.config.id2label
        self.labels = [str(names[number]) for number in range(model.config.num_labels)]
        self.problem = problem_of(model.config)

    @torch.inference_mode()
    def scores(self, batch: Batch) -> Tensor:
        """[B, C] class logits or scores, see `Teacher.scores`."""
        groups = self._groups(batch)
        found = [self._scores(batch.select(rows)) for rows in groups]
        scores = torch.empty_like(torch.cat(found))
        scores[torch.cat(groups)] = torch.cat(found)
        return scores

    def _groups(self, batch: Batch) -> list[Tensor]:
        """Rows that go together: BART's kind reads the last end token, as many in every row."""
        everything = torch.arange(len(batch.ids), device=self.device)
        if self.pads_by_id and self._free_id(batch) is None:
            return list(torch.split(everything, 1))
        if not self.model.config.is_encoder_decoder:
            return [everything]
        end = self.model.config.eos_token_id
        ends = (batch.ids.eq(end) & batch.mask).sum(1)
        if not ends.all():
            raise ModelError(
                f"{self.record.path}: a text has no end token (id {end}), which this classifier "
                "reads; use the teacher's own tokenizer"
            )
        return [everything[ends == count] for count in sorted(set(ends.tolist()))]

    def _scores(self, batch: Batch) -> Tensor:
        """[B, C] of rows that go together."""
        free = self._free_id(batch) if self.pads_by_id else None
        if free is not None:
            batch = replace(batch, ids=batch.ids.masked_fill(~batch.mask, free))
        elif self.pads_by_id:
            batch = Batch(batch.ids[:, batch.mask[0]], batch.mask[:, batch.mask[0]])
        config = self.model.config.get_text_config()
        stands = getattr(config, "pad_token_id", None)
        config.pad_token_id = stands if free is None else free
        try:
            scores: Tensor = self.model(**self.inputs(self.model, batch)).logits
        finally:
            config.pad_token_id = stands
        return scores.to(self.device)

    @property
    def pads_by_id(self) -> bool:
        """Whether padding has to be told from a text's last token, and the config has no id.

        A decoder-only classifier reads the last token that is not the padding id. Without one
        transformers takes a single text, and its last token; an id that no text of a batch has
        gives the same for many.
        """
        config = self.model.config.get_text_config()
        return self.sides == ("decoder",) and config.pad_token_id is None

    def _free_id(self, batch: Batch) -> int | None:
        """An id that stands nowhere in a batch, if there is one."""
        known = self.model.get_input_embeddings().weight.shape[0]
        counts = torch.bincount(batch.ids[batch.mask], minlength=known)
        return None if counts.all() else int(counts.argmin())


def problem_of(config: Any) -> Problem:
    """What the scores of a config's head are."""
    if config.num_labels == 1 or config.problem_type == "regression":
        return "regression"
    if config.problem_type == "multi_label_classification":
        return "multi_label"
    return "classification"
