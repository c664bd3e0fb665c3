"""What noise on the weights does to scores: models in wide minima of the loss lose less."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kdcache.formats.keyed import text_key
from kdcache.progress import progress
from kdcache.recipe import PerturbSection
from kdcache.train.students.student import fixed_tables


@contextmanager
def perturbed(model: Any, sigma: float, seed: int, over: str) -> Iterator[None]:
    """Within it, every learned weight has moved: theta_i + m sigma z_i, z_i normal.

    m is of the named parameter that the weight is of, so shared ones move once. z is a function of
    seed and name alone, the same for every sigma and device.

    Args:
        model: of transformers.
        sigma: standard deviation, in units of m.
        seed: of z.
        over: mean: m is the parameter's mean, as LightPAFF has it. mean_abs: the mean of its
            absolute values, since means are near zero.

    Source: Song et al. 2020, section 6.2.
    """
    fixed = {id(table) for table in fixed_tables(model)}
    kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if id(weight) in fixed:
                continue
            kept.append((weight, weight.clone()))
            generator = torch.Generator().manual_seed(text_key(seed, "perturb", name) >> 1)
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            size = weight.abs().mean() if over == "mean_abs" else weight.mean()
            weight.add_(noise * (size * sigma))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, own in kept:
                weight.copy_(own)


def robustness(
    model: Any, section: PerturbSection | None, scores: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Scores under noise, over several draws of it.

    Args:
        model: of transformers.
        section: how much noise, and how often; None: there is nothing to do.
        scores: of the model as it is; numbers count, but for those that begin with num_.

    Returns:
        Nothing, or `perturbed` with over, seeds, and for each sigma under its own name the mean
        and the sample standard deviation of every score over the seeds (0 of a single one).
    """
    if section is None:
        return {}
    found: dict[str, Any] = {"over": section.over, "seeds": section.seeds}
    with progress(len(section.sigmas) * len(section.seeds), "perturb", "model") as bar:
        for sigma in section.sigmas:
            rows = []
            for seed in section.seeds:
                with perturbed(model, sigma, seed, section.over):
                    rows.append(numbers(scores()))
                bar.update()
            found[f"sigma={sigma:g}"] = {
                name: {
                    "mean": statistics.mean(values := [row[name] for row in rows]),
                    "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
                }
                for name in rows[0]
            }
    return {"perturbed": found}


def numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Those of a result that are scores."""
    return {k: v for k, v in scores.items() if isinstance(v, float) and not k.startswith("num_")}
