"""Students: built from a transformers config or loaded, and written back."""

# B batch, S source positions, T target positions, N target tokens, D hidden, V vocabulary

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.formats.keyed import text_key
from kdcache.formats.manifest import TokenizerRecord
from kdcache.models import positions
from kdcache.models.loading import quiet_transformers
from kdcache.models.passes import project_only, shift_right
from kdcache.recipe import StudentSection
from kdcache.train.students.layer_copy import with_layers

logger = logging.getLogger(__name__)

#: Kind of a student to transformers' class that builds or loads it, and what it is called.
LOADERS = {
    "encoder_decoder": ("AutoModelForSeq2SeqLM", "an encoder-decoder"),
    "masked_seq2seq": ("AutoModelForSeq2SeqLM", "an encoder-decoder"),
    "masked_lm": ("AutoModelForMaskedLM", "a masked LM"),
    "classifier": ("AutoModelForSequenceClassification", "a classifier"),
    "causal_lm": ("AutoModelForCausalLM", "a causal LM"),
    "multi_task": ("AutoModel", "an encoder"),
}


def model_class(kind: str) -> Any:
    """What loads a student of a kind from its directory."""
    import transformers

    if kind == "multi_task":
        from kdcache.models.multi_task import MultiTaskModel

        return MultiTaskModel
    return getattr(transformers, LOADERS[kind][0])


def build_student(
    section: StudentSection,
    tokenizer: TokenizerRecord,
    vocab_size: int,
    seed: int,
    source: TokenizerRecord | None = None,
    head: Mapping[str, Any] | None = None,
) -> Any:
    """The student of a recipe, in float32 on the CPU, in training mode.

    Args:
        section: the recipe's student.
        tokenizer: the cache's record of the tokenizer whose ids the student predicts.
        vocab_size: V, rows of a new student's output projection, unless its config says another
            number.
        seed: recipe seed; a student from a config is a function of it.
        source: record of the tokenizer whose ids the student reads, where that is another.
        head: keys of its config that its head goes by: labels of a classifier. A head that a
            model at a path lacks is a function of the seed too.

    Raises:
        ModelError: the config or the directory gives no encoder-decoder that writes tokens.
    """
    quiet_transformers()
    if section.path is not None:
        with keyed_generator(text_key(seed, "student")):
            model = _load(Path(section.path).expanduser(), section.kind, head or {})
        if section.layers is not None:
            model = with_layers(model, section.layers.encoder, section.layers.decoder)
        fit_padding(model, source)
    else:
        with keyed_generator(text_key(seed, "student")):
            keys = {**(section.config or {}), **(head or {})}
            model = from_config(section.kind, keys, tokenizer, vocab_size, source)
            fit_padding(model, source)
            if section.init == "glorot":
                initialise(model)
    if section.kind != "classifier" and not output_rows(model):
        raise ModelError(
            f"student: {type(model).__name__} has no output projection; expected "
            f"{LOADERS[section.kind][1]} that writes tokens"
        )
    return model.train()


def output_rows(model: Any) -> int:
    """V, rows of a model's output projection; 0 without one."""
    projection = model.get_output_embeddings()
    return 0 if projection is None else int(projection.weight.shape[0])


def fixed_tables(model: Any) -> list[nn.Parameter]:
    """Parameters that follow from the config and are never learned: sinusoidal positions."""
    names = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return [one for name, one in model.named_parameters() if name in names]


def embedding_rows(model: Any) -> tuple[int, int]:
    """Ids that a student's encoder can read, and that its decoder can both read and write.

    Of a model without a decoder those that it can read, and both read and write; of a classifier,
    which writes none, those that it can read.
    """
    encoder = int(model.get_input_embeddings().weight.shape[0])
    if not model.config.is_encoder_decoder:
        return encoder, min(encoder, output_rows(model) or encoder)
    decoder = int(model.get_decoder().get_input_embeddings().weight.shape[0])
    return encoder, min(decoder, output_rows(model))


def student_logits(
    model: Any, src: Tensor, src_mask: Tensor, labels: Tensor, label_mask: Tensor
) -> Tensor:
    """[N, V] logits of the positions in `label_mask`, row by row; no other is projected.

    Args:
        model: a transformers encoder-decoder.
        src: [B, S] int64.
        src_mask: [B, S] bool, true on tokens.
        labels: [B, T] int64; what stands outside the mask does not matter.
        label_mask: [B, T] bool, true on tokens, which stand before all padding.
    """
    decoder_input_ids = shift_right(labels, pad=0, start=decoder_start(model))
    with project_only(model, label_mask):
        # Padding stands last and attention is causal, so the decoder needs no mask.
        out = model(
            input_ids=src,
            attention_mask=src_mask.long(),
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        )
    logits: Tensor = out.logits
    return logits


def decoder_start(model: Any) -> int:
    """Id that the decoder starts from.

    Raises:
        ModelError: the model names none.
    """
    for config in (model.config, model.generation_config):
        for name in ("decoder_start_token_id", "pad_token_id"):
            found = getattr(config, name, None)
            if found is not None:
                return int(found)
    raise ModelError(f"{type(model).__name__}: its config has no decoder_start_token_id")


def fit_padding(model: Any, source: TokenizerRecord | None) -> None:
    """Let an encoder that reads another tokenizer's ids learn all but that one's padding.

    A transformers model takes the row of its config's padding id, which is the decoder's, for
    padding on both sides, and gives it no gradient.

    Args:
        model: the student.
        source: record of the tokenizer whose ids it reads; None where it writes the same.
    """
    if source is None:
        return
    encoder, decoder = model.get_input_embeddings(), model.get_decoder().get_input_embeddings()
    if encoder.padding_idx == source.pad_id:
        return
    shared = encoder is decoder or encoder.weight is decoder.weight
    encoder.padding_idx = None if shared else source.pad_id
    if shared:
        decoder.padding_idx = None


