"""A merged cache trains as the caches do that it was made of: same order, same losses.

# N positions, V vocabulary
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.compile import CompileOptions, compile_caches
from kdcache.dump.runner import dump
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.keyed import text_key
from kdcache.formats.schema import join_ids
from kdcache.labels.coded_labels import LogitsSpec, coded_labels
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import densify
from kdcache.models.passes import shift_right
from kdcache.recipe import parse_recipe
from kdcache.train.batches.stream import BatchStream
from kdcache.train.losses.schedule import learning_rate
from kdcache.train.runs.loop import train
from kdcache.train.students.student import build_student
from tests.train.conftest import STUDENT, make_lines, make_teacher

STEPS, SIGNALS = 12, ("threshold", "full")


@dataclass(frozen=True)
class Sample:
    """One sample, gathered by hand: tokens, and [N, V] soft labels by signal."""

    src: list[int]
    tgt: list[int]
    labels: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> list[Path]:
    """Two dumps of one teacher over lines that overlap, one of them with a duplicate of a line."""
    root = tmp_path_factory.mktemp("train")
    torch.set_num_threads(1)
    src, tgt = make_lines(60)
    make_teacher(root / "teacher", [*src, *tgt])
    picks = {"a": [*range(40)], "b": [*range(59, 24, -1), 30]}
    for name, rows in picks.items():
        for side, lines in (("src", src), ("tgt", tgt)):
            (root / f"{name}.{side}").write_text("".join(lines[row] + "\n" for row in rows))
        codecs = {
            "threshold": {"name": "threshold", "c": "1/8"},
            "full": {"name": "full", "values": "float32"},
        }
        tree = {
            "name": "test",
            "corpus": {"fields": {side: str(root / f"{name}.{side}") for side in ("src", "tgt")}},
            "dump": {
                "teacher": {"path": str(root / "teacher"), "device": "cpu"},
                "shard_tokens": 300,
                # Batches of other shapes, so the labels of the overlap differ by float noise.
                "batch_tokens": 300 if name == "a" else 170,
                "signals": {name: {"codec": codec} for name, codec in codecs.items()},
            },
        }
        dump(parse_recipe(tree), root / name)
    return [root / name for name in picks]


@pytest.fixture(scope="module")
def merged(caches, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "cache"
    compile_caches(caches, out, CompileOptions(shard_tokens=400))
    assert verify_cache(out).faults == []
    return out


def by_hand(caches: list[Path]) -> list[Sample]:
    """Samples of all caches in order of first appearance, those of one id and turn once."""
    found: dict[tuple[bytes, int], Sample] = {}
    for path in caches:
        cache, turns = open_cache(path), {}
        specs = {
            name: LogitsSpec(r.codec, r.vocab_size, r.temperatures)
            for name, r in cache.signals.items()
        }
        for n in range(cache.num_shards):
            shard = cache.samples(n)
            for m in range(len(shard.row)):
                one = np.array([m])
                key = shard.sample_id[m].tobytes()
                turns[key] = turns.get(key, -1) + 1
                ids = [join_ids(shard.streams[s].take(one).fields).tolist() for s in ("src", "tgt")]
                labels = {}
                for name, spec in specs.items():
                    parts = cache.signal_shard(name, n).parts
                    start, _, columns = next(p for p in parts if p[0] <= shard.start + m < p[1])
                    row = one + shard.start - start
                    coded = coded_labels(spec, {k: c.take(row) for k, c in columns.items()})
                    labels[name] = densify(decode(coded), spec.vocab_size)
                found.setdefault((key, turns[key]), Sample(*ids, labels))
    return list(found.values())


def test_global_batches_are_those_gathered_by_hand(caches, merged):
    samples = by_hand(caches)
    cache = open_cache(merged)
    assert len(samples) == cache.num_samples == 61
    stream = BatchStream(
        cache, ["src", "tgt"], SIGNALS, 120, seed=3, window_shards=2, accumulate=2, max_epochs=2
    )
    seen = []
    for batch in stream:
        for micro in batch.micro:
            seen += micro.rows.tolist()
            mine = [samples[row] for row in micro.rows]
            for side, tokens in micro.streams.items():
                rows = [tokens.ids[b][tokens.mask[b]].tolist() for b in range(len(mine))]
                assert rows == [getattr(sample, side) for sample in mine]
            for name in SIGNALS:
                found = micro.signals[name]
                expected = torch.cat([sample.labels[name] for sample in mine])
                assert torch.equal(densify(decode(found), found.spec.vocab_size), expected)
    assert sorted(seen) == sorted([*range(61), *range(61)])


def losses_by_hand(caches, merged, recipe) -> list[float]:
    """Brute force over samples gathered by hand, in the order that the merged cache says."""
    section, samples = recipe.train, by_hand(caches)
    cache = open_cache(merged)
    vocab_size = cache.logits("full").vocab_size
    student = build_student(section.student, cache.tokenizer("teacher"), vocab_size, section.seed)
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.98), eps=1e-9)
    order = BatchStream(
        cache, ["src", "tgt"], [], section.batch_tokens, section.seed, section.window_shards
    )
    batches, losses = iter(order), []
    for number in range(1, STEPS + 1):
        torch.manual_seed(text_key(section.seed, "dropout", number) >> 1)
        mine = [samples[row] for row in next(batches).rows]
        src, src_mask = padded([sample.src for sample in mine])
        tgt, mask = padded([sample.tgt for sample in mine])
        decoder = shift_right(tgt, 0, 0)
        logits = student(input_ids=src, attention_mask=src_mask.long(), decoder_input_ids=decoder)
        log_probs = torch.log_softmax(logits.logits[mask], -1)  # [N, V]
        soft = torch.cat([sample.labels["full"] for sample in mine])
        nll = torch.nn.functional.nll_loss(log_probs, tgt[mask])
        kl = torch.nn.functional.kl_div(log_probs, soft, reduction="batchmean")
        loss = 0.5 * nll + 0.5 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), section.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(section.schedule, section.optimizer.lr, number, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    batches.close()
    return losses


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def test_training_on_the_merged_cache_equals_training_on_both(caches, merged, tmp_path):
    tree = {
        "student": {"config": STUDENT},
        "objective": [
            {"loss": "cross_entropy", "weight": 0.5},
            {"loss": "forward_kl", "weight": 0.5, "signal": "full"},
        ],
        "device": "cpu",
        "max_steps": STEPS,
        "batch_tokens": 120,
        "window_shards": 2,
        "log_every": 1,
        "schedule": {"warmup_steps": 5},
        "optimizer": {"lr": 0.005},
        "checkpoints": {"every_steps": 12, "average_last": 0},
    }
    recipe = parse_recipe({"name": "test", "train": tree})
    train(recipe, merged, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["loss"] for line in lines]
    assert found == pytest.approx(losses_by_hand(caches, merged, recipe), abs=1e-4, rel=0)
    assert len(found) == STEPS
    assert found[-1] < found[0] - 0.1
