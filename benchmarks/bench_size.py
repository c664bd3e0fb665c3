"""What a soft label costs on disk and what it is worth, codec by codec.

Per codec: bytes per token of its Arrow file (all columns) and of its entries and counts
alone, entries per token, noise (root mean square over positions of the L2 norm of decoded
label minus teacher, at T = 1), bias (mean L1 norm; 0 in expectation where entries are drawn,
else measured; also with the head renormalised), the error of log-sum-exp from the stored tail
sums, and noise over |p - t| at T = 0.5, 1, 2, 5, 10 with kdcache's own choice of tail. p is a
stand-in for a student: the same teacher reading sources in which every third token is replaced
by the unknown token. Rows with temperatures in brackets draw for all of these; the choice there
is the drawn entries (unbiased), and `noise_over_signal_uniform` has the other, the exact head
with a uniform tail (biased). `label_bytes_over_sampled`: label bytes of threshold at the noise of
sampled(50), read off the measured curve, over those of sampled(50).

With KDCACHE_DATA the teacher is models/tatoeba-deen on data/tatoeba_deen/dev.{de,en}; without
it the distributions are generated (Zipf-like logits, the student's a disturbed copy).
"""

# N positions of a batch, B samples, V vocabulary

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from setting import log, report
from torch import Tensor

from kdcache.dump import batches
from kdcache.dump.codecs.select import encode_logits
from kdcache.dump.teachers.loading import load_teacher
from kdcache.dump.tokenize import Tokenizer
from kdcache.formats.codec import (
    Codec,
    FullCodec,
    NucleusCodec,
    SampledCodec,
    ThresholdCodec,
    TopKCodec,
)
from kdcache.formats.codes import exact_log_probs
from kdcache.formats.keyed import position_hash, text_key
from kdcache.formats.knots import interpolation_weights
from kdcache.formats.ragged import Ragged, concat, offsets_of
from kdcache.formats.schema import logits_schema, ragged_batch
from kdcache.labels.coded_labels import CodedLabels, LogitsSpec, coded_labels
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import densify
from kdcache.progress import progress
from kdcache.recipe import TeacherSection

KNOTS = (0.5, 1.0, 2.0, 5.0)
TEMPERATURES = (0.5, 1.0, 2.0, 5.0, 10.0)
LSE_TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0)
CURVE = (4, 8, 12, 16, 24, 32, 48)
SET = (1.0, 2.0, 5.0)
SET_NAME = "(1, 2, 5)"


def codecs() -> dict[str, Codec]:
    """Name to codec, in the order of the table."""
    table: dict[str, Codec] = {f"threshold 1/{k}": ThresholdCodec(c=1 / k) for k in CURVE}
    table |= {
        f"threshold 1/{k} {SET_NAME}": ThresholdCodec(c=1 / k, temperatures=SET) for k in (16, 32)
    }
    table |= {f"sampled {n}": SampledCodec(n=n) for n in (10, 22, 50)}
    table |= {f"topk {k}": TopKCodec(k=k) for k in (8, 12, 32, 128)}
    return table | {"nucleus 0.95": NucleusCodec(p=0.95), "full": FullCodec()}


@dataclass
class Batch:
    """Logits of teacher and stand-in student at the positions of some samples."""

    teacher: Tensor  # [N, V] float32
    student: Tensor  # [N, V] float32
    gold: Tensor  # [N] int64
    lengths: np.ndarray  # [B] positions of each sample


def real_batches(root: Path, num_pairs: int) -> Iterator[Batch]:
    """The shared teacher over development pairs."""
    path = root / "models/tatoeba-deen"
    teacher = load_teacher(TeacherSection(path=str(path), device="cpu", dtype="float32"))
    tokenizer = Tokenizer.load(str(path))
    streams = []
    for language, target in (("de", False), ("en", True)):
        lines = (root / "data/tatoeba_deen" / f"dev.{language}").read_text("utf-8").split("\n")
        streams.append(tokenizer.encode_ragged(lines[:num_pairs], target))
    src, tgt = streams
    unknown = tokenizer.special_ids["unk_id"]
    for rows in batches.plan_batches(src.lengths, tgt.lengths, 2048):
        read, labels = (batches.pad(stream, rows, 0) for stream in streams)
        batch = batches.Batch.from_numpy(*labels, None, *read)
        corrupted = batch.source_ids.clone()
        corrupted[:, ::3] = unknown
        yield Batch(
            teacher=teacher.logits(batch, batch.mask),
            student=teacher.logits(replace(batch, source_ids=corrupted), batch.mask),
            gold=batch.ids[batch.mask],
            lengths=tgt.lengths[rows],
        )


