"""transformers' Trainer on batches of a cache: a collator, and a mixin for the losses.

The recipe's terms over the vocabulary are computed by the module that `kdcache train` uses. What
transformers does as ever: optimiser, schedule, clipping, precision, DDP, logging, checkpoints.
"""

# B samples, S source positions, T target positions

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import ExportableState, TrainerCallback

from kdcache.errors import ModelError, RecipeError, TrainingError
from kdcache.recipe import CrossEntropyTerm, MaskedKLTerm, SoftTerm, Term, parse_recipe
from kdcache.train.batches.batches import Batches, MicroBatches
from kdcache.train.batches.hypotheses import with_hypotheses
from kdcache.train.batches.stream import GlobalBatch
from kdcache.train.losses.objective import Objective
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.student import max_positions
from kdcache.train.students.vocabulary import KnownIds

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the class that the mixin stands before; accelerate is needed by that alone

#: Under which a mapping of the collator carries what it was made of.
STEP = "kdcache_step"
#: What transformers' losses leave out.
IGNORED = -100


class DistillationCollator:
    """Micro-batches as the mappings that transformers' Trainer hands about.

    Args:
        source: name of the stream that the encoder reads.
        target: name of the stream that is predicted.
    """

    def __init__(self, source: str, target: str) -> None:
        self.source, self.target = source, target

    def __call__(self, step: GlobalBatch) -> dict[str, Any]:
        """One item of `MicroBatches`.

        Returns:
            input_ids [B, S] and attention_mask [B, S], int64; labels [B, T] int64, -100 outside
            the tokens; and the item itself, for `DistillationMixin`. Of no samples B and S are 0.
        """
        if step.micro:
            (batch,) = step.micro
            source, target = batch.streams[self.source], batch.streams[self.target]
            ids, mask = source.ids, source.mask.long()
            labels = target.ids.masked_fill(~target.mask, IGNORED)
        else:
            ids = mask = labels = torch.zeros((0, 0), dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, STEP: step}


