"""The teacher: a transformers encoder-decoder, run forward once and never trained."""

# B batch, S source positions, T target positions, N valid target positions, V vocabulary

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from kdcache.errors import ModelError
from kdcache.formats.manifest import TeacherRecord
from kdcache.models import (
    model_directory,
    output_projection,
    project_first,
    project_only,
    quiet_transformers,
    resolve_device,
    shift_right,
)
from kdcache.recipe import TeacherSection

#: Keys of a config that name position limits, one name per family.
POSITION_KEYS = (
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_source_positions",
    "max_target_positions",
)
#: Keys of config.json that say how it was saved, not what the model is.
VOLATILE_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


class Teacher:
    """A loaded teacher.

    Attributes:
        model: the transformers model, in eval mode on `device`.
        record: what identifies it.
        vocab_size: V, rows of its output.
        max_positions: longest source or target it takes; None for no limit.
    """

    def __init__(self, model: Any, record: TeacherRecord, device: torch.device) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.record = record
        self.device = device
        output = model.get_output_embeddings()
        if output is None:
            raise ModelError(f"{record.path}: {type(model).__name__} has no output projection")
        self.vocab_size = int(output.weight.shape[0])
        self.max_positions = max_positions(model.config)
        pad = model.config.pad_token_id
        self.pad_id = 0 if pad is None else int(pad)

    @classmethod
    def load(cls, section: TeacherSection) -> Teacher:
        """Load from a transformers directory or a hub id; only safetensors, no remote code.

        Raises:
            ModelError: it is not there, has no safetensors, or is no encoder-decoder.
        """
        from transformers import AutoModelForSeq2SeqLM

        quiet_transformers()
        device = resolve_device(section.device)
        directory, revision = model_directory(section.path, section.revision)
        weights = weight_files(directory, section.path)
        options: dict[str, Any] = {}
        if section.attention is not None:
            options["attn_implementation"] = section.attention
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(
                directory,
                dtype=section.dtype,
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
        except Exception as error:
            # transformers raises whatever the model's class raises; one line serves for all.
            raise ModelError(
                f"{section.path}: transformers cannot load it as an encoder-decoder: "
                f"{str(error).strip().split(chr(10))[0] or type(error).__name__}"
            ) from None
        record = TeacherRecord(
            path=section.path,
            revision=revision,
            digest=_digest_weights(weights),
            config_digest=_digest_config(directory),
            model_type=model.config.model_type,
            dtype=str(model.dtype).removeprefix("torch."),
        )
        return cls(model, record, device)

    @torch.inference_mode()
    def logits(
        self, src_ids: Tensor, src_mask: Tensor, labels: Tensor, label_mask: Tensor
    ) -> Tensor:
        """Teacher-forced logits of the valid target positions alone.

        Args:
            src_ids: [B, S] int64, padded with any valid id.
            src_mask: [B, S] bool.
            labels: [B, T] int64, padded on the right with anything.
            label_mask: [B, T] bool, N of them true.

        Returns:
            [N, V] in the model's dtype, the first sample's positions first.
        """
        with project_only(self.model, label_mask):
            return self._forward(src_ids, src_mask, labels, label_mask)

    def logits_in_pieces(
        self,
        src_ids: Tensor,
        src_mask: Tensor,
        labels: Tensor,
        label_mask: Tensor,
        piece_entries: int,
    ) -> Iterator[Tensor]:
        """`logits`, some positions at a time, so that [N, V] never has to fit.

        Args:
            src_ids: as in `logits`.
            src_mask: as in `logits`.
            labels: as in `logits`.
            label_mask: as in `logits`.
            piece_entries: most logits in one piece, if that is a row or more.

        Yields:
            [R, V] in the model's dtype, consecutive positions.
        """
        rows = max(1, piece_entries // self.vocab_size)
        with torch.inference_mode():
            with project_first(self.model, label_mask) as kept:
                first = self._forward(src_ids, src_mask, labels, label_mask)  # [1, V]
            (hidden,) = kept  # [N, D]
            if torch.equal(self._project(hidden[:1]), first):
                yield from map(self._project, torch.split(hidden, rows))
                return
        # The model does more to its logits than is known here: let it do so itself.
        yield from torch.split(self.logits(src_ids, src_mask, labels, label_mask), rows)

    def _forward(
        self, src_ids: Tensor, src_mask: Tensor, labels: Tensor, label_mask: Tensor
    ) -> Tensor:
        """The model's logits, of whatever positions a hook lets through."""
        logits: Tensor = self.model(
            input_ids=src_ids,
            attention_mask=src_mask.to(torch.long),
            decoder_input_ids=self.decoder_inputs(labels, label_mask),
            use_cache=False,
        ).logits
        return logits

    def _project(self, hidden: Tensor) -> Tensor:
        """[R, D] inputs of the output projection to [R, V] logits."""
        logits: Tensor = output_projection(self.model)(hidden)
        bias = getattr(self.model, "final_logits_bias", None)  # of Marian and BART
        return logits if bias is None else logits.add_(bias)

    def decoder_inputs(self, labels: Tensor, label_mask: Tensor) -> Tensor:
        """[B, T] labels shifted right, the way the model itself does it."""
        masked = labels.masked_fill(~label_mask, -100)
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            inputs: Tensor = shift(labels=masked)
            return inputs
        start = self.model.config.decoder_start_token_id
        if start is None:
            raise ModelError(f"{self.record.path}: its config has no decoder_start_token_id")
        return shift_right(masked, self.pad_id, int(start))


def max_positions(config: Any) -> int | None:
    """Longest input that a transformers config allows; None where positions are relative."""
    limits = [getattr(config, key, None) for key in POSITION_KEYS]
    return min((int(limit) for limit in limits if limit), default=None)


def teacher_positions(section: TeacherSection) -> int | None:
    """`max_positions` of a teacher that is not loaded.

    Raises:
        ModelError: its config cannot be read.
    """
    from transformers import AutoConfig

    quiet_transformers()
    directory, _ = model_directory(section.path, section.revision)
    try:
        return max_positions(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{section.path}: cannot read its config.json ({reason})") from None


def weight_files(directory: Path, path: str) -> list[Path]:
    """The safetensors files of a model directory, in order.

    Raises:
        ModelError: there are none.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [directory / name for name in names]
    raise ModelError(
        f"{path}: found no model.safetensors; save the model with save_pretrained of a recent "
        f"transformers (pickled weights are never read)"
    )


def _digest_weights(files: list[Path]) -> str:
    """Digest over the bytes of all weights."""
    hasher = xxhash.xxh3_128()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                hasher.update(block)
    return hasher.hexdigest()


def _digest_config(directory: Path) -> str:
    """Digest over config.json by content."""
    config = json.loads((directory / "config.json").read_bytes())
    kept = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True).encode())