def generated_batches(num_pairs: int, vocab_size: int = 8000) -> Iterator[Batch]:
    """Zipf-like rows of random sharpness, 10 positions a pair."""
    generator = torch.Generator().manual_seed(1)
    zipf = -1.1 * torch.arange(1, vocab_size + 1).log()
    for start in range(0, num_pairs, 20):
        num = 10 * min(20, num_pairs - start)
        sharpness = 0.7 + 2 * torch.rand(num, 1, generator=generator) ** 2
        noise = torch.randn(2, num, vocab_size, generator=generator)
        logits = sharpness * (zipf + noise[0])
        yield Batch(
            teacher=logits,
            student=logits + noise[1],
            gold=logits.argmax(dim=-1),
            lengths=np.full(num // 10, 10, dtype=np.int64),
        )


@dataclass
class Tally:
    """Sums over positions for one codec."""

    spec: LogitsSpec
    columns: dict[str, list[Ragged]] = field(default_factory=dict)
    squared: dict[float, float] = field(default_factory=dict)
    squared_uniform: dict[float, float] = field(default_factory=dict)
    l1: float = 0.0
    l1_renormalised: float = 0.0
    lse_errors: dict[float, list[Tensor]] = field(default_factory=dict)

    def add(self, batch: Batch, first: int, probs: dict[float, Tensor], lse: Tensor) -> None:
        """Encode, decode and compare one batch whose first position has this number."""
        coded = self._encode(batch, first)
        codec = self.spec.codec
        for temperature, expected in probs.items():
            if codec.name == "sampled" and temperature != 1:
                continue
            error = densify(decode(coded, temperature), self.spec.vocab_size).sub_(expected)
            squared = float(error.square().sum())
            self.squared[temperature] = self.squared.get(temperature, 0.0) + squared
            if codec.has_drawn_log_probs:
                label = densify(decode(coded, temperature, "uniform"), self.spec.vocab_size)
                squared = float(label.sub_(expected).square_().sum())
                before = self.squared_uniform.get(temperature, 0.0)
                self.squared_uniform[temperature] = before + squared
            if temperature == 1 and not codec.has_drawn:
                self.l1 += float(error.abs_().sum())
        if codec.has_exact:
            renormalised = densify(decode(coded, 1.0, "renormalise"), self.spec.vocab_size)
            self.l1_renormalised += float(renormalised.sub_(probs[1.0]).abs_().sum())
        if codec.has_tail:
            for i, temperature in enumerate(LSE_TEMPERATURES):
                error = (log_sum_exp(coded, temperature) - lse[:, i]).abs()
                self.lse_errors.setdefault(temperature, []).append(error)

    def _encode(self, batch: Batch, first: int) -> CodedLabels:
        """Labels of a batch as a reader gets them; their columns are kept for the file."""
        positions = np.arange(first, first + len(batch.gold))
        draw, rounding = (
            torch.from_numpy(
                position_hash(
                    np.full(len(positions), text_key(purpose), dtype=np.uint64), positions
                ).view(np.int64)
            )
            for purpose in ("draw", "round")
        )
        spec = self.spec
        encoded = encode_logits(batch.teacher, batch.gold, draw, rounding, spec.codec, KNOTS)
        ends = offsets_of(batch.lengths)
        offsets = {
            "tokens": ends,
            "exact": offsets_of(encoded.num_exact.numpy())[ends],
            "drawn": offsets_of(encoded.num_drawn.numpy())[ends],
        }
        columns = {
            name: Ragged(offsets[name], fields) for name, fields in encoded.to_host().items()
        }
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column)
        return coded_labels(spec, columns)

    def result(self, num_positions: int, distance: dict[float, float]) -> dict[str, Any]:
        """The row of the table."""
        codec = self.spec.codec
        columns = {name: concat(pieces) for name, pieces in self.columns.items()}
        entries = {
            name: len(next(iter(column.fields.values())))
            for name, column in columns.items()
            if name != "tokens"
        }
        noise = {t: math.sqrt(total / num_positions) for t, total in self.squared.items()}
        uniform = {t: math.sqrt(total / num_positions) for t, total in self.squared_uniform.items()}
        errors = {t: torch.cat(pieces) for t, pieces in self.lse_errors.items()}
        row = {
            "bytes_per_token": file_bytes(self.spec, columns) / num_positions,
            "label_bytes_per_token": label_bytes(columns) / num_positions,
            "entries_per_token": sum(entries.values()) / num_positions,
            "exact_per_token": entries.get("exact", 0) / num_positions,
            "noise": noise[1.0],
            "bias_l1": 0.0 if codec.has_drawn else self.l1 / num_positions,
            "bias_l1_renormalised": self.l1_renormalised / num_positions
            if codec.has_exact
            else None,
            "noise_over_signal": {f"{t:g}": noise[t] / distance[t] for t in noise},
            "lse_error_mean": {f"{t:g}": float(e.mean()) for t, e in errors.items()},
            "lse_error_p99": {f"{t:g}": float(e.quantile(0.99)) for t, e in errors.items()},
        }
        if uniform:
            row["noise_over_signal_uniform"] = {f"{t:g}": uniform[t] / distance[t] for t in uniform}
        return row


