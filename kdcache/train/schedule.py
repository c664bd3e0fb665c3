"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from kdcache.recipe import ScheduleSection


def learning_rate(section: ScheduleSection, peak: float, step: int, total_steps: int) -> float:
    """Learning rate of one optimiser step.

    Linear warm-up to the peak over `warmup_steps`, then the named decay: inverse_sqrt falls
    as sqrt(warmup_steps / step), cosine reaches `final_ratio` of the peak at the last step.

    Args:
        section: the recipe's schedule.
        peak: peak learning rate.
        step: from 1.
        total_steps: last step of the run.

    Source: inverse_sqrt: Vaswani et al. 2017, eq. 3; cosine: Loshchilov & Hutter 2017, eq. 5.
    """
    warmup = section.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if section.name == "constant":
        return peak
    if section.name == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / step)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = section.final_ratio
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
