"""Where a model lies, where it runs, and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from kdcache.errors import ModelError
from kdcache.text.tokenizers import has_tokenizer

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