def log_sum_exp(coded: CodedLabels, temperature: float) -> Tensor:
    """[N] log-sum-exp at a temperature from the exact entries and the tail sums."""
    assert coded.num_exact is not None
    assert coded.exact_code is not None
    assert coded.tail is not None
    spec = coded.spec
    num_positions = len(coded.gold)
    log_probs = torch.from_numpy(exact_log_probs(spec.codec, coded.exact_code.numpy()))
    rows = torch.arange(num_positions).repeat_interleave(coded.num_exact)
    head = torch.zeros(num_positions).index_add_(0, rows, (log_probs / temperature).exp())
    count = (spec.vocab_size - coded.num_exact).log().to(torch.float32)
    knots = torch.cat([count[:, None], coded.tail.to(torch.float32)], dim=1)
    weights = torch.from_numpy(interpolation_weights(spec.temperatures, temperature))
    tail = knots @ weights.to(torch.float32)
    return torch.logaddexp(head.log(), tail)


def file_bytes(spec: LogitsSpec, columns: dict[str, Ragged]) -> int:
    """Size of the Arrow file that a cache holds for these labels."""
    schema = logits_schema(spec.codec, spec.vocab_size, spec.temperatures)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(ragged_batch(schema, columns))
        return path.stat().st_size


def label_bytes(columns: dict[str, Ragged]) -> int:
    """Bytes of entries and of their counts."""
    total = 0
    for name, column in columns.items():
        for key, values in column.fields.items():
            if name != "tokens" or key in ("num_exact", "num_drawn"):
                total += values.nbytes
    return total


def _is_of(name: str, kind: str) -> bool:
    """Whether a row is of a kind of codec; sets of temperatures are one of their own."""
    if name.endswith(SET_NAME):
        return kind == SET_NAME
    return name.startswith(kind)


def bytes_at_noise(rows: dict[str, dict[str, Any]], noise: float) -> float:
    """Label bytes of threshold at a noise, between the measured c by log-log lines."""
    curve = sorted(
        (math.log(row["noise"]), math.log(row["label_bytes_per_token"]))
        for name, row in rows.items()
        if _is_of(name, "threshold")
    )
    x, y = zip(*curve, strict=True)
    if not x[0] <= math.log(noise) <= x[-1]:
        raise SystemExit(f"the threshold curve does not reach the noise {noise:.3f} of sampled(50)")
    return math.exp(float(np.interp(math.log(noise), x, y)))


