"""The learning rate, and the numbers of terms, as functions of the step."""

from __future__ import annotations

import math

from kdcache.recipe import ScheduleSection, ValueSchedule


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


def value_at(begin: float, schedule: ValueSchedule | None, step: int, total_steps: int) -> float:
    """A number of a term at one optimiser step.

    Args:
        begin: the number that the term gives.
        schedule: how it moves; None: it stays.
        step: from 1.
        total_steps: last step of the run.
    """
    if schedule is None:
        return begin
    if schedule.final is None:
        return [begin, *(jump.value for jump in schedule.jumps if jump.step <= step)][-1]
    first, last = schedule.first_step, schedule.last_step or total_steps
    done = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    if schedule.shape == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return begin + (schedule.final - begin) * done
