"""Paired tests of a run against another on the same samples: is the difference chance?"""

# M samples, R resamplings

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NoReturn, cast

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest
from tqdm import tqdm

from kdcache.progress import progress
from kdcache.train.evaluation.baseline import Baseline
from kdcache.train.evaluation.predictions import Predictions
from kdcache.train.evaluation.tasks import MEANS, scored
from kdcache.train.evaluation.text_scores import TextScores

#: Of the resamplings; sacreBLEU's.
SEED = 12345
Said = Predictions | TextScores
#: Scores of samples, or of some of them.
Metrics = Callable[[Any, np.ndarray | None], dict[str, float]]


def paired_test(
    hypotheses: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[str],
    num_samples: int = 1000,
) -> dict[str, Any]:
    """Paired bootstrap resampling of a system against a baseline.

    Args:
        hypotheses: the system's.
        baseline: the baseline's, same sentences.
        references: one per sentence.
        num_samples: bootstrap samples.

    Returns:
        For bleu and chrf: `score`, `baseline`, `difference`, `p_value`, half-widths of the 95%
        intervals (`interval`, `baseline_interval`) and the test's `signature`.

    Source: Koehn (2004), as sacrebleu.significance does it.
    """
    systems: list[tuple[str, Sequence[str]]] = [
        ("baseline", list(baseline)),
        ("system", list(hypotheses)),
    ]
    metrics = {
        "bleu": BLEU(references=[list(references)]),
        "chrf": CHRF(references=[list(references)]),
    }
    test = PairedTest(systems, metrics, None, test_type="bs", n_samples=num_samples)
    signatures, scores = test()
    found: dict[str, Any] = {}
    for key, name in zip(metrics, signatures, strict=True):
        # Results, but typed as strings too: the list of the systems' names is one of them.
        base, system = cast("list[Any]", scores[name])
        found[key] = {
            "score": float(system.score),
            "baseline": float(base.score),
            "difference": float(system.score - base.score),
            "p_value": float(system.p_value),
            "interval": float(system.ci),
            "baseline_interval": float(base.ci),
            "signature": str(signatures[name]),
        }
    return found


def compare(
    said: Mapping[str, Said], baseline: Baseline, num_samples: int = 1000
) -> dict[str, Any]:
    """Paired bootstrap resampling of what a run says of each sample against a baseline.

    As many samples as there are, drawn with replacement, the same for both runs; of a ranking
    queries, each with all of its candidates. sacreBLEU draws the same of as many translations.

    Args:
        said: what the run says by task, under an empty name that of a student of one task or of
            a language model.
        baseline: that was checked against them.
        num_samples: resamplings.

    Returns:
        num_units and unit (text or query), num_resamplings, seed, and for every metric what
        `difference` returns, of an accuracy over texts also what `mcnemar` does. Language models
        that have other tokens are compared by their words alone. Of a run of several tasks all this
        by task under `tasks`, for those that both have, and for the means `score` and `loss` what
        `difference` returns where both have the same tasks.

    Source: Koehn (2004).
    """
    generator = np.random.default_rng(SEED)
    shared = [name for name in said if name in baseline.said]
    metrics: Metrics = scored if "" not in said else lambda one, chosen: one.metrics(chosen)
    tests, drawn = {}, {}
    with progress(num_samples * len(shared), "paired bootstrap", "sample") as bar:
        for name in shared:
            both = said[name], baseline.said[name]
            drawn[name] = _drawn(both, metrics, num_samples, generator, bar)
            tests[name] = _test(both, drawn[name])
    if "" in said:
        return tests[""]
    found: dict[str, Any] = {"tasks": tests}
    if set(said) == set(baseline.result["tasks"]):
        for key in MEANS:
            found[key] = difference(np.mean([one[key] for one in drawn.values()], axis=0))
    return found


