"""How long a model takes with one text at a time, on its device and on the CPU."""

# L tokens

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kdcache.models.multi_task import MultiTaskModel
from kdcache.progress import progress
from kdcache.recipe import EvaluateSection
from kdcache.train.students.student import embedding_rows, max_positions

#: Tokens of the text that is timed, where the recipe does not say.
TEXT_TOKENS, CAUSAL_TOKENS = 128, 512


def timed(
    model: Any, run: Callable[[int], object], count: int, more: dict[str, int]
) -> dict[str, Any]:
    """Seconds of some runs, one after another, on the model's device and on the CPU.

    Args:
        model: on its device, where it is again afterwards.
        run: takes a number from 0; what it returns is on the host, so that it has come to its end.
        count: of runs; one more warms up and is not counted. 0: none.
        more: what else is said of them.

    Returns:
        latency_seconds with median, p90, num_sentences and `more`; where the model is not on the
        CPU also latency_cpu_seconds. None in place of both for a count of 0.
    """
    if count == 0:
        return {"latency_seconds": None}
    device = model.device
    found: dict[str, Any] = {"latency_seconds": _seconds(run, count) | more}
    if device.type != "cpu":
        model.to("cpu")
        found["latency_cpu_seconds"] = _seconds(run, count) | more
        model.to(device)
    return found


def text_latency(model: Any, section: EvaluateSection, kind: str) -> dict[str, Any]:
    """`timed` of forward passes over one text of a given length, all its logits made.

    Args:
        model: a masked LM, causal LM, classifier or model of several tasks (with one head).
        section: how many passes, and of how many tokens.
        kind: of the student.
    """
    causal = kind == "causal_lm"
    length = section.latency_tokens or (CAUSAL_TOKENS if causal else TEXT_TOKENS)
    length = min(length, max_positions(model) or length)
    rows, _ = embedding_rows(model)
    # From the upper half: what the tokens are does not matter, but padding might be treated so.
    ids = (torch.arange(length)[None] % (rows - rows // 2)) + rows // 2  # [1, L]
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"use_cache": False} if causal else {}
    if isinstance(model, MultiTaskModel):
        options["task"] = next(iter(model.heads))  # all heads are about as large

    def run(_: int) -> object:
        read = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        with torch.inference_mode():
            return model(**read, **options).logits[:, -1:].cpu()

    return timed(model.eval(), run, section.latency_sentences, {"num_tokens": length})


def _seconds(run: Callable[[int], object], count: int) -> dict[str, float]:
    """Median and p90 of some runs."""
    seconds: list[float] = []
    with progress(count + 1, "time one at a time", "text") as bar:
        for number in [0, *range(count)]:  # the first one warms up
            began = time.perf_counter()
            run(number)
            seconds.append(time.perf_counter() - began)
            bar.update()
    return _spread(seconds[1:])


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Of one or more."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else None
    p90 = deciles[-1] if deciles else seconds[0]
    return {"median": statistics.median(seconds), "p90": p90, "num_sentences": len(seconds)}
