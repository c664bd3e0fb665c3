"""Re-encoding without the teacher, beside dumping at the smaller codec at once.

Every position is labelled under several seeds. Per way: noise (root mean square over positions of
the L2 norm of decoded label minus teacher, at T = 1) of the re-encoded labels over that of labels
dumped directly (`noise_ratio`); the squared norm of the bias, estimated without bias itself from
the means over the seeds, over the squared noise (`bias_share`, with its standard error over the
positions: unbiased labels have 0 in the mean); label bytes per token of both and of what was
stored; time of the re-encoding over that of the direct coding from logits (softmax and all; the
teacher's forward not counted). "the dump's numbers" re-encodes with the random numbers of the dump,
which purposes of their own prevent. `noise_ratio_1_8` is threshold 1/32 to 1/8.

With KDCACHE_DATA the teacher is models/tatoeba-deen on data/tatoeba_deen/dev.{de,en}; without
it the distributions are generated (Zipf-like logits).
"""

# N positions of a batch, B samples, V vocabulary

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_size import KNOTS, Batch, generated_batches, label_bytes, real_batches
from setting import log, report
from torch import Tensor

from kdcache.compile import reencode as module
from kdcache.compile.reencode import reencode, reencoded_record
from kdcache.dump.codecs.select import encode_logits
from kdcache.formats.codec import Codec, FullCodec, SampledCodec, ThresholdCodec
from kdcache.formats.keyed import position_hash, sample_keys
from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.formats.signals import LogitsRecord, TeacherRecord
from kdcache.labels.coded_labels import LogitsSpec, coded_labels
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import densify
from kdcache.progress import progress

#: Seeds of every position.
REPEATS = 8

#: Name to what is stored and what it becomes.
WAYS: dict[str, tuple[Codec, Codec]] = {
    "threshold 1/32 to 1/16": (ThresholdCodec(c=1 / 32), ThresholdCodec(c=1 / 16)),
    "threshold 1/32 to 1/8": (ThresholdCodec(c=1 / 32), ThresholdCodec(c=1 / 8)),
    "threshold 1/16 to 1/8": (ThresholdCodec(c=1 / 16), ThresholdCodec(c=1 / 8)),
    "full uint8 to threshold 1/16": (FullCodec(), ThresholdCodec(c=1 / 16)),
    "sampled 50 to 22": (SampledCodec(n=50), SampledCodec(n=22)),
}
SAME_NUMBERS = "threshold 1/32 to 1/8, the dump's numbers"
WAYS[SAME_NUMBERS] = WAYS["threshold 1/32 to 1/8"]


def record_of(codec: Codec, vocab_size: int, seed: int) -> LogitsRecord:
    """A record of labels that no cache holds."""
    digest = "0" * 32
    teacher = TeacherRecord(
        path="teacher",
        revision=None,
        digest=digest,
        config_digest=digest,
        model_type="marian",
        kind="encoder_decoder",
        dtype="float32",
    )
    return LogitsRecord(
        name="logits",
        stream="tgt",
        stream_digest=digest,
        at="targets",
        vocab_size=vocab_size,
        codec=codec,
        temperatures=KNOTS,
        seed=seed,
        teacher=teacher,
        recipe={},
        versions={},
    )


@dataclass
class Labels:
    """Coded labels of one batch as a cache holds them."""

    record: LogitsRecord
    columns: dict[str, Ragged]
    sample_ids: np.ndarray
    rows: np.ndarray

    def dense(self) -> Tensor:
        """[N, V] decoded at temperature 1."""
        record = self.record
        spec = LogitsSpec(record.codec, record.vocab_size, record.temperatures)
        return densify(decode(coded_labels(spec, self.columns)), record.vocab_size)


def dumped(batch: Batch, codec: Codec, first: int, seed: int) -> Labels:
    """A batch coded as `kdcache dump` does it."""
    record = record_of(codec, batch.teacher.shape[1], seed)
    rows = np.arange(first, first + len(batch.lengths))
    sample_ids = np.zeros((len(rows), 16), dtype=np.uint8)
    positions = segment_indices(np.zeros_like(batch.lengths), batch.lengths)
    hashes = []
    for purpose in ("draw", "round"):
        keys = sample_keys(seed, purpose, "logits", sample_ids, rows)
        hashed = position_hash(np.repeat(keys, batch.lengths), positions)
        hashes.append(torch.from_numpy(hashed.view(np.int64)))
    encoded = encode_logits(batch.teacher, batch.gold, *hashes, codec, KNOTS)
    ends = offsets_of(batch.lengths)
    offsets = {
        "tokens": ends,
        "exact": offsets_of(encoded.num_exact.numpy())[ends],
        "drawn": offsets_of(encoded.num_drawn.numpy())[ends],
    }
    columns = {name: Ragged(offsets[name], fields) for name, fields in encoded.to_host().items()}
    return Labels(record, columns, sample_ids, rows)


def reencoded(labels: Labels, codec: Codec, same_numbers: bool) -> Labels:
    """The labels re-encoded; with the dump's own random numbers if that is asked for."""
    own = module._purpose
    if same_numbers:
        dumps = {module.REDRAW: "draw", module.REROUND: "round"}
        module._purpose = lambda purpose, codec: dumps[purpose]
    try:
        new = reencoded_record(labels.record, codec)
        identity = labels.sample_ids, labels.rows
        columns = reencode(labels.columns, labels.record, new, *identity)
        return Labels(new, columns, *identity)
    finally:
        module._purpose = own


