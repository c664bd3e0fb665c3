"""Hypotheses by transformers' own generate, each as if its sample were alone."""

# B samples, n hypotheses of each, R = B x n rows, S source tokens, P columns of the prompt,
# T tokens of a hypothesis

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.dump.codecs.fixed_point import FIXED_BITS
from kdcache.dump.signals.processors import (
    NEVER,
    Draw,
    Follower,
    ForceFirst,
    ForceLast,
    MeanOfMembers,
    OwnLength,
    Watch,
)
from kdcache.dump.teachers.encoder_decoder import decoder_start
from kdcache.errors import ModelError
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.recipe import BeamsSignal

#: What of a checkpoint's generation config is used: ids that begin, end and fill what it
#: writes, and ids that it must not write. All else is the recipe's.
KEPT = (
    "eos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)
#: What of it the recipe's own settings stand for, or decides nothing.
REPLACED = (
    *("do_sample", "num_beams", "num_return_sequences", "length_penalty", "early_stopping"),
    *("max_length", "max_new_tokens", "temperature", "top_k", "top_p", "use_cache"),
    *("pad_token_id", "bos_token_id", "transformers_version", "_from_model_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "cache_implementation", "disable_compile"),
)
#: Values of other settings that do nothing, where that is not 0.
NEUTRAL = {
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1,
    "typical_p": 1,
}


@dataclass(frozen=True)
class Decoding:
    """Every setting that decides what is written.

    Attributes:
        mode: beam, greedy or sample.
        num_beams: width of the beam; 1 in the other modes.
        num_hypotheses: n.
        max_length: the recipe's, see `BeamsSignal`.
        length_penalty: exponent of the length, in every mode's score.
        early_stopping: for the beam.
        temperature: for mode sample, as the next two.
        top_k: 0 for all.
        top_p: 1 for all.
        eos_token_id: ids that end a hypothesis; none, and every one is as long as it may be.
        pad_token_id: what batches are filled with.
        decoder_start_token_id: what the decoder reads first; None for a causal model.
        forced_bos_token_id: the first token of every hypothesis.
        forced_eos_token_id: the last token of a hypothesis of the longest length.
        bad_words_ids: what is never written.
        suppress_tokens: ids that are never written.
        begin_suppress_tokens: ids that are never written first.
        ignored: what else the checkpoint's generation config says, and is not done.
    """

    mode: str
    num_beams: int
    num_hypotheses: int
    max_length: int | None
    length_penalty: float
    early_stopping: bool
    temperature: float
    top_k: int
    top_p: float
    eos_token_id: tuple[int, ...]
    pad_token_id: int
    decoder_start_token_id: int | None
    forced_bos_token_id: int | None
    forced_eos_token_id: tuple[int, ...]
    bad_words_ids: tuple[tuple[int, ...], ...]
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    ignored: dict[str, Any]

    @classmethod
    def of(
        cls, signal: BeamsSignal, members: Sequence[Any], pad_id: int, first_id: int | None
    ) -> Decoding:
        """The recipe's settings and those of the checkpoint that are kept.

        Args:
            signal: the recipe's section.
            members: models of transformers; the first one's generation config is used.
            pad_id: what batches are filled with.
            first_id: id of `signal.forced_bos`; the checkpoint's without one.

        Raises:
            ModelError: members of an ensemble begin, end or rule out other tokens, or the
                model does not say what its decoder begins with.
        """
        kept = _kept(members[0])
        for member in members[1:]:
            if _kept(member) != kept:
                raise ModelError(
                    f"an ensemble's members must generate alike: one has {kept} in its generation "
                    f"config, another {_kept(member)}; use one of them, or make the files the same"
                )
        encodes = bool(members[0].config.is_encoder_decoder)
        forced = kept["forced_bos_token_id"] if encodes else None
        return cls(
            mode=signal.mode,
            num_beams=signal.num_beams if signal.mode == "beam" else 1,
            num_hypotheses=signal.num_hypotheses,
            max_length=signal.max_length,
            length_penalty=signal.length_penalty,
            early_stopping=signal.early_stopping,
            temperature=signal.temperature,
            top_k=signal.top_k,
            top_p=signal.top_p,
            eos_token_id=_several(kept["eos_token_id"]),
            pad_token_id=pad_id,
            decoder_start_token_id=decoder_start(members[0]) if encodes else None,
            forced_bos_token_id=forced if first_id is None else first_id,
            forced_eos_token_id=_several(kept["forced_eos_token_id"]),
            bad_words_ids=tuple(map(tuple, kept["bad_words_ids"] or ())),
            suppress_tokens=_several(kept["suppress_tokens"]),
            begin_suppress_tokens=_several(kept["begin_suppress_tokens"]),
            ignored=_ignored(members[0]),
        )

    @property
    def rows(self) -> int:
        """Rows that one sample takes while it is decoded."""
        return max(self.num_beams, self.num_hypotheses)

    def record(self) -> dict[str, Any]:
        """As it is kept in the signal's record."""
        return {
            name: list(map(list, value)) if name == "bad_words_ids" else _plain(value)
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Written:
    """What generation found: R hypotheses, those of a sample together and in its order.

    Attributes:
        tokens: [R] ragged `id` int64: no decoder start token, no prompt, no padding; the end
            token where it was written.
        real: [R] bool; where there are fewer hypotheses than a beam is wide, transformers fills
            it up.
        wrong: [R] int64 first token whose logits had a NaN or +inf, NEVER without one; of a
            beam this is the sample's, not the hypothesis's.
    """

    tokens: Ragged
    real: np.ndarray
    wrong: np.ndarray


@torch.inference_mode()
def generate(
    members: Sequence[Any],
    decoding: Decoding,
    ids: Tensor,
    mask: Tensor,
    limits: np.ndarray,
    hashes: np.ndarray | None = None,
) -> Written:
    """What a model, or several with the mean of their probabilities, write for some samples.

    Only float noise tells a sample in a batch from the same sample alone: each has a longest
    length of its own, stops by itself, and draws by hashes of its own.

    Args:
        members: models of transformers.
        decoding: how.
        ids: [B, S] sources, right-padded; or a causal model's prompts, left-padded.
        mask: [B, S] bool.
        limits: [B] int64 most tokens of each sample's hypotheses, end token included.
        hashes: [B, n, max(limits)] uint64, for mode sample.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    if hashes is not None:
        ids, mask = (part.repeat_interleave(hashes.shape[1], dim=0) for part in (ids, mask))
        limits = limits.repeat(hashes.shape[1])
        hashes = hashes.reshape(len(ids), -1)
    model, device = members[0], ids.device
    prompt = ids.shape[1] if decoding.decoder_start_token_id is None else 1
    own = torch.from_numpy(limits).to(device)
    watch = Watch(prompt)
    beam = {}
    if decoding.num_beams > 1:
        beam = {
            "num_return_sequences": decoding.num_hypotheses,
            "length_penalty": decoding.length_penalty,
            "early_stopping": decoding.early_stopping,
        }
    config = GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        max_new_tokens=int(limits.max()),
        eos_token_id=list(decoding.eos_token_id) or None,
        pad_token_id=decoding.pad_token_id,
        decoder_start_token_id=decoding.decoder_start_token_id,
        use_cache=True,
        return_dict_in_generate=True,
        **beam,
    )
    processors = [
        *_followers(members[1:], decoding, ids, mask),
        watch,
        *_processors(decoding, prompt, own),
        *_drawing(decoding, prompt, hashes, device),
    ]
    with _without_defaults(model):
        found = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([OwnLength(prompt, own)]),
        )
    tokens = found.sequences[:, prompt:].cpu().numpy()  # [R, T]
    hypotheses = _cut(tokens, limits.repeat(len(tokens) // len(limits)), decoding.eos_token_id)
    real = np.ones(len(tokens), dtype=bool)
    if beam:
        # All that is real began in the first row of its sample's beam.
        rows = np.repeat(np.arange(len(ids)), decoding.num_hypotheses) * decoding.num_beams
        real = found.beam_indices[:, 0].cpu().numpy() == rows
    return Written(hypotheses, real, _wrong(watch.first(), hypotheses.lengths, limits))


def _followers(
    others: Sequence[Any], decoding: Decoding, ids: Tensor, mask: Tensor
) -> list[MeanOfMembers]:
    """What makes the first member of an ensemble speak for all."""
    if not others:
        return []
    start = decoding.decoder_start_token_id
    return [MeanOfMembers([Follower(other, ids, mask, start) for other in others])]


def _processors(decoding: Decoding, prompt: int, limits: Tensor) -> list[Any]:
    """Tokens that must, or must not, be written; in the order that transformers has."""
    from transformers import (
        NoBadWordsLogitsProcessor,
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
    )

    device = str(limits.device)
    found: list[Any] = []
    if decoding.bad_words_ids:
        words = [list(word) for word in decoding.bad_words_ids]
        found.append(NoBadWordsLogitsProcessor(words, list(decoding.eos_token_id) or None))
    if decoding.forced_bos_token_id is not None:
        found.append(ForceFirst(prompt, decoding.forced_bos_token_id))
    if decoding.forced_eos_token_id:
        found.append(ForceLast(prompt, limits, decoding.forced_eos_token_id))
    if decoding.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(list(decoding.suppress_tokens), device))
    if decoding.begin_suppress_tokens:
        begin = prompt + (prompt == 1 and decoding.forced_bos_token_id is not None)
        found.append(
            SuppressTokensAtBeginLogitsProcessor(
                list(decoding.begin_suppress_tokens), begin, device
            )
        )
    return found


def _drawing(
    decoding: Decoding, prompt: int, hashes: np.ndarray | None, device: torch.device
) -> list[Any]:
    """Transformers' own warpers, then the draw in place of its generator."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if hashes is None:
        return []
    found: list[Any] = []
    if decoding.temperature != 1:
        found.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        found.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        found.append(TopPLogitsWarper(decoding.top_p))
    points = (hashes >> np.uint64(64 - FIXED_BITS)).astype(np.int64)
    return [*found, Draw(prompt, torch.from_numpy(points).to(device))]


def _cut(tokens: np.ndarray, limits: np.ndarray, ends: Sequence[int]) -> Ragged:
    """Hypotheses up to their end token, or as long as they may be.

    Args:
        tokens: [R, T], filled with anything after the end.
        limits: [R].
        ends: end tokens.
    """
    at_end = np.isin(tokens, list(ends))  # [R, T]
    # transformers may fill with end tokens what comes after a hypothesis without one.
    lengths = np.where(at_end.any(axis=1), np.minimum(at_end.argmax(axis=1) + 1, limits), limits)
    kept = np.arange(tokens.shape[1]) < lengths[:, None]
    return Ragged(offsets_of(lengths), {"id": tokens[kept]})


def _wrong(first: np.ndarray, lengths: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """[R] first token of each hypothesis whose logits were wrong; what comes after it is not read.

    Args:
        first: [rows while decoding] such tokens.
        lengths: [R] tokens of the hypotheses.
        limits: [B or R] most tokens.
    """
    if len(first) == len(lengths) == len(limits):
        return np.where(first < lengths, first, NEVER)
    worst = first.reshape(len(limits), -1).min(axis=1)
    return np.where(worst < limits, worst, NEVER).repeat(len(lengths) // len(limits))


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Within it, nothing of the checkpoint's generation config fills what was left out."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _kept(model: Any) -> dict[str, Any]:
    """What of a checkpoint's generation config is used."""
    return {name: getattr(model.generation_config, name, None) for name in KEPT}


def _ignored(model: Any) -> dict[str, Any]:
    """What of it is not, where it says anything."""
    return {
        name: value
        for name, value in sorted(model.generation_config.to_dict().items())
        if name not in (*KEPT, *REPLACED)
        and value is not None
        and value is not False
        and value != NEUTRAL.get(name, 0)
    }


def _several(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """One id, several or none as a tuple."""
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(map(int, value))


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
