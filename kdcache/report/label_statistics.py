"""How the soft labels of a cache are distributed: entropy, mass of the head, calibration.

# M samples, N labels, E entries, K most entries looked at, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kdcache.formats.cache import Cache
from kdcache.formats.codes import entropy_nats, exact_log_probs, gold_log_probs
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import join_ids
from kdcache.formats.signals import LogitsRecord
from kdcache.report.commits import Commits
from kdcache.report.signals import SignalView

#: Labels that are looked at, at most; they are spread over the measured shards.
MOST_LABELS = 200_000
#: Heaviest entries of a label that are told apart.
MOST_ENTRIES = 32


@dataclass(frozen=True)
class LabelStatistics:
    """What some labels of a logits signal say.

    Attributes:
        entropy: [N] float64 nats, the teacher's.
        target: [N] float64, probability of the target.
        head: [N] float64, mass of the entries that are kept exactly; None without such.
        entries: [N] int64, entries kept, exact and drawn.
        kept: [K] float64, mean mass of the k heaviest exact entries, k from 1; None likewise.
        sure: [N] float64, probability of the likeliest id, 0 where none is kept; None likewise.
        hit: [N] bool, whether it is the target; None where labels are not of a stream's own tokens.
    """

    entropy: np.ndarray
    target: np.ndarray
    head: np.ndarray | None
    entries: np.ndarray
    kept: np.ndarray | None
    sure: np.ndarray | None
    hit: np.ndarray | None


def label_statistics(record: LogitsRecord, commits: Commits) -> LabelStatistics | None:
    """Look at labels of the measured shards; None where there are none yet.

    Args:
        record: of a logits signal.
        commits: of the signal.
    """
    parts, left = [], MOST_LABELS
    for part in _parts(record, commits, max(1, MOST_LABELS // max(1, len(commits.measured)))):
        parts.append(part)
        left -= len(part.entropy)
        if left <= 0:
            break
    parts = [part for part in parts if len(part.entropy)]
    if not parts:
        return None

    def joined(name: str) -> np.ndarray | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else np.concatenate(found)

    kept = None
    if parts[0].kept is not None:
        weights = [len(part.entropy) for part in parts]
        kept = np.average([part.kept for part in parts], axis=0, weights=weights)
    found = {name: joined(name) for name in ("entropy", "target", "head", "entries", "sure", "hit")}
    return LabelStatistics(kept=kept, **found)  # type: ignore[arg-type]


def _parts(record: LogitsRecord, commits: Commits, most: int) -> Iterator[LabelStatistics]:
    """Statistics of the first labels of every measured part."""
    view = SignalView(commits.cache, record, commits)
    for shard, samples, columns in view.parts():
        lengths = columns["tokens"].lengths
        count = int(np.searchsorted(np.cumsum(lengths), most, side="right")) + 1
        some = slice(samples.start, samples.start + min(count, len(lengths)))
        kept = {
            name: _first(column, int(lengths[:count].sum()), count)
            for name, column in columns.items()
        }
        yield _statistics(record, kept, _targets(commits.cache, record, shard, some))


def _first(column: Ragged, num_labels: int, count: int) -> dict[str, np.ndarray]:
    """Fields of the first samples of a column."""
    end = int(column.offsets[min(count, len(column))])
    return {name: array[:end] for name, array in column.fields.items()}


def _targets(cache: Cache, record: LogitsRecord, shard: int, samples: slice) -> np.ndarray | None:
    """[N] ids that labels of some samples of a shard predict; None where that is not plain."""
    if record.at != "targets" or record.hypotheses is not None:
        return None
    stream = cache.samples(shard).streams[record.stream].part(samples.start, samples.stop)
    return join_ids(stream.fields)


def _statistics(
    record: LogitsRecord, columns: dict[str, dict[str, np.ndarray]], targets: np.ndarray | None
) -> LabelStatistics:
    """Of some labels, all their columns in the same order."""
    tokens = columns["tokens"]
    target = np.exp(gold_log_probs(tokens["gold"]).astype(np.float64))
    num = len(target)
    entries = np.zeros(num, dtype=np.int64)
    for name in ("exact", "drawn"):
        if f"num_{name}" in tokens:
            entries += tokens[f"num_{name}"].astype(np.int64)
    head = kept = sure = hit = None
    if record.codec.has_exact:
        if record.codec.name == "full":
            counts = np.full(num, record.vocab_size)
            ids = np.tile(np.arange(record.vocab_size), num)
            entries = counts
        else:
            counts = tokens["num_exact"].astype(np.int64)
            ids = join_ids(columns["exact"])
        codes = columns["exact"]["code"].reshape(-1)
        values = np.exp(exact_log_probs(record.codec, codes).astype(np.float64))
        head = _sums(values, counts)
        kept, sure, first = _heaviest(values, ids, counts)
        if targets is not None and len(targets) == num:
            hit = first == targets
    entropy = entropy_nats(tokens["entropy"], record.vocab_size).astype(np.float64)
    return LabelStatistics(entropy, target, head, entries, kept, sure, hit)


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[N] sums of consecutive runs of values."""
    ends = np.concatenate([[0], np.cumsum(values)])
    stops = np.cumsum(counts)
    sums: np.ndarray = ends[stops] - ends[stops - counts]
    return sums


def _heaviest(
    values: np.ndarray, ids: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean mass of the k heaviest entries of a label ([K]), and of each the heaviest and its id.

    The heaviest of a label without entries weighs 0, and its id is -1.
    """
    rows = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-values, rows))
    starts = np.cumsum(counts) - counts
    ranks = np.arange(len(values)) - np.repeat(starts, counts)
    values, ids = values[order], ids[order]
    sums = np.bincount(np.minimum(ranks, MOST_ENTRIES), values, MOST_ENTRIES + 1)[:MOST_ENTRIES]
    sure, first = np.zeros(len(counts)), np.full(len(counts), -1, dtype=np.int64)
    sure[rows[ranks == 0]], first[rows[ranks == 0]] = values[ranks == 0], ids[ranks == 0]
    return np.cumsum(sums) / max(1, len(counts)), sure, first


def reliability_bins(
    sure: np.ndarray, hit: np.ndarray, bins: int = 10
) -> list[tuple[float, float, int]]:
    """Mean confidence, share right and number, of each bin of equal width that has any.

    Args:
        sure: [N] in 0 to 1.
        hit: [N] bool.
        bins: how many.
    """
    numbers = np.minimum((sure * bins).astype(np.int64), bins - 1)
    return [
        (float(sure[here].mean()), float(hit[here].mean()), int(here.sum()))
        for here in (numbers == n for n in range(bins))
        if here.any()
    ]