class OrderCallback(TrainerCallback, ExportableState):
    """Keeps where the batches stand in trainer_state.json, and puts them back there.

    Attributes:
        order: state of the batches that a checkpoint of transformers held; None without one.
    """

    def __init__(self) -> None:
        self.order: dict[str, Any] | None = None
        self._dataset: MicroBatches | None = None

    def state(self) -> dict[str, Any]:
        """What transformers writes into the checkpoint."""
        order = None if self._dataset is None else self._dataset.batches.state_dict()
        return {"args": {}, "attributes": {"order": order}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where the checkpoint stood, if the run was resumed from one.

        Raises:
            TrainingError: it was written without the mixin.
            IdentityError: it is of other batches, with both sides.
        """
        dataset = kwargs["train_dataloader"].dataset
        assert isinstance(dataset, MicroBatches)
        self._dataset = dataset
        if not state.global_step:
            return
        found = state.stateful_callbacks.get(type(self).__name__)
        order = found.get("attributes", {}).get("order") if isinstance(found, dict) else None
        if order is None:
            raise TrainingError(
                f"trainer_state.json: step {state.global_step} says nothing of where the batches "
                "stood; resume from a checkpoint that DistillationMixin wrote, or start a new run"
            )
        dataset.batches.load_state_dict(order)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count epochs of the cache: the Trainer knows none of an iterable."""
        if self._dataset is not None:
            state.epoch = float(self._dataset.epoch)


class DistillationMixin(_Trainer):
    """Trains on batches of a cache with a recipe's terms; stands before a Trainer.

    `class Distiller(DistillationMixin, Seq2SeqTrainer): ...` takes what Seq2SeqTrainer takes. Every
    optimiser step is computed from one global batch, whatever per_device_train_batch_size says;
    gradient_accumulation_steps must be the batches' `accumulate`, and their rank and world those
    of the process. A run that is resumed goes on with the batch after the last one that counted.
    Evaluation, with an eval_dataset and a data_collator of one's own, is transformers' own.

    Args:
        args: of the Trainer.
        objective: the terms, as a recipe has them under train.objective: cross_entropy and those
            over cached labels.
        kwargs: of the Trainer; train_dataset is a `Batches` with a source and a target stream.

    Raises:
        RecipeError: the terms are wrong, or do not fit the cache.
        ModelError: the student lacks positions or ids that the batches have.
        TrainingError: the batches do not fit the arguments, or a term learns parameters of its own.
    """

    # The losses are shares of the mean over the global batch: nothing is left to divide by.
    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, objective: Sequence[Mapping[str, Any] | Term], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        batches: Any = self.train_dataset
        if not isinstance(batches, Batches) or len(batches.streams) != 2:
            found = batches.streams if isinstance(batches, Batches) else type(batches).__name__
            raise TrainingError(
                f"train_dataset: is {found}; expected kdcache.batches(...) of two streams, the "
                "source and the target"
            )
        self._batches = batches
        self._check_arguments()
        source, target = batches.streams
        self.collator: Any = DistillationCollator(source, target)
        self.objective: Objective = _objective(objective, batches)
        self._distillation: Distillation | None = None
        # Resumed batches begin where they stopped: nothing is to be read and thrown away.
        self.args.ignore_data_skip = True
        self.add_callback(OrderCallback())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches in the order of the cache; no sampler, workers or sharding."""
        return DataLoader(
            self._batches.micro_batches(),
            batch_size=None,
            collate_fn=self.collator,
            # Of its own: a loader draws a number whenever it starts, and a resumed run starts more
            # often. It would see another dropout.
            generator=torch.Generator(),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As the Trainer's.

        Raises:
            TrainingError: the data set is of batches.
        """
        found = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(found, Batches):
            raise TrainingError(
                "eval_dataset: batches of a cache are for training, they shuffle and go on; give a "
                "data set of tokens with a data_collator"
            )
        return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and its target tokens on all ranks."""
        samples = list(islice(epoch_iterator, num_batches))
        return samples, samples[0][STEP].num_tokens if samples else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the objective's mean over its global batch.

        What does not come from a cache, as in evaluation, gets transformers' own loss.

        Args:
            model: the student, as accelerate wrapped it.
            inputs: of the collator.
            return_outputs: whether the model's outputs are wanted too.
            num_items_in_batch: passed on; the counts of the batch say more.
        """
        step: GlobalBatch | None = inputs.get(STEP)
        if step is None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        student = self.accelerator.unwrap_model(model)
        if self._distillation is None or self._distillation.student is not student:
            self._begin(student)
        with self.accelerator.autocast():
            loss = _inside(model, student, lambda: self._share(student, step))
        # DDP takes the mean over the ranks, and shares add up.
        return loss * self.args.world_size

    def _share(self, student: Any, step: GlobalBatch) -> Tensor:
        """The weighted total of the terms over an item."""
        if not step.micro:  # every rank has to give every parameter a gradient
            return torch.stack([one.sum() * 0.0 for one in student.parameters()]).sum()
        assert self._distillation is not None
        (batch,) = step.micro
        batch = with_hypotheses(batch, self.objective.hypotheses, self._positions)
        longest = max(tokens.ids.shape[1] for tokens in batch.streams.values())
        if self._positions is not None and longest > self._positions:
            raise ModelError(
                f"student: takes {self._positions} positions, a sample of the cache has {longest} "
                "tokens; take a student with more, or dump with dump.max_tokens "
                f"{self._positions}"
            )
        batch = self._ids.checked(batch).to(self.args.device)
        moments = self.objective.at(self.state.global_step + 1, self.state.max_steps)
        total: Tensor = self._distillation(batch, step.counts, moments)[0]
        return total

    def _begin(self, student: Any) -> None:
        """Look at a student that is new here."""
        source, target = self._batches.streams
        self._distillation = Distillation(student, self.objective, self.args.seed)
        self._ids = KnownIds.of(student, self._batches.caches[0], source, target, False)
        self._positions = max_positions(student)

    def _check_arguments(self) -> None:
        """Refuse what would train on other batches, or not at all."""
        args, batches = self.args, self._batches
        pairs = [
            ("gradient_accumulation_steps", args.gradient_accumulation_steps, batches.accumulate),
            ("rank", args.process_index, batches.rank),
            ("world", args.world_size, batches.world),
        ]
        for name, ours, theirs in pairs:
            if ours != theirs:
                option = "accumulate" if name.startswith("gradient") else name
                raise TrainingError(
                    f"training arguments: {name} is {ours}, the batches were made with {option} "
                    f"{theirs}; give kdcache.batches {option}={ours}"
                )
        refused = {
            "several GPUs in one process": args.n_gpu > 1,
            "torch_compile": args.torch_compile,
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
        }
        for name, found in refused.items():
            if found:
                raise TrainingError(
                    f"training arguments: {name} cannot go with DistillationMixin; start a process "
                    "for each GPU with torchrun (DDP), or use `kdcache train`"
                )


def _objective(terms: Sequence[Mapping[str, Any] | Term], batches: Batches) -> Objective:
    """The objective over what the batches hold."""
    tree = {"name": "objective", "train": {"objective": list(terms)}}
    section = parse_recipe(tree, where="objective").train
    source, target = batches.streams
    made = [Objective(section.objective, one.signals, source, target) for one in batches.caches]
    first = made[0]
    for path, term in zip(first.paths, first.terms, strict=True):
        if isinstance(term, MaskedKLTerm) or not isinstance(term, CrossEntropyTerm | SoftTerm):
            raise RecipeError(
                f"{path}: {term.loss} learns parameters beside the student, which a Trainer would "
                "neither save nor load; train it with `kdcache train`"
            )
    if missing := sorted(set(first.signals) - set(batches.signals)):
        raise TrainingError(
            f"objective: needs signals {missing}, the batches hold {batches.signals}; give "
            f"kdcache.batches signals={first.signals}"
        )
    return first


def _inside(model: nn.Module, student: Any, compute: Callable[[], Tensor]) -> Tensor:
    """What a function gives within the forward pass of a wrapper, where DDP sees it.

    Args:
        model: the student or a wrapper of it.
        student: within it.
        compute: calls the student.
    """
    if model is student:
        return compute()
    own = student.__dict__.get("forward")  # an instance may have one, as accelerate's autocast does

    def restore() -> None:
        if own is None:
            student.__dict__.pop("forward", None)
        else:
            student.forward = own

    def instead(_: None) -> Tensor:
        restore()
        return compute()

    student.forward = instead
    try:
        found: Tensor = model(None)  # DDP looks for an argument to move
    finally:
        restore()
    return found
