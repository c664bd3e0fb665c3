"""A student being trained: one step, one validation, and what they need."""

# B batch, S source positions, T target positions, N target tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.corpus import read_corpus
from kdcache.errors import ModelError, RecipeError, TrainingError
from kdcache.formats.cache import Cache
from kdcache.formats.keyed import text_key
from kdcache.models import load_tokenizer, resolve_device
from kdcache.recipe import TrainSection
from kdcache.train.batch import Batch
from kdcache.train.checkpoint import RunState, publish
from kdcache.train.distillation import Distillation
from kdcache.train.mix import batch_stream
from kdcache.train.objective import Moment, Objective
from kdcache.train.optimizer import build_optimizer
from kdcache.train.order import ORDER_VERSION
from kdcache.train.schedule import learning_rate
from kdcache.train.stream import BatchStream, GlobalBatch
from kdcache.train.student import (
    build_student,
    max_positions,
    save_student,
)
from kdcache.train.validate import TokenPairs, encode, score_tokens
from kdcache.train.vocabulary import KnownIds, check_tokenizer, tokenizer_files

#: Steps whose losses may wait on an accelerator before the host reads them.
MAX_PENDING = 64


class Trainer:
    """A student being trained.

    Args:
        section: the recipe's train section, with a student.
        cache: an open cache, or several in the order of the recipe.

    Raises:
        RecipeError: the objective does not fit the cache.
        ModelError: the student cannot be built, or there is no such device.
    """

    def __init__(self, section: TrainSection, cache: Cache | Sequence[Cache]) -> None:
        assert section.student is not None
        self.caches = [cache] if isinstance(cache, Cache) else list(cache)
        self.section, self.cache = section, self.caches[0]
        cache = self.cache
        self.device = resolve_device(section.device)
        streams = [cache.stream(section.source), cache.stream(section.target)]
        self.objective = Objective(section.objective, cache.signals, section.source, section.target)
        for other in self.caches[1:]:
            Objective(section.objective, other.signals, section.source, section.target)
        teachers = [record.vocab_size for record in self.objective.soft_labels.values()]
        tokenizer = streams[1].tokenizer
        own = check_tokenizer(section.student, cache, tokenizer)
        self.model = build_student(
            section.student,
            cache.tokenizer(tokenizer),
            max([*(stream.vocab_size for stream in streams), *teachers]),
            section.seed,
        ).to(self.device)
        unknown = section.student.path is not None and not own
        self.ids = KnownIds.of(self.model, cache, section.source, section.target, unknown)
        self.tokenizer = tokenizer
        self.tokenizer_files = tokenizer_files(cache, self.ids, own)
        self.distillation = Distillation(self.model, self.objective, section.seed).to(self.device)
        self.max_positions = max_positions(self.model)
        self.optimizer = build_optimizer(section.optimizer, self.distillation, self.device)
        self.parameters = [p for p in self.distillation.parameters() if p.requires_grad]
        self.stream = batch_stream(
            self.caches,
            [share.weight for share in section.caches] or None,
            [section.source, section.target],
            self.objective.signals,
            section.batch_tokens,
            section.seed,
            section.window_shards,
            accumulate=section.accumulate,
            max_epochs=section.max_epochs,
            pin=self.device.type == "cuda",
            while_dumping=section.while_dumping,
            layers=self.distillation.layers,
        )
        self.state = RunState(order=self.stream.state)
        self.total_steps = section.max_steps
        if section.max_epochs is not None:
            assert isinstance(self.stream, BatchStream)  # or the recipe is refused
            self.total_steps = self.stream.count_batches(section.max_epochs, section.max_steps)
        self.dev = self._dev_pairs()
        self._pending: list[tuple[int, np.ndarray, Tensor]] = []

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
        """One optimiser step."""
        section, number = self.section, self.state.step + 1
        # Dropout is a function of seed and step alone, so a resumed run repeats it.
        torch.manual_seed(text_key(section.seed, "dropout", number) >> 1)
        values = self.backward(batch)
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters, section.clip_norm if section.clip_norm is not None else math.inf
        )
        rate = learning_rate(section.schedule, section.optimizer.lr, number, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step, self.state.order = number, batch.state
        self.state.tokens += batch.num_tokens
        measured = torch.cat([values, norm.detach().to(values.dtype).reshape(1)])
        self._pending.append((number, batch.rows, measured))
        if self.device.type == "cpu" or len(self._pending) >= MAX_PENDING:
            self.settle()

    def backward(self, batch: GlobalBatch) -> Tensor:
        """Add the gradients of a global batch.

        Returns:
            [1 + terms] detached: the loss, then each term before its weight, per target token
            of the global batch.
        """
        values: Tensor | None = None
        moments = self.objective.at(self.state.step + 1, self.total_steps)
        for micro in batch.micro:
            total, parts = self._losses(micro, batch.counts, moments)
            total.backward()  # type: ignore[no-untyped-call]
            found = torch.cat([total.detach().reshape(1), parts])
            values = found if values is None else values + found
        assert values is not None
        return values

    def validate(self) -> dict[str, float]:
        """Scores on the development set, sources right and shuffled."""
        assert self.dev is not None
        with self._autocast():
            plain = score_tokens(self.model, self.dev, self.device, self.section.batch_tokens)
            other = score_tokens(
                self.model, self.dev.shuffled(), self.device, self.section.batch_tokens
            )
        return {
            "dev_loss": plain.loss_nats,
            "dev_loss_shuffled": other.loss_nats,
            "dev_accuracy": plain.accuracy,
        }

    def _losses(
        self, micro: Batch, counts: Mapping[str, int], moments: Sequence[Moment]
    ) -> tuple[Tensor, Tensor]:
        """Weighted total and unweighted terms of one micro-batch."""
        longest = max(tokens.ids.shape[1] for tokens in micro.streams.values())
        if self.max_positions is not None and longest > self.max_positions:
            raise ModelError(
                f"student: takes {self.max_positions} positions, a sample of the cache has "
                f"{longest} tokens; set train.student.config.max_position_embeddings, or dump "
                f"with dump.max_tokens {self.max_positions}"
            )
        micro = self.ids.checked(micro).to(self.device)
        with self._autocast():
            total, parts = self.distillation(micro, counts, moments)
        return total, parts

    def _autocast(self) -> Any:
        """bfloat16 where the recipe says so."""
        precision = self.section.precision
        if precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def settle(self) -> None:
        """Read the losses of the last steps off the device, and stop if one is not finite."""
        if not self._pending:
            return
        found = torch.stack([measured for _, _, measured in self._pending]).cpu().double()
        for (step, rows, _), values in zip(self._pending, found.tolist(), strict=True):
            if not (math.isfinite(values[0]) and math.isfinite(values[-1])):
                shown = ", ".join(str(row) for row in rows[:8].tolist())
                raise TrainingError(
                    f"step {step}: loss is {values[0]} and gradient norm {values[-1]}; the batch "
                    f"holds {len(rows)} samples, corpus rows {shown}"
                    f"{', ...' if len(rows) > 8 else ''}; lower train.optimizer.lr, or set "
                    "train.precision float32"
                )
        state = self.state
        sums = state.sums or [0.0] * found.shape[1]
        state.sums = [a + b for a, b in zip(sums, found.sum(0).tolist(), strict=True)]
        state.num_summed += len(found)
        self._pending = []

    def _dev_pairs(self) -> TokenPairs | None:
        """The development set under the cache's tokenizers."""
        section = self.section.validation
        if section.corpus is None:
            return None
        sides = []
        streams = [self.cache.stream(self.section.source), self.cache.stream(self.section.target)]
        missing = [s.field for s in streams if s.field not in section.corpus.fields]
        if missing:
            raise RecipeError(
                f"train.validation.corpus.fields has {sorted(section.corpus.fields)}; the cache's "
                f"streams read {', '.join(missing)} too"
            )
        batches = list(read_corpus(section.corpus))
        for stream in streams:
            directory = self.cache.tokenizer_dir(stream.tokenizer)
            if stream.tokenizer == self.tokenizer:
                directory = self.tokenizer_files[0].parent
            tokenizer = load_tokenizer(directory)
            texts = [text for batch in batches for text in batch.fields[stream.field]]
            sides.append(encode(tokenizer, texts, stream.target))
        pairs = TokenPairs(*sides).within(self.max_positions)
        if not len(pairs):
            raise RecipeError("train.validation.corpus: no row fits the student's positions")
        pairs.check_ids(self.model)
        return pairs.limited(section.limit_tokens)

    def save_model(self, out: Path) -> None:
        """Write the student as it is now."""
        publish(out, lambda folder: save_student(self.model, self.tokenizer_files, folder))
