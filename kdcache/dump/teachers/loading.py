"""From a recipe's teacher section to a loaded teacher: kinds, classes, ensembles."""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kdcache.models.multi_task
from kdcache.dump.teacher import Teacher
from kdcache.dump.teachers.causal import CausalTeacher
from kdcache.dump.teachers.classifier import ClassifierTeacher
from kdcache.dump.teachers.encoder import EncoderTeacher
from kdcache.dump.teachers.encoder_decoder import EncoderDecoderTeacher
from kdcache.dump.teachers.ensemble import Ensemble
from kdcache.dump.teachers.identity import (
    digest_config,
    digest_files,
    ensemble_record,
    read_config,
    weight_files,
)
from kdcache.dump.teachers.masked import MaskedTeacher
from kdcache.dump.teachers.model import ModelTeacher
from kdcache.dump.teachers.multi_task import MultiTaskTeacher
from kdcache.errors import KDCacheError, ModelError
from kdcache.formats.signals import TeacherRecord
from kdcache.models.loading import model_directory, quiet_transformers, resolve_device
from kdcache.models.positions import max_positions
from kdcache.recipe.teacher import TeacherSection


@dataclass(frozen=True)
class _Kind:
    """How transformers loads one kind, and what kdcache makes of it."""

    article: str
    auto: str
    teacher: type[ModelTeacher]


#: The class of kdcache.models.multi_task; the others are transformers' own.
MULTI_TASK = "MultiTaskModel"
KINDS = {
    "encoder_decoder": _Kind("an encoder-decoder", "AutoModelForSeq2SeqLM", EncoderDecoderTeacher),
    "causal_lm": _Kind("a causal LM", "AutoModelForCausalLM", CausalTeacher),
    "masked_lm": _Kind("a masked LM", "AutoModelForMaskedLM", MaskedTeacher),
    "classifier": _Kind("a classifier", "AutoModelForSequenceClassification", ClassifierTeacher),
    "encoder": _Kind("an encoder", "AutoModel", EncoderTeacher),
    "multi_task": _Kind("a model of several tasks", MULTI_TASK, MultiTaskTeacher),
}
#: Which of transformers' tables of architectures tells which kind; the first that fits.
ARCHITECTURES = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "encoder_decoder",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "classifier",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "masked_lm",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "causal_lm",
    "MODEL_MAPPING_NAMES": "encoder",
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES": "encoder",
}


@dataclass(frozen=True)
class _Source:
    """One member's directory, read as far as its config."""

    path: str
    directory: Path
    revision: str | None
    config: dict[str, Any]
    kind: str


def load_teacher(section: TeacherSection, needs_attention: bool = False) -> Teacher:
    """Load a teacher from directories or hub ids; only safetensors, no remote code.

    Args:
        section: which one, and where it runs.
        needs_attention: load it so that `attention` works.

    Raises:
        ModelError: it is not there, cannot be loaded, or its members do not fit together.
    """
    if section.kind == "custom":
        return _load_custom(section, needs_attention)
    if needs_attention and section.attention not in (None, "eager"):
        raise ModelError(
            f"{section.label}: its attention is {section.attention!r} and an attention signal "
            "needs eager; leave out dump.teacher.attention"
        )
    quiet_transformers()
    sources = [_source(path, section) for path in section.paths]
    if len(sources) == 1:
        return _load_one(sources[0], section, needs_attention)
    if section.average == "parameters":
        return _load_averaged(sources, section, needs_attention)
    return Ensemble([_load_one(source, section, needs_attention) for source in sources])


def teacher_class(section: TeacherSection) -> type[Teacher]:
    """The class of a teacher that is not loaded; its files must be there.

    Raises:
        ModelError: it is not there, or its config says that it cannot be loaded.
    """
    if section.kind == "custom":
        return _custom_class(section)
    quiet_transformers()
    sources = [_source(path, section) for path in section.paths]
    return KINDS[sources[0].kind].teacher


def teacher_positions(section: TeacherSection) -> int | None:
    """`max_positions` of a teacher that is not loaded.

    Raises:
        ModelError: its config cannot be read.
    """
    if section.kind == "custom":
        return _custom_class(section).positions(section)
    from transformers import AutoConfig

    quiet_transformers()
    limits = []
    for path in section.paths:
        directory, _ = model_directory(path, section.revision)
        _refuse_remote_code(read_config(directory, path), path)
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:
            # Each config class has checks of its own; one line serves for all.
            raise ModelError(f"{path}: cannot read its config.json ({_line(error)})") from None
        limits.append(max_positions(config))
    return min((limit for limit in limits if limit is not None), default=None)


