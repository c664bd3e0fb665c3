"""What identifies a teacher: digests of its weights and its config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import xxhash

from kdcache.errors import ModelError
from kdcache.formats.signals import TeacherRecord
from kdcache.recipe.teacher import TeacherSection

#: Keys of config.json that say how it was saved, not what the model is.
VOLATILE_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def read_config(directory: Path, path: str) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        ModelError: it is not there, or is no JSON object.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(
            f"{path}: cannot read its config.json ({reason}); expected a transformers model"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: its config.json is no JSON object; save the model again")
    return config


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


def digest_files(files: Sequence[Path]) -> str:
    """Digest over the bytes of some files, one after another."""
    hasher = xxhash.xxh3_128()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                hasher.update(block)
    return hasher.hexdigest()


def digest_config(config: dict[str, Any]) -> str:
    """Digest over a config by content."""
    kept = {key: value for key, value in config.items() if key not in VOLATILE_KEYS}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True).encode())


def ensemble_record(
    members: Sequence[TeacherRecord], average: Literal["probabilities", "parameters"], dtype: str
) -> TeacherRecord:
    """One record for several members; it changes with any of them, and with their order."""

    def joined(digests: list[str]) -> str:
        return xxhash.xxh3_128_hexdigest(" ".join([average, *digests]).encode())

    return TeacherRecord(
        path=" + ".join(member.path for member in members),
        revision=None,
        digest=joined([member.digest for member in members]),
        config_digest=joined([member.config_digest for member in members]),
        model_type=" + ".join(dict.fromkeys(member.model_type for member in members)),
        kind=members[0].kind,
        dtype=dtype,
        average=average,
        members=list(members),
    )


def own_record(
    section: TeacherSection, files: Sequence[Path] = (), model_type: str = "custom"
) -> TeacherRecord:
    """The record of a custom teacher.

    Args:
        section: its section; class and options are what its config digest is over.
        files: what its numbers depend on, weights above all, in a fixed order. Without any, its
            path is in the config digest too; with some it may move.
        model_type: a word for reports.
    """
    named = {
        "class": section.model_class,
        "path": None if files else section.label,
        "options": dict(section.options),
    }
    return TeacherRecord(
        path=section.label,
        revision=section.revision,
        digest=digest_files(files),
        config_digest=digest_config(named),
        model_type=model_type,
        kind="custom",
        dtype=section.dtype,
    )
