"""What teachers and students share: where a model lies, where it runs, which rows it projects."""

# B batch, T target positions, D hidden, N valid positions, V vocabulary

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.tokenizers import has_tokenizer

#: What a hub download brings along; weights other than safetensors are never read.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.spm", "*.model", "*.txt", "*.jinja"]


def resolve_device(name: str) -> torch.device:
    """The device a recipe names.

    Args:
        name: "auto" (cuda, then mps, then cpu) or a torch device name. Where a launcher has
            started several processes on a node, "auto" and "cuda" are the device of this one.

    Raises:
        ModelError: the name is no device, or this machine has none of that kind.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        # Each process of a node takes a device of its own.
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
        index = int(local) % torch.cuda.device_count() if local else None
        return torch.device("cuda" if index is None else f"cuda:{index}")
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {name!r}: found {torch.cuda.device_count()} cuda devices; use auto or cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"device {name!r}: found no mps device; use auto or cpu")
    return device


def quiet_transformers() -> None:
    """Silence transformers' advice and progress bars; kdcache has its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_directory(path: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local directory of a model, downloaded first when the path is a hub id.

    Returns:
        The directory, and the hub commit it holds (None for a local directory).

    Raises:
        ModelError: neither a directory nor a hub repository that can be reached.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ModelError(f"{path}: a local directory has no revision; leave out {revision!r}")
        return local, None
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or local.exists():
        raise ModelError(f"{path}: found no such directory, expected a transformers model")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(path, revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        # Hub, HTTP and resolver errors have no common base; one line serves for all.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(
            f"{path}: no such directory, and the hub did not give a model of that name "
            f"({reason}); check the name or the network"
        ) from None
    return found, found.name


def load_tokenizer(directory: str | Path) -> Any:
    """The transformers tokenizer of a directory; no code of the directory is run.

    Raises:
        ModelError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(Path(directory)):  # transformers may make an empty one up
        raise ModelError(f"{directory}: found no tokenizer, expected the files of one")
    quiet_transformers()
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        # transformers raises whatever the tokenizer's class raises; one line serves for all.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(
            f"{directory}: found no tokenizer that transformers can load ({reason}); expected "
            f"the files of a tokenizer"
        ) from None


def shift_right(labels: Tensor, pad: int, start: int) -> Tensor:
    """Decoder inputs of some labels: the start id, then all labels but the last.

    Args:
        labels: [B, T] int64; -100 and pad mark positions that are not labels.
        pad: id that stands where labels has -100.
        start: the model's decoder_start_token_id.

    Returns:
        [B, T] int64.
    """
    shifted = labels.new_empty(labels.shape)
    shifted[:, 0] = start
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill_(shifted == -100, pad)


def shift_in_place(ids: Tensor, seen: Tensor, pad: int, start: int) -> Tensor:
    """Decoder inputs of a part of each text, every token at its position in the whole.

    Args:
        ids: [B, T] int64 tokens of the whole.
        seen: [B, T] bool, the part, N tokens of it.
        pad: id that stands outside the part.
        start: the model's decoder_start_token_id.

    Returns:
        [B, T] int64: in the part the start id, then all its tokens but the last.
    """
    row = seen.nonzero()[:, 0]  # [N]
    before = ids[seen].roll(1)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    shifted = torch.full_like(ids, pad)
    shifted[seen] = before.masked_fill(first, start)
    return shifted


@contextmanager
def project_only(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Within it, the model's logits are [N, V]: those of the positions in `mask` alone.

    Padding is dropped before the output projection, usually the dearest layer, so no
    [B, T, V] tensor is made. The model's own scaling and bias still apply.

    Args:
        model: a transformers model with output embeddings.
        mask: [B, T] bool, N of them true, on the model's device.

    Raises:
        ModelError: the model has no output embeddings to hook.
    """

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][mask.to(inputs[0].device)], *inputs[1:])  # [B, T, D] -> [N, D]

    handle = output_projection(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def project_first(model: nn.Module, mask: Tensor) -> Iterator[list[Tensor]]:
    """Within it, the model's logits are [1, V]: those of the first position in `mask` alone.

    The list receives what the model would have projected at all positions, [N, D], so that the
    caller can project it piece by piece.

    Args:
        model: a transformers model with output embeddings.
        mask: [B, T] bool, N of them true, on the model's device.

    Raises:
        ModelError: the model has no output embeddings to hook.
    """
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(inputs[0][mask.to(inputs[0].device)])  # [B, T, D] -> [N, D]
        return (kept[-1][:1], *inputs[1:])

    handle = output_projection(model).register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def recorded(body: nn.Module) -> Iterator[list[Any]]:
    """Within it, the list receives what a module returns."""
    outputs: list[Any] = []
    handle = body.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def replayed(body: nn.Module, output: Any) -> Iterator[None]:
    """Within it, a module returns a recorded output and computes nothing."""
    own = body.__dict__.get("forward")  # an instance may have one, as accelerate's hooks do
    body.forward = lambda *args, **keys: output
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own


def output_projection(model: nn.Module) -> nn.Module:
    """The layer that makes logits of hidden states.

    Raises:
        ModelError: the model has none.
    """
    projection = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(projection, nn.Module):
        raise ModelError(f"{type(model).__name__} has no output projection; expected logits")
    return projection