def _source(path: str, section: TeacherSection) -> _Source:
    """Where a member lies and what it is."""
    directory, revision = model_directory(path, section.revision)
    weight_files(directory, path)
    config = read_config(directory, path)
    _refuse_remote_code(config, path)
    kind = _kind(config, path) if section.kind == "auto" else section.kind
    return _Source(path, directory, revision, config, kind)


def _refuse_remote_code(config: Mapping[str, Any], path: str) -> None:
    """A model whose class lies in its repository, not in transformers."""
    from transformers import CONFIG_MAPPING

    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise _remote_code(path, str(config.get("model_type")))


def _remote_code(path: str, what: str) -> ModelError:
    """The refusal, and the way round it."""
    return ModelError(
        f"{path}: {what!r} is defined by code in the model's own repository (auto_map in its "
        "config.json), and remote code is never run; use a model that transformers has, or "
        "write a class of your own (kind: custom)"
    )


def _kind(config: Mapping[str, Any], path: str) -> str:
    """The kind of a config's architecture.

    Raises:
        ModelError: it has none, or one that is no teacher.
    """
    from transformers.models.auto import modeling_auto

    names = config.get("architectures") or [None]
    if names[0] == MULTI_TASK:
        return "multi_task"
    model_type = config.get("model_type")
    for table, kind in ARCHITECTURES.items():
        if _listed(getattr(modeling_auto, table), names[0]):
            return kind
    # BertForPreTraining and its like: a masked LM with a head more.
    masked = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and _listed(modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES, names[0]):
        return "masked_lm"
    found = f"the architecture {names[0]}" if names[0] else "no architecture in its config.json"
    raise ModelError(
        f"{path}: found {found}, which does not say what kind of teacher it is; set "
        f"dump.teacher.kind to one of {', '.join(KINDS)}"
    )


def _listed(table: Mapping[str, Any], name: str | None) -> bool:
    """Whether a table of model types names a class; some rows have several."""
    return any(name == row or (isinstance(row, tuple) and name in row) for row in table.values())


def _load_one(source: _Source, section: TeacherSection, needs_attention: bool) -> ModelTeacher:
    """A teacher of one model."""
    model, device = _load_model(source, section, needs_attention)
    kind = KINDS[source.kind]
    return kind.teacher(model, _record(source, model), device, needs_attention)


