"""A student being trained: one step, one validation, and what they need."""

# B batch, S source positions, T target positions, N target tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler

from kdcache.errors import ModelError, RecipeError, TrainingError
from kdcache.formats.cache import Cache
from kdcache.formats.keyed import text_key
from kdcache.models.loading import resolve_device
from kdcache.recipe import StudentSection, TrainSection
from kdcache.train.batches.batch import Batch
from kdcache.train.batches.hypotheses import with_hypotheses
from kdcache.train.batches.mix import MixedStream, batch_stream
from kdcache.train.batches.order import ORDER_VERSION
from kdcache.train.batches.stream import BatchStream, GlobalBatch
from kdcache.train.families import FAMILIES, Setting
from kdcache.train.families.family import Development
from kdcache.train.losses.label_signals import check_text
from kdcache.train.losses.objective import Moment
from kdcache.train.losses.schedule import learning_rate
from kdcache.train.losses.score_signals import signals_for
from kdcache.train.runs.checkpoint import RunState, publish, tied_weights
from kdcache.train.runs.gate import Gate
from kdcache.train.runs.memory import memory_errors
from kdcache.train.runs.optimizer import build_optimizer
from kdcache.train.runs.parallel import (
    Ranks,
    is_sharded,
    readable,
    shard,
    whole,
    without_exchange,
    wrapped,
)
from kdcache.train.runs.shared import Shared
from kdcache.train.students.student import (
    checkpoint_activations,
    max_positions,
    save_student,
)
from kdcache.train.students.two_tokenizers import (
    check_source_tokenizer,
    save_source_tokenizer,
    source_files,
)
from kdcache.train.students.vocabulary import KnownIds, check_tokenizer, tokenizer_files

#: Below this loss scale gradients that are not finite are no matter of float16.
MIN_SCALE = 1.0
#: Steps whose losses may wait on an accelerator before the host reads them.
MAX_PENDING = 64