class Errors:
    """Sums over positions of the error of some labels, each labelled several times."""

    def __init__(self) -> None:
        self.num, self.bytes, self.seconds = 0, 0, 0.0
        self._squared: list[Tensor] = []
        self._bias: list[Tensor] = []

    def add(self, repeats: list[Labels], probs: Tensor, seconds: float) -> None:
        """Take in a batch under every seed."""
        total = torch.zeros_like(probs)
        squared = torch.zeros(len(probs))
        for labels in repeats:
            error = labels.dense().sub_(probs)
            total += error
            squared += error.square().sum(1)
            self.bytes += label_bytes(labels.columns)
        count = len(repeats)
        mean = (total / count).square().sum(1)
        # E|mean|^2 = |bias|^2 + variance / count, and both are known from the same repeats.
        self._bias.append((count * mean - squared / count) / (count - 1))
        self._squared.append(squared / count)
        self.num += count * len(probs)
        self.seconds += seconds

    @property
    def noise(self) -> float:
        """Root mean square of the error."""
        return math.sqrt(float(torch.cat(self._squared).double().mean()))

    def result(self) -> dict[str, float]:
        """Noise, bias and bytes."""
        squared, bias = (torch.cat(pieces).double() for pieces in (self._squared, self._bias))
        noise = float(squared.mean())
        return {
            "noise": self.noise,
            "bias_share": float(bias.mean()) / noise,
            "bias_share_error": float(bias.std()) / math.sqrt(len(bias)) / noise,
            "label_bytes_per_token": self.bytes / self.num,
        }


def timed(call: Any) -> tuple[list[Labels], float]:
    """What a call returns for every seed, and how long it took."""
    start = time.perf_counter()
    found = [call(repeat) for repeat in range(REPEATS)]
    return found, time.perf_counter() - start


def add_batch(sides: dict[str, Errors], name: str, batch: Batch, probs: Tensor, row: int) -> None:
    """One way over one batch, whose first sample has this row."""
    old, new = WAYS[name]
    stored, _ = timed(lambda seed: dumped(batch, old, row, seed))
    # Seeds of its own, so that one side's luck is not the other's.
    direct, direct_seconds = timed(lambda seed: dumped(batch, new, row, REPEATS + seed))
    same = name == SAME_NUMBERS
    again, seconds = timed(lambda seed: reencoded(stored[seed], new, same))
    sides["stored"].add(stored, probs, 0.0)
    sides["direct"].add(direct, probs, direct_seconds)
    sides["reencoded"].add(again, probs, seconds)


def measure(root: Path | None, num_pairs: int) -> dict[str, Any]:
    """Every way over all positions."""
    batches = generated_batches(num_pairs) if root is None else real_batches(root, num_pairs)
    tallies = {
        name: {side: Errors() for side in ("stored", "direct", "reencoded")} for name in WAYS
    }
    row = vocab_size = 0
    with progress(num_pairs, "ways", "pair") as bar:
        for batch in batches:
            vocab_size = batch.teacher.shape[1]
            probs = torch.softmax(batch.teacher, dim=-1)
            for name, sides in tallies.items():
                add_batch(sides, name, batch, probs, row)
            row += len(batch.lengths)
            bar.update(len(batch.lengths))
    ways = {}
    for name, sides in tallies.items():
        ways[name] = {
            **{side: errors.result() for side, errors in sides.items()},
            "noise_ratio": sides["reencoded"].noise / sides["direct"].noise,
            "time_ratio": sides["reencoded"].seconds / sides["direct"].seconds,
        }
    return {
        "noise_ratio_1_8": ways["threshold 1/32 to 1/8"]["noise_ratio"],
        "positions": tallies[SAME_NUMBERS]["stored"].num // REPEATS,
        "seeds": REPEATS,
        "pairs": num_pairs,
        "vocab_size": vocab_size,
        "ways": ways,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{'way':<42}{'noise':>8}{'direct':>8}{'ratio':>8}{'bias share':>18}"
        f"{'stored':>9}{'bytes':>8}{'direct':>8}{'time':>7}"
    ]
    for name, row in result["ways"].items():
        again, direct, stored = row["reencoded"], row["direct"], row["stored"]
        lines.append(
            f"{name:<42}{again['noise']:>8.4f}{direct['noise']:>8.4f}{row['noise_ratio']:>8.3f}"
            f"{again['bias_share']:>9.4f} +-{again['bias_share_error']:.4f}"
            f"{stored['label_bytes_per_token']:>9.1f}{again['label_bytes_per_token']:>8.1f}"
            f"{direct['label_bytes_per_token']:>8.1f}{row['time_ratio']:>7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="25 pairs instead of 200")
    parser.add_argument("--pairs", type=int, help="how many pairs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    num_pairs = arguments.pairs or (25 if arguments.quick else 200)
    root = os.environ.get("KDCACHE_DATA")
    if root is None:
        log("KDCACHE_DATA is not set: the distributions are generated")
    result = measure(None if root is None else Path(root), num_pairs)
    result = {"benchmark": "bench_reencode", "generated_data": root is None, **result}
    print(table(result))
    report(result, "bench_reencode", save=arguments.save)


if __name__ == "__main__":
    main()