def _record(source: _Source, model: Any) -> TeacherRecord:
    """What identifies one model."""
    return TeacherRecord(
        path=source.path,
        revision=source.revision,
        digest=digest_files(weight_files(source.directory, source.path)),
        config_digest=digest_config(source.config),
        model_type=model.config.model_type,
        kind=source.kind,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _load_model(
    source: _Source, section: TeacherSection, needs_attention: bool
) -> tuple[Any, torch.device]:
    """The transformers model where it will run, and where its inputs go."""
    import transformers

    kind = KINDS[source.kind]
    options: dict[str, Any] = {}
    attention = "eager" if needs_attention else section.attention
    if attention is not None:
        options["attn_implementation"] = attention
    if section.device_map is not None:
        if importlib.util.find_spec("accelerate") is None:
            raise ModelError(
                f"{source.path}: device_map {section.device_map!r} needs the accelerate package; "
                "install it (pip install accelerate), or leave device_map out"
            )
        options["device_map"] = section.device_map
    device = resolve_device(section.device) if section.device_map is None else None
    name = _auto_class(source)
    if name != MULTI_TASK:
        options["trust_remote_code"] = False
    try:
        model, info = getattr(
            kdcache.models.multi_task if name == MULTI_TASK else transformers, name
        ).from_pretrained(
            source.directory,
            dtype=section.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        # transformers raises whatever the model's class raises; one line serves for all.
        if "trust_remote_code" in str(error):
            raise _remote_code(source.path, kind.auto) from None
        raise ModelError(
            f"{source.path}: transformers cannot load it as {kind.article}: {_line(error)}"
        ) from None
    _refuse_missing(source, info["missing_keys"])
    if device is None:
        device = model.get_input_embeddings().weight.device
        # A weight that waits elsewhere until it is run is nowhere; its inputs are moved to it.
        return model, resolve_device("auto") if device.type == "meta" else device
    try:
        return model.to(device), device
    except (RuntimeError, ValueError) as error:  # no memory, or quantised where it must stay
        raise ModelError(
            f"{source.path}: it cannot be moved to {device} ({_line(error)}); set "
            "dump.teacher.device_map"
        ) from None


def _auto_class(source: _Source) -> str:
    """The class that loads it; T5EncoderModel and its like have one of their own."""
    from transformers.models.auto import modeling_auto

    name = (source.config.get("architectures") or [None])[0]
    own = _listed(modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, name)
    if source.kind == "encoder" and own and not _listed(modeling_auto.MODEL_MAPPING_NAMES, name):
        return "AutoModelForTextEncoding"
    return KINDS[source.kind].auto


def _refuse_missing(source: _Source, missing: Any) -> None:
    """Weights that are not there would be random numbers."""
    # A bare encoder's pooler is not run for hidden states.
    names = sorted(name for name in missing if source.kind != "encoder" or "pooler" not in name)
    if names:
        raise ModelError(
            f"{source.path}: as {KINDS[source.kind].article} it lacks {len(names)} weights, "
            f"{names[0]} among them; expected a trained model of that kind (dump.teacher.kind)"
        )


def _load_averaged(
    sources: list[_Source], section: TeacherSection, needs_attention: bool
) -> ModelTeacher:
    """One model whose parameters are the mean of the members', summed in float32."""
    model, device = _load_model(sources[0], section, needs_attention)
    records = [_record(sources[0], model)]
    means = {name: tensor.float() for name, tensor in _floating(model).items()}
    for source in sources[1:]:
        other, _ = _load_model(source, section, needs_attention)
        records.append(_record(source, other))
        _check_same(records[0], records[-1])
        tensors = _floating(other)
        for name, total in means.items():
            total += tensors[name]
        del other, tensors
    with torch.no_grad():
        for name, tensor in _floating(model).items():
            tensor.copy_(means.pop(name) / len(sources))
    record = ensemble_record(records, "parameters", records[0].dtype)
    return KINDS[sources[0].kind].teacher(model, record, device, needs_attention)


def _floating(model: Any) -> dict[str, torch.Tensor]:
    """Every saved parameter and buffer that can be averaged; tied ones once."""
    saved = model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and name in saved
    }


def _check_same(first: TeacherRecord, other: TeacherRecord) -> None:
    """Parameters can be averaged only between models that are built alike."""
    for what in ("kind", "config_digest", "dtype"):
        one, two = getattr(first, what), getattr(other, what)
        if one != two:
            raise ModelError(
                f"average: parameters needs models that are built alike: {first.path} has "
                f"{what} {one}, {other.path} has {two}; use average: probabilities"
            )


def _load_custom(section: TeacherSection, needs_attention: bool) -> Teacher:
    """A teacher of the user's own class."""
    found = _custom_class(section)
    try:
        teacher = found.load(section, needs_attention)
    except (KDCacheError, OSError):
        raise
    except Exception as error:
        # The class raises whatever it likes; its line is what its author looks for.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"{section.model_class}: its load failed ({type(error).__name__}: {_line(error)}; "
            f"{Path(frame.filename).name}, line {frame.lineno}); mend the class, or what "
            "dump.teacher gives it (path, options)"
        ) from error
    if not isinstance(teacher, Teacher):
        raise ModelError(
            f"{section.model_class}: its load gave {type(teacher).__name__}; expected a "
            "kdcache.dump.teacher.Teacher"
        )
    return teacher


def _custom_class(section: TeacherSection) -> type[Teacher]:
    """The class that a recipe names.

    Raises:
        ModelError: the module, or the name in it, is not there or is no teacher.
    """
    where = str(section.model_class)
    module_name, colon, name = where.partition(":")
    if not (colon and module_name and name):
        raise ModelError(f"dump.teacher.model_class is {where!r}; expected module:Name")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # A module raises whatever it likes while it is imported; one line serves for all.
        raise ModelError(
            f"{where}: cannot import the module {module_name!r} ({_line(error)}); it must be on "
            "the Python path (PYTHONPATH)"
        ) from None
    found = getattr(module, name, None)
    if found is None:
        raise ModelError(f"{where}: the module has no {name!r}; expected a class of that name")
    if not (isinstance(found, type) and issubclass(found, Teacher)):
        raise ModelError(f"{where}: it is no subclass of kdcache.dump.teacher.Teacher")
    return found


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().split("\n")[0] or type(error).__name__