def measure(batches: Iterator[Batch], num_pairs: int) -> dict[str, Any]:
    """The whole table."""
    tallies: dict[str, Tally] = {}
    distance = dict.fromkeys(TEMPERATURES, 0.0)
    num_positions = vocab_size = 0
    with progress(num_pairs, "codecs", "pair") as bar:
        for batch in batches:
            vocab_size = batch.teacher.shape[1]
            log_probs = torch.log_softmax(batch.teacher, dim=-1)
            lse = torch.stack([torch.logsumexp(log_probs / t, -1) for t in LSE_TEMPERATURES], 1)
            probs = {t: torch.softmax(batch.teacher / t, dim=-1) for t in TEMPERATURES}
            for t, expected in probs.items():
                student = torch.softmax(batch.student / t, dim=-1)
                distance[t] += float((student - expected).square().sum())
            for name, codec in codecs().items():
                tally = tallies.setdefault(name, Tally(LogitsSpec(codec, vocab_size, KNOTS)))
                tally.add(batch, num_positions, probs, lse)
            num_positions += len(batch.gold)
            bar.update(len(batch.lengths))
    distance = {t: math.sqrt(total / num_positions) for t, total in distance.items()}
    rows = {name: tally.result(num_positions, distance) for name, tally in tallies.items()}
    sampled = rows["sampled 50"]
    at_noise = bytes_at_noise(rows, sampled["noise"])
    return {
        "label_bytes_over_sampled": at_noise / sampled["label_bytes_per_token"],
        "positions": num_positions,
        "pairs": num_pairs,
        "vocab_size": vocab_size,
        "temperatures_stored": list(KNOTS),
        "student_distance": {f"{t:g}": value for t, value in distance.items()},
        "codecs": rows,
    }


def _cells(by_temperature: dict[str, float]) -> str:
    """A number for each temperature, as far as there is one."""
    return "".join(
        f"{by_temperature[t]:>9.3f}" if t in by_temperature else f"{'-':>9}"
        for t in ("0.5", "1", "2", "5", "10")
    )


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{'codec':<26}{'bytes':>8}{'label':>8}{'entries':>9}{'noise':>8}{'bias':>7}{'renorm':>8}"
        "   noise over |p - t| at T 0.5, 1, 2, 5, 10           error of log-sum-exp"
    ]
    for name, row in result["codecs"].items():
        cells = [row["bytes_per_token"], row["label_bytes_per_token"], row["entries_per_token"]]
        line = f"{name:<26}{cells[0]:>8.1f}{cells[1]:>8.1f}{cells[2]:>9.1f}{row['noise']:>8.3f}"
        renormalised = row["bias_l1_renormalised"]
        line += f"{row['bias_l1']:>7.3f}"
        line += f"{renormalised:>8.3f}" if renormalised is not None else f"{'-':>8}"
        for source in (row["noise_over_signal"], row["lse_error_mean"]):
            line += "   " + _cells(source)
        lines.append(line)
        if "noise_over_signal_uniform" in row:
            cells = _cells(row["noise_over_signal_uniform"])
            lines.append(f"{'  its exact head, uniform tail':<77}" + cells)
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Label bytes against noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 5))
    labels = {
        "threshold": ("o-", "threshold (unbiased)"),
        SET_NAME: ("D:", f"threshold for T in {SET_NAME} (unbiased)"),
        "sampled": ("s-", "sampled (unbiased)"),
        "topk": ("^--", "topk (all of it bias)"),
    }
    for kind, (style, label) in labels.items():
        rows = [(name, row) for name, row in result["codecs"].items() if _is_of(name, kind)]
        x = [row["label_bytes_per_token"] for _, row in rows]
        y = [row["noise"] for _, row in rows]
        axes.plot(x, y, style, label=label)
        for (name, _), a, b in zip(rows, x, y, strict=True):
            axes.annotate(name.split()[1], (a, b), xytext=(4, 4), textcoords="offset points")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="label bytes per token",
        ylabel="error at T = 1, RMS of L2",
    )
    axes.set_title(f"Soft labels of {result['positions']} positions, V = {result['vocab_size']}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="100 pairs instead of 1,000")
    parser.add_argument("--pairs", type=int, help="how many pairs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    num_pairs = arguments.pairs or (100 if arguments.quick else 1000)
    root = os.environ.get("KDCACHE_DATA")
    if root is None:
        log("KDCACHE_DATA is not set: the distributions are generated")
        batches = generated_batches(num_pairs)
    else:
        batches = real_batches(Path(root), num_pairs)
    result = measure(batches, num_pairs)
    result = {"benchmark": "bench_size", "generated_data": root is None, **result}
    print(table(result))
    report(result, "bench_size", save=arguments.save, draw=draw)


if __name__ == "__main__":
    main()