def resampled(
    unit: np.ndarray, num_samples: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Samples drawn with replacement, those of a unit together.

    Args:
        unit: [M] int64, equal for samples of one unit.
        num_samples: R.
        generator: of the draws.

    Yields:
        R times [N] int64 numbers of samples, of as many units as there are.
    """
    order = np.argsort(unit, kind="stable")
    _, starts, sizes = np.unique(unit[order], return_index=True, return_counts=True)
    for _ in range(num_samples):
        drawn = generator.integers(0, len(sizes), len(sizes))
        counts = sizes[drawn]
        ends = counts.cumsum()
        yield order[np.repeat(starts[drawn] - ends + counts, counts) + np.arange(ends[-1])]


def difference(drawn: np.ndarray) -> dict[str, Any]:
    """What resamplings say of a difference.

    Args:
        drawn: [2, 1 + R] float64, the scores of the run and of the other: of all samples, and in
            each resampling.

    Returns:
        `score`, `baseline`, `difference` (score less baseline), `difference_interval` (lowest and
        highest of the middle 95% of the differences), half-widths of the 95% intervals of both
        scores (`interval`, `baseline_interval`), and `p_value`: how often, over R + 1, differences
        are as far from their own mean, to either side, as the difference is from 0; 1 more than
        that often, so it is never 0.
    """
    (score, baseline), (own, other) = drawn[:, 0].tolist(), drawn[:, 1:]
    apart = own - other
    far = int((np.abs(apart - apart.mean()) >= abs(score - baseline)).sum())
    low, high = _middle(apart)
    halves = [(ends[1] - ends[0]) / 2 for ends in map(_middle, (own, other))]
    return {
        "score": score,
        "baseline": baseline,
        "difference": score - baseline,
        "difference_interval": [low, high],
        "interval": halves[0],
        "baseline_interval": halves[1],
        "p_value": (far + 1) / (len(apart) + 1),
    }


def mcnemar(right: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """McNemar's exact test of two accuracies: a binomial test of the samples that one has right.

    Args:
        right: [M] bool, what the run has right.
        other: [M] bool, what the other has.

    Returns:
        `right_alone` and `baseline_right_alone`, samples that one of them has right, and
        `mcnemar_p_value`, two-sided: how probable so uneven a split of them is, or a less even one,
        if either is as likely. 1 where there are none.

    Source: McNemar 1947, Note on the sampling error of the difference between correlated
    proportions or percentages.
    """
    alone = int((right & ~other).sum()), int((other & ~right).sum())
    count, below, ways = sum(alone), 0, 1
    for number in range(min(alone) + 1):
        below += ways
        ways = ways * (count - number) // (number + 1)
    return {
        "right_alone": alone[0],
        "baseline_right_alone": alone[1],
        "mcnemar_p_value": min(1.0, 2 * below / 2**count),  # of whole numbers: no rounding before
    }


def _drawn(
    both: tuple[Said, Said],
    metrics: Metrics,
    num_samples: int,
    generator: np.random.Generator,
    bar: tqdm[NoReturn],
) -> dict[str, np.ndarray]:
    """By metric [2, 1 + R] float64, see `difference`."""
    own, other = both
    keys = list(metrics(own, None))
    if isinstance(own, TextScores) and isinstance(other, TextScores):
        # A mean over other tokens is of something else; words are the corpus' own.
        same = np.array_equal(own.num_tokens, other.num_tokens)
        keys = keys if same else ["word_perplexity"]
    found = {key: np.zeros((2, 1 + num_samples)) for key in keys}
    draws = resampled(own.unit, num_samples, generator)
    for number, chosen in enumerate(chain([None], draws)):
        for side, one in enumerate(both):
            values = metrics(one, chosen)
            for key in keys:
                found[key][side, number] = values[key]
        bar.update(number > 0)
    return found


def _test(both: tuple[Said, Said], drawn: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The tests of one task."""
    own, other = both
    num_units = len(np.unique(own.unit))
    found: dict[str, Any] = {
        "num_units": num_units,
        "unit": "text",
        "num_resamplings": next(iter(drawn.values())).shape[1] - 1,
        "seed": SEED,
        **{key: difference(values) for key, values in drawn.items()},
    }
    if isinstance(own, Predictions) and isinstance(other, Predictions):
        if own.task.kind == "ranking":
            found["unit"] = "query"
        # Candidates of a query are not independent, as the binomial has it.
        if "accuracy" in found and num_units == len(own.rows):
            found["accuracy"] |= mcnemar(own.said == own.gold, other.said == other.gold)
    return found


def _middle(values: np.ndarray) -> tuple[float, float]:
    """The ends of the middle 95% of some values, as sacreBLEU has them."""
    held, outside = np.sort(values), len(values) // 40
    return float(held[outside]), float(held[len(held) - outside - 1])
