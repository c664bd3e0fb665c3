"""Calibration: how sure a student is of target tokens of a cache, and how often it is right."""

# B samples, N target tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcache.formats.cache import Cache
from kdcache.formats.schema import join_ids
from kdcache.progress import progress
from kdcache.recipe import EvaluateSection, TrainSection
from kdcache.train.evaluation.evaluate import load_model
from kdcache.train.runs.parallel import Ranks
from kdcache.train.runs.scoring import score_in_turns
from kdcache.train.runs.validate import padded
from kdcache.train.students.student import embedding_rows, max_positions, student_logits

#: Padded tokens of one forward.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Confidence:
    """What a model says of some target tokens.

    Attributes:
        sure: [N] float64, probability of its likeliest id.
        hit: [N] bool, whether that is the target.
    """

    sure: np.ndarray
    hit: np.ndarray


def student_confidence(
    run: Path, section: TrainSection, cache: Cache, shards: Sequence[int], num_tokens: int
) -> Confidence | None:
    """Run a student over samples of a cache, teacher-forced.

    Args:
        run: a finished run.
        section: of its recipe.
        cache: that it learned from.
        shards: whose first samples are taken.
        num_tokens: target tokens, about.

    Returns:
        None where the student is no encoder-decoder, or knows less ids than the cache has.
    """
    assert section.student is not None
    if section.student.kind != "encoder_decoder":
        return None
    model, _, _ = load_model(run, EvaluateSection(device="auto"))
    pairs = _pairs(cache, section, shards, num_tokens, max_positions(model))
    rows = embedding_rows(model)
    for side, known in zip(range(2), rows, strict=True):
        if max((int(pair[side].max(initial=0)) for pair in pairs), default=0) >= known:
            return None
    if not pairs:
        return None
    sure: list[Tensor] = []
    hit: list[Tensor] = []
    with progress(sum(len(t) for _, t in pairs), f"calibration of {run.name}", "token") as bar:

        def score(numbers: list[int]) -> Tensor:
            src, src_mask = padded([pairs[n][0] for n in numbers], model.device)
            tgt, tgt_mask = padded([pairs[n][1] for n in numbers], model.device)
            logits = student_logits(model, src, src_mask, tgt, tgt_mask).float()  # [N, V]
            best, ids = torch.softmax(logits, 1).max(1)
            sure.append(best.cpu().double())
            hit.append((ids == tgt[tgt_mask]).cpu())
            bar.update(len(best))
            return best

        lengths = [max(1, *map(len, pair)) for pair in pairs]
        score_in_turns(model, lengths, _BATCH_TOKENS, Ranks(), score)
    return Confidence(torch.cat(sure).numpy(), torch.cat(hit).numpy())


def _pairs(
    cache: Cache,
    section: TrainSection,
    shards: Sequence[int],
    num_tokens: int,
    positions: int | None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Source and target ids of the first samples of some shards."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    each = num_tokens // max(1, len(shards)) + 1
    for shard in shards:
        streams = cache.samples(shard).streams
        sides = [streams[section.source], streams[section.target]]
        ids, taken = [join_ids(side.fields) for side in sides], 0
        for n in range(len(sides[0])):
            pair = [
                one[int(side.offsets[n]) : int(side.offsets[n + 1])].astype(np.int64)
                for one, side in zip(ids, sides, strict=True)
            ]
            if positions is None or max(map(len, pair)) <= positions:
                found.append((pair[0], pair[1]))
                taken += len(pair[1])
            if taken >= each:
                break
    return found
