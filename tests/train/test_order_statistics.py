"""What a shuffled order must look like, by statistics that an unshuffled one fails.

Each is a correlation whose distribution under independence is known: over n pairs its mean is
-1 / (n + 1) (or 0) and its standard deviation close to 1 / sqrt(n), so CRITICAL of those deviations
happen by chance once in 16,000 times. Keys are fixed, so a test that passes passes always.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdcache.train.batches.order import epoch_windows, plan_digest, window_batches

CRITICAL = 4.0
SHARDS, SAMPLES, WINDOW_SHARDS, BATCH_TOKENS = 60, 200, 4, 300
PLAN = plan_digest("00112233445566778899aabbccddeeff", [(n, n + 1) for n in range(SHARDS)])
#: Tokens of every sample; they say nothing about where it stands in the corpus.
LENGTHS = np.random.default_rng(0).integers(3, 40, SHARDS * SAMPLES)


def epoch_order(seed: int, epoch: int, firsts: bool = False) -> list[np.ndarray]:
    """Corpus rows of each window of an epoch in training order; `firsts`: one of each batch."""
    order = []
    for number, shards in enumerate(epoch_windows(PLAN, SHARDS, WINDOW_SHARDS, seed, epoch)):
        rows = np.concatenate([np.arange(s * SAMPLES, (s + 1) * SAMPLES) for s in shards])
        batches = window_batches(PLAN, seed, epoch, number, [LENGTHS[rows]], BATCH_TOKENS)
        order.append(rows[[batch[0] for batch in batches] if firsts else np.concatenate(batches)])
    return order


def unshuffled(seed: int, epoch: int, firsts: bool = False) -> list[np.ndarray]:
    """The same windows in the corpus's own order, in batches of ten."""
    width, step = WINDOW_SHARDS * SAMPLES, 10 if firsts else 1
    return [np.arange(start, start + width, step) for start in range(0, SHARDS * SAMPLES, width)]


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def ranks(rows: np.ndarray) -> np.ndarray:
    """[M] 0 to M - 1: shards of a window are far apart, places within it are not."""
    return np.argsort(np.argsort(rows)).astype(float)


def neighbours(order, epochs: int = 6) -> float:
    """Deviations of the mean lag-1 correlation of corpus rows inside windows."""
    found = []
    for epoch in range(epochs):
        for rows in order(1, epoch):
            place = ranks(rows)
            found.append(correlation(place[:-1], place[1:]) + 1 / len(rows))
    return float(np.mean(found)) * math.sqrt(len(found) * len(rows))


def neighbouring_windows(order, epochs: int = 40) -> float:
    """Deviations of the mean lag-1 correlation of the windows' mean corpus rows."""
    found = []
    for epoch in range(epochs):
        means = np.array([rows.mean() for rows in order(1, epoch)])
        found.append(correlation(means[:-1], means[1:]) + 1 / len(means))
    return float(np.mean(found)) * math.sqrt(len(found) * len(means))


def epochs_apart(order, seeds: tuple[int, int] = (1, 1), epochs: tuple[int, int] = (0, 1)) -> float:
    """Deviations of the correlation of a sample's places in two epochs."""
    places = []
    for seed, epoch in zip(seeds, epochs, strict=True):
        rows = np.concatenate(order(seed, epoch))
        place = np.empty(len(rows))
        place[rows] = np.arange(len(rows))
        places.append(place)
    # Samples of a shard share its window, so shards are the independent pairs.
    return correlation(*places) * math.sqrt(SHARDS)


def places_inside_windows(order, seed: int = 1) -> float:
    """Deviations of the correlation of a sample's places inside its windows in two epochs.

    Of samples that no batch of the first epoch has in common: a batch moves as one.
    """
    places = []
    chosen = np.concatenate(order(seed, 0, firsts=True))
    for epoch in (0, 1):
        place = np.empty(SHARDS * SAMPLES)
        for rows in order(seed, epoch):
            place[rows] = np.arange(len(rows))
        places.append(place[chosen])
    return correlation(*places) * math.sqrt(len(chosen))


STATISTICS = {
    "neighbours": neighbours,
    "neighbouring windows": neighbouring_windows,
    "epochs": epochs_apart,
    "places inside windows": places_inside_windows,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_the_order_is_as_good_as_independent(name):
    assert abs(STATISTICS[name](epoch_order)) < CRITICAL


@pytest.mark.parametrize("name", STATISTICS)
def test_an_unshuffled_order_is_found_out(name):
    assert abs(STATISTICS[name](unshuffled)) > 1.5 * CRITICAL


def test_seeds_and_epochs_are_added_nowhere():
    """Seed 2 at epoch 0 is not seed 1 at epoch 1, nor near it."""
    assert abs(epochs_apart(epoch_order, seeds=(1, 2), epochs=(1, 0))) < CRITICAL
    seen = {
        tuple(np.concatenate(epoch_order(seed, epoch))[:50])
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(seen) == 16


def test_every_sample_once_per_epoch():
    for epoch in range(3):
        rows = np.concatenate(epoch_order(7, epoch))
        assert np.array_equal(np.sort(rows), np.arange(SHARDS * SAMPLES))
