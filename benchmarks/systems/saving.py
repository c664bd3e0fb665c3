"""What one cache saved: teacher passes and time, against the same systems run online."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

#: Batches whose teacher passes are timed, after one that warms up.
BATCHES = 8


def forward_seconds(teacher: Path, cache: Path, batch_tokens: int) -> float:
    """Seconds of a teacher's plain forward pass for each target token, the median over batches.

    Args:
        teacher: a transformers directory.
        cache: whose batches it reads, as a student would online.
        batch_tokens: of a training batch.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    import kdcache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSeq2SeqLM.from_pretrained(teacher).to(device).eval()
    batches = kdcache.batches(cache, ["src", "tgt"], batch_tokens=batch_tokens, epochs=1)
    seconds = []
    for batch in islice(batches, BATCHES + 1):
        (micro,) = batch.to(device).micro
        src, tgt = micro.streams["src"], micro.streams["tgt"]
        began = time.perf_counter()
        with torch.no_grad():
            logits = model(
                input_ids=src.ids, attention_mask=src.mask.long(), decoder_input_ids=tgt.ids
            ).logits
            float(torch.log_softmax(logits[tgt.mask], dim=-1)[0, 0])  # waits for the device
        seconds.append((time.perf_counter() - began) / len(tgt.flat))
    return statistics.median(seconds[1:])


def saving(
    dump: Mapping[str, float], runs: Mapping[str, tuple[int, int, float]], forward: float
) -> dict[str, Any]:
    """Teacher passes and time of a table from one cache, and of the same systems online.

    Searches are not counted online: those systems search once in either case.

    Args:
        dump: `tokens` in the cache, `passes` over them, `seconds` of the dump.
        runs: row and seed to target tokens that were trained on, teacher passes over each of them
            that the system would take online, and seconds of training.
        forward: seconds of a teacher pass for each target token.
    """
    online = sum(tokens * passes for tokens, passes, _ in runs.values())
    training = sum(seconds for _, _, seconds in runs.values())
    return {
        "runs": len(runs),
        "teacher_tokens_cached": dump["tokens"] * dump["passes"],
        "teacher_tokens_online": online,
        "teacher_tokens_online_over_cached": online / (dump["tokens"] * dump["passes"]),
        "dump_over_training_time": dump["seconds"] / training,
        "online_over_cached_time": (training + online * forward) / (training + dump["seconds"]),
    }