class Trainer:
    """A student being trained.

    Args:
        section: the recipe's train section, with a student.
        cache: an open cache, or several in the order of the recipe.
        ranks: this process and those that train with it.
        shared: what earlier runs of this process left for this one.

    Raises:
        RecipeError: the objective does not fit the cache.
        ModelError: the student cannot be built, or there is no such device.
    """

    def __init__(
        self,
        section: TrainSection,
        cache: Cache | Sequence[Cache],
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
        shared: Shared | None = None,
    ) -> None:
        assert section.student is not None
        if section.while_dumping and ranks.world > 1:
            raise RecipeError(
                f"train.while_dumping is set and {ranks.world} ranks train, which may see other "
                "shards than each other; train with one, or wait for the dump"
            )
        self.ranks = ranks
        self.caches = [cache] if isinstance(cache, Cache) else list(cache)
        self.section, self.cache = section, self.caches[0]
        cache = self.cache
        self.device = resolve_device(section.device)
        self.family = FAMILIES[section.student.kind]
        section = self.section = self.family.completed(section, self.caches)
        assert section.student is not None
        if section.gate is not None and section.student.kind != "encoder_decoder":
            raise RecipeError("train.gate: goes with a student of kind encoder_decoder alone")
        self.objective = self.family.objective(section, signals_for(cache, section.source))
        for other in self.caches[1:]:
            self.family.objective(section, signals_for(other, section.source))
        for each in self.caches if self.objective.over_references else ():
            check_text(each, section.target)
        self.tokenizer = cache.stream(section.target).tokenizer
        own = check_tokenizer(section.student, cache, self.tokenizer)
        sides = (section.source, section.target)
        own_source = check_source_tokenizer(section.student, cache, *sides)
        self.model = self._build(section.student)
        unknown = section.student.path is not None and not own
        self.ids = KnownIds.of(self.model, cache, *sides, unknown)
        self.tokenizer_files = tokenizer_files(cache, self.ids, own)
        self.source_files = source_files(cache, self.ids, own_source)
        self.max_positions = max_positions(self.model)
        self.distillation = self.family.distillation(self.model, self.objective, section.seed)
        if section.parallel == "fsdp" and ranks.world > 1:
            shard(self.distillation, self.model, self.device)  # may not fit the device before
        self._module = wrapped(self.distillation.to(self.device), ranks)
        parts = (self.objective, self.distillation, self.model, ranks)
        self.gate = None if section.gate is None else Gate(section, *parts)
        self.optimizer = build_optimizer(section.optimizer, self.distillation, self.device)
        self.parameters = [p for p in self.distillation.parameters() if p.requires_grad]
        self.scaler = GradScaler(self.device.type, enabled=section.precision == "float16")
        self.stream = self._open_stream()
        self.state = RunState(order=self.stream.state)
        self.total_steps = section.max_steps
        if section.max_epochs is not None:
            assert isinstance(self.stream, BatchStream)  # or the recipe is refused
            self.total_steps = self.stream.count_batches(section.max_epochs, section.max_steps)
        self.dev = self._development(shared or Shared())
        self._pending: list[_Measured] = []

    def _build(self, student: StudentSection) -> Any:
        """The student, over all ids that the streams and teachers have."""
        section, cache = self.section, self.cache
        streams = [cache.stream(section.source), cache.stream(section.target)]
        source, target = (cache.tokenizer(stream.tokenizer) for stream in streams)
        teachers = [record.vocab_size for record in self.objective.soft_labels.values()]
        vocab_size = max([streams[1].vocab_size, *teachers])
        other = None if source.digest == target.digest else source
        parts = (target, vocab_size, section.seed, other)
        model = self.family.build(student, self.objective, *parts)
        if section.activation_checkpointing:
            checkpoint_activations(model)
        return model

    def _open_stream(self) -> BatchStream | MixedStream:
        """This rank's share of the global batches."""
        section = self.section
        return batch_stream(
            self.caches,
            [share.weight for share in section.caches] or None,
            list(dict.fromkeys([section.source, section.target])),
            self.objective.signals,
            section.batch_tokens,
            section.seed,
            section.window_shards,
            accumulate=section.accumulate,
            max_epochs=section.max_epochs,
            pin=self.device.type == "cuda",
            while_dumping=section.while_dumping,
            layers=self.distillation.layers,
            gold=self.objective.gold,
            tasks=self.objective.tasks,
            replicas=section.replicas,
            hypotheses=self.objective.hypotheses.values(),
            rank=self.ranks.rank,
            world=self.ranks.world,
        )

    def identity(self) -> dict[str, Any]:
        """What a run is of, beside its recipe: a resumed one must find the same."""
        order = {"order": self.state.order.digest, "order_version": ORDER_VERSION}
        if len(self.caches) == 1:
            return self._identity_of(self.cache) | order
        return {"caches": [self._identity_of(cache) for cache in self.caches]} | order

    def _identity_of(self, cache: Cache) -> dict[str, Any]:
        """What is read from one cache."""
        manifest = cache.manifest
        sides = {"source": self.section.source, "target": self.section.target}
        signals = {name: cache.signal(name).digest for name in self.objective.signals}
        return {
            "corpus": manifest.corpus.digest,
            "streams": {side: manifest.streams[name].digest for side, name in sides.items()},
            "signals": signals,
        }

    def step(self, batch: GlobalBatch) -> None:
        """One optimiser step.

        Raises:
            TrainingError: memory ran out, or a loss so far is not finite.
        """
        section, number = self.section, self.state.step + 1
        # Dropout is a function of seed, step and rank alone, so a resumed run repeats it.
        own = [self.ranks.rank] if self.ranks.world > 1 else []
        torch.manual_seed(text_key(section.seed, "dropout", number, *own) >> 1)
        with memory_errors(number, batch, section):
            values = self.backward(batch)
            norm, skipped = self._move(number)
        self.state.step, self.state.order = number, batch.state
        self.state.tokens += batch.num_tokens
        beside = [norm] if self.gate is None else [self.gate.share, norm]
        beside = [one.detach().to(values).reshape(1) for one in beside]
        numbers = torch.cat([values, *beside])
        self._pending.append(_Measured(number, batch.rows, batch.sample_ids, numbers, skipped))
        if self.device.type == "cpu" or len(self._pending) >= MAX_PENDING:
            self.settle()

    def _move(self, number: int) -> tuple[Tensor, bool]:
        """Clip the gradients and move the weights; the norm, and whether the step was left out."""
        section, scale = self.section, self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters, section.clip_norm if section.clip_norm is not None else math.inf
        )
        norm = whole(norm)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        if not skipped:
            rate = learning_rate(section.schedule, section.optimizer.lr, number, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        elif scale < MIN_SCALE:
            self.settle()  # a loss that is not finite says more
            raise TrainingError(
                f"step {number}: gradients overflow float16 at a loss scale of {scale}, after as "
                "many steps were left out as it took to get there; set train.precision bfloat16 "
                "or float32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        return torch.zeros_like(norm) if skipped else norm, skipped

    def backward(self, batch: GlobalBatch) -> Tensor:
        """Add the gradients of a global batch, those of all ranks on each, times the loss scale.

        Returns:
            [1 + terms] detached, summed over ranks: the loss, then each term before its weight,
            per unit of the global batch.
        """
        found: list[Tensor] = []
        moments = self.objective.at(self.state.step + 1, self.total_steps)
        batches = [*batch.micro, *batch.spare]
        for number, micro in enumerate(batches):
            counts = number < len(batch.micro)
            last = number + 1 == len(batches)
            with nullcontext() if last else without_exchange(self._module):
                totals, parts = self._losses(micro, batch.counts, moments)
                # What exchanges gradients takes their mean.
                factor = self.ranks.world if counts else 0
                scaled = [self.scaler.scale(total) * factor for total in totals]
                if self.gate is None:
                    scaled[0].backward()  # type: ignore[no-untyped-call]
                else:
                    self.gate.backward(*scaled)
            values = torch.cat([torch.stack(totals).detach().sum(0, keepdim=True), parts])
            found.append(values if counts else torch.zeros_like(values))
        if self.gate is not None:
            self.gate.close()
        return self.ranks.summed(torch.stack(found).sum(0) if len(found) > 1 else found[0])

    def validate(self) -> dict[str, float]:
        """Scores on the development set."""
        assert self.dev is not None
        args = (self.device, self.section.batch_tokens, self.ranks)
        with self._autocast(), readable(self.distillation):
            return self.dev.scores(self.model, *args)

    def _losses(
        self, micro: Batch, counts: Mapping[str, int], moments: Sequence[Moment]
    ) -> tuple[list[Tensor], Tensor]:
        """Weighted total, with a gate two of them, and unweighted terms of one micro-batch."""
        micro = with_hypotheses(micro, self.objective.hypotheses, self.max_positions)
        longest = max(tokens.ids.shape[1] for tokens in micro.streams.values())
        if self.max_positions is not None and longest > self.max_positions:
            raise ModelError(
                f"student: takes {self.max_positions} positions, a sample of the cache has "
                f"{longest} tokens; set train.student.config.max_position_embeddings, or dump "
                f"with dump.max_tokens {self.max_positions}"
            )
        micro = self.ids.checked(micro).to(self.device)
        with self._autocast():
            if self.gate is not None:  # exchanges gradients by itself
                return self.distillation.split(micro, counts, self.gate.groups(moments))
            total, parts = self._module(micro, counts, moments)
        return [total], parts

    def _autocast(self) -> Any:
        """Half precision where the recipe says so."""
        precision = self.section.precision
        if precision == "float16":
            return torch.autocast(self.device.type, dtype=torch.float16)
        if precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def settle(self) -> None:
        """Read the losses of the last steps off the device, and stop if one is not finite."""
        if not self._pending:
            return
        found = torch.stack([one.numbers for one in self._pending]).cpu().double()
        for one, values in zip(self._pending, found.tolist(), strict=True):
            if not (math.isfinite(values[0]) and math.isfinite(values[-1])):
                raise TrainingError(
                    f"step {one.step}: loss is {values[0]} and gradient norm {values[-1]}; the "
                    f"batch holds {len(one.rows)} samples, corpus rows "
                    f"{_shown(one.rows.tolist(), 8)}, sample ids "
                    f"{_shown([row.tobytes().hex() for row in one.sample_ids], 4)}; lower "
                    "train.optimizer.lr, or set train.precision float32"
                )
        state = self.state
        sums = state.sums or [0.0] * found.shape[1]
        state.sums = [a + b for a, b in zip(sums, found.sum(0).tolist(), strict=True)]
        state.num_summed += len(found)
        state.num_skipped += sum(one.skipped for one in self._pending)
        self._pending = []

    def _development(self, shared: Shared) -> Development | None:
        """The development set, if the recipe has one."""
        section, student = self.section, self.section.student
        if section.validation.corpus is None:
            return None
        source = self.source_files or self.tokenizer_files
        folders = source[0].parent, self.tokenizer_files[0].parent
        parts = (section, self.cache, self.objective, self.model)
        setting = Setting(*parts, *folders, self.max_positions)
        assert student is not None
        tables = [m for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        depends = [
            *(section.validation.model_dump_json(), section.source, section.target, *folders),
            *(
                self._identity_of(self.cache),
                student.kind,
                student.labels,
                student.task,
                self.max_positions,
            ),
            [table.num_embeddings for table in tables],
        ]
        return shared.development(repr(depends), lambda: self.family.development(setting))

    def save_model(self, out: Path) -> None:
        """Write the student as it is now; all ranks must call, the main one writes."""
        weights: dict[str, Tensor] | None = None
        if is_sharded(self.distillation):
            weights = tied_weights(self.model, self.ranks.main)
        with self.ranks.together():
            if self.ranks.main:
                publish(out, lambda folder: self._write_model(folder, weights))

    def _write_model(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        """Student and tokenizers into an empty folder."""
        save_student(self.model, self.tokenizer_files, folder, weights)
        save_source_tokenizer(self.source_files, folder)


@dataclass(frozen=True)
class _Measured:
    """A step whose numbers may still be on the device.

    They are the loss, the terms, with a gate its share, and the gradient norm.
    """

    step: int
    rows: np.ndarray
    sample_ids: np.ndarray
    numbers: Tensor
    skipped: bool


def _shown(items: Sequence[object], most: int) -> str:
    """The first of them, for a message."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")