def initialise(model: Any) -> None:
    """Glorot-uniform matrices, embeddings N(0, 1/sqrt(D)), biases zero, norms as they are.

    Fixed (sinusoidal) position tables stay, tied matrices count as embeddings, and the row of
    a padding id is zero.

    Source: Glorot & Bengio 2010; Vaswani et al. 2017, section 3.4.
    """
    width = getattr(model.config, "d_model", None) or model.config.hidden_size
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                done.add(id(module.weight))
                if module.weight.requires_grad:
                    module.weight.normal_(0.0, width**-0.5)
                    if module.padding_idx is not None:
                        module.weight[module.padding_idx].zero_()
        for name, parameter in model.named_parameters():
            if id(parameter) in done or not parameter.requires_grad:
                continue
            if parameter.dim() >= 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                parameter.zero_()


def save_student(
    model: Any,
    tokenizer_files: Sequence[Path],
    out: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a transformers directory, tokenizer included, that `from_pretrained` loads.

    Args:
        model: the student.
        tokenizer_files: of the tokenizer that goes with it, see `vocabulary.tokenizer_files`.
        out: a directory that is there and empty.
        weights: by name, instead of the student's own.
    """
    model.save_pretrained(out, state_dict=weights)
    for file in tokenizer_files:
        if not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)


def checkpoint_activations(model: Any) -> None:
    """Have each layer keep what it reads alone, and compute the rest again when going back.

    Raises:
        ModelError: the model cannot do so.
    """
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"train.activation_checkpointing: {first_line(error)}") from None


def max_positions(model: Any) -> int | None:
    """Longest sequence the student takes; None where its positions are relative."""
    return positions.max_positions(model.config)


def _load(path: Path, kind: str, head: Mapping[str, Any]) -> Any:
    """A student from a transformers directory."""
    import transformers

    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no transformers model there; train.student.path needs one")
    try:
        model = getattr(transformers, LOADERS[kind][0]).from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **head
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from None
    for table in fixed_tables(model):
        table.requires_grad_(False)  # transformers forgets it when it loads
    return model


def from_config(
    kind: str,
    keys: dict[str, Any],
    tokenizer: TokenizerRecord,
    vocab_size: int,
    source: TokenizerRecord | None,
) -> Any:
    """A student with transformers' initialisation."""
    import transformers

    model_type = keys.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ModelError("train.student.config needs model_type, such as marian, t5 or bart")
    try:
        default = transformers.AutoConfig.for_model(model_type)
    except ValueError:
        raise ModelError(
            f"train.student.config.model_type {model_type!r}: transformers knows no such model"
        ) from None
    if default.is_encoder_decoder != (LOADERS[kind] == LOADERS["encoder_decoder"]):
        raise ModelError(
            f"train.student.config.model_type {model_type!r} is not {LOADERS[kind][1]}, which "
            f"train.student.kind says; give another of them"
        )
    filled = _special_ids(default, tokenizer) | {"vocab_size": vocab_size}
    if hasattr(default, "decoder_vocab_size"):
        filled["decoder_vocab_size"] = vocab_size
    if source is not None:
        filled |= _table_sizes(source, vocab_size, filled, keys)
    unknown = sorted(set(keys) - set(default.to_dict()) - set(default.attribute_map) - set(filled))
    if unknown:
        raise ModelError(
            f"train.student.config: a {model_type} config has no {', '.join(unknown)}; "
            "see transformers' documentation of its config"
        )
    try:
        config = transformers.AutoConfig.for_model(model_type, **(filled | keys))
        loader = getattr(transformers, LOADERS[kind][0])
        model = loader.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AssertionError, RuntimeError) as error:
        raise ModelError(f"train.student.config: {model_type}: {first_line(error)}") from None
    return model


def _table_sizes(
    source: TokenizerRecord, vocab_size: int, filled: Mapping[str, Any], keys: Mapping[str, Any]
) -> dict[str, int]:
    """Rows of the embeddings of a student that reads another tokenizer's ids than it writes."""
    if keys.get("share_encoder_decoder_embeddings") is False and "decoder_vocab_size" in filled:
        # The config has one padding id for both sides, which must have a row in either.
        return {"vocab_size": max(source.vocab_size, (filled["pad_token_id"] or 0) + 1)}
    logger.warning(
        "train.student.config: one table of embeddings for the ids of two tokenizers; a marian "
        "config with share_encoder_decoder_embeddings false has one for each"
    )
    names = ("vocab_size", "decoder_vocab_size")
    return {name: max(vocab_size, source.vocab_size) for name in names if name in filled}


def _special_ids(default: Any, tokenizer: TokenizerRecord) -> dict[str, int | None]:
    """Special ids of the cache's tokenizer, in the roles the model's family gives them."""
    if not default.is_encoder_decoder:
        roles = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
        return {**roles, "bos_token_id": tokenizer.bos_id}
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    eos = tokenizer.eos_id
    start = getattr(default, "decoder_start_token_id", None)
    # BART's decoder starts from eos; Marian's and T5's from padding.
    from_eos = start is not None and start == default.eos_token_id != default.pad_token_id
    found = {
        "pad_token_id": pad,
        "eos_token_id": eos,
        "bos_token_id": tokenizer.bos_id,
        "decoder_start_token_id": eos if from_eos and eos is not None else pad,
    }
    if hasattr(default, "forced_eos_token_id"):
        found["forced_eos_token_id"] = eos
    return found


@contextmanager
def keyed_generator(key: int) -> Iterator[None]:
    """Set torch's generator from a key, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key >> 1)
        yield


def first_line(error: BaseException) -> str:
    """First line of a library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
