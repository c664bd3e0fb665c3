"""Samples dumped with a real tokenizer, and hypotheses for them that are written by hand.

# M samples, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.dump.runner import dump
from kdcache.dump.tokenize import Tokenizer
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.codec import Codec, FullCodec, ThresholdCodec, TopKCodec
from kdcache.formats.ragged import Ragged, concat, offsets_of
from kdcache.formats.schema import join_ids, split_ids
from kdcache.formats.signals import BeamsRecord, HiddenRecord, LogitsRecord
from kdcache.formats.writer import CacheWriter
from kdcache.recipe import parse_recipe
from tests.formats.kinds import write_signal
from tests.formats.labels import code_labels, teacher_log_probs, teacher_record
from tests.train.conftest import make_lines

VOCAB, COUNT = 36, 24
TEMPERATURES = (1.0, 2.0)
#: Codecs of the signals about hypotheses, by signal name.
CODECS: dict[str, Codec] = {
    "all_full": FullCodec(values="float32"),
    "all_top": TopKCodec(k=5),
    "all_drawn": ThresholdCodec(c=1 / 8),
    "first": TopKCodec(k=5),
    "second": TopKCodec(k=5),
}
WHICH = {"first": 0, "second": 1}


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        root: the cache.
        src: M source texts.
        tgt: M references.
        hypotheses: of each sample the texts of its hypotheses, as the tokenizer gives them back.
        ids: of each sample the token ids of its hypotheses.
        log_probs: of each sample the log-probs of its hypotheses.
        teacher: [N, V] log-probs at the tokens of all hypotheses, one after another.
    """

    root: Path
    src: list[str]
    tgt: list[str]
    hypotheses: list[list[str]]
    ids: list[list[list[int]]]
    log_probs: list[list[float]]
    teacher: np.ndarray

    def positions(self, m: int, hypothesis: int) -> slice:
        """Rows of `teacher` that are of one hypothesis."""
        before = sum(len(one) for ids in self.ids[:m] for one in ids)
        first = before + sum(map(len, self.ids[m][:hypothesis]))
        return slice(first, first + len(self.ids[m][hypothesis]))


def variants(text: str, m: int) -> list[str]:
    """Hypotheses that are more or less like a reference, the best of them at different places."""
    words = text.split()
    found = [" ".join(words[::-1]), " ".join(words[1:]), " ".join([*words[:-1], "cat"])]
    return (found[m % 3 :] + found[: m % 3])[: 1 + (m + 1) % 3]


def write_world(folder: Path, other: bool = True) -> Written:
    """Write corpus, cache and signals into a folder.

    Args:
        folder: where.
        other: whether there is a second stream over the target's text.
    """
    src, tgt = make_lines(COUNT)
    tgt[5], src[5] = tgt[4], src[4]  # a duplicate
    for name, lines in (("src", src), ("tgt", tgt)):
        (folder / name).write_text("".join(line + "\n" for line in lines))
    fields = ["src", "tgt"]
    streams = {
        "src": {"field": "src", "tokenizer": "own"},
        "tgt": {"field": "tgt", "tokenizer": "own", "target": True},
        # The same text under another tokenizer: no hypothesis can replace its tokens.
        "tgt_other": {"field": "tgt", "tokenizer": "other", "target": True},
    }
    tokenizers = {
        "own": {"kind": "sentencepiece", "fields": fields, "vocab_size": VOCAB},
        "other": {"kind": "sentencepiece", "fields": fields, "vocab_size": 32},
    }
    if not other:
        del streams["tgt_other"]
    tree = {
        "name": "test",
        "corpus": {"fields": {name: str(folder / name) for name in fields}},
        "dump": {
            "shard_tokens": 150,
            "tokenizers": tokenizers,
            "streams": streams,
            "signals": {},
        },
    }
    dump(parse_recipe(tree), folder / "cache")
    cache = open_cache(folder / "cache")
    tokenizer = Tokenizer.load(str(cache.tokenizer_dir("own")))
    texts = [variants(text, m) for m, text in enumerate(tgt)]
    ids = [tokenizer.encode(some, target=True) for some in texts]
    draw = np.random.default_rng(3)
    log_probs = [sorted(draw.normal(-3, 1, len(some)).tolist())[::-1] for some in ids]
    decoded = [tokenizer._backend.batch_decode(some, skip_special_tokens=True) for some in ids]
    num_positions = sum(len(one) for some in ids for one in some)
    teacher = teacher_log_probs(num_positions, VOCAB, seed=4)
    written = Written(folder / "cache", src, tgt, decoded, ids, log_probs, teacher)
    add_signals(written)
    return written


def add_signals(written: Written) -> None:
    """Beams, labels of hypotheses and of references, and hidden states of both sides."""

    def add(record: Any, columns: dict[str, Ragged]) -> None:
        with CacheWriter(written.root) as writer:
            write_signal(writer, open_cache(written.root), record, columns, part_samples=3)

    cache = open_cache(written.root)
    hypotheses = {
        "num_tokens": np.array([len(one) for some in written.ids for one in some], np.uint16),
        "log_prob": np.array([p for some in written.log_probs for p in some], np.float32),
        "score": np.array([p for some in written.log_probs for p in some], np.float32),
    }
    flat = np.array([i for some in written.ids for one in some for i in one])
    per_sample = np.array([sum(map(len, some)) for some in written.ids])
    beams = {
        "hypotheses": Ragged(offsets_of(np.array([len(s) for s in written.ids])), hypotheses),
        "tokens": Ragged(offsets_of(per_sample), split_ids(flat, VOCAB)),
    }
    source = {"source": "src", "source_digest": cache.stream("src").digest}
    record = BeamsRecord(
        **about(cache, "beams", "tgt"),
        **source,
        vocab_size=VOCAB,
        num_hypotheses=3,
        decoding={"mode": "beam"},
    )
    add(record, beams)
    for name, codec in CODECS.items():
        which = WHICH.get(name, "all")
        rows, counts = rows_of(written, which)
        labels = code_labels(written.teacher[rows], flat[rows], counts, codec, TEMPERATURES)
        record = logits(cache, name, codec, hypotheses="beams", hypothesis=which)
        add(record, labels)
    stream = concat([cache.samples(n).streams["tgt"] for n in range(cache.num_shards)])
    gold = join_ids(stream.fields)
    codec = CODECS["all_top"]
    references = teacher_log_probs(len(gold), VOCAB, seed=5)
    labels = code_labels(references, gold, stream.lengths, codec, TEMPERATURES)
    add(logits(cache, "on_reference", codec), labels)
    for side in cache.manifest.streams:
        name = f"hidden_{side.removeprefix('tgt_')}"
        record = HiddenRecord(
            **about(cache, name, side),
            side="encoder",
            layers=(0, 1),
            width=4,
            pool="none",
            values="float16",
        )
        lengths = np.concatenate(
            [cache.samples(n).streams[side].lengths for n in range(cache.num_shards)]
        )
        values = np.random.default_rng(6).normal(size=(int(lengths.sum()), 2, 4))
        rows = {"values": values.astype(np.float16)}
        add(record, {"values": Ragged(offsets_of(lengths), rows)})


def rows_of(written: Written, which: int | str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `teacher` that are labelled, and how many each sample has."""
    rows: list[int] = []
    counts = []
    for m, some in enumerate(written.ids):
        chosen: Sequence[int] = range(len(some)) if which == "all" else [int(which)]
        mine = [
            row
            for h in chosen
            if h < len(some)
            for row in range(written.positions(m, h).start, written.positions(m, h).stop)
        ]
        rows += mine
        counts.append(len(mine))
    return np.array(rows), np.array(counts)


def about(cache: Cache, name: str, stream: str) -> dict[str, Any]:
    digest = {"stream": stream, "stream_digest": cache.stream(stream).digest}
    rest = {"seed": 1, "teacher": teacher_record(), "recipe": {}, "versions": {}}
    return {"name": name, **digest, **rest}


def logits(cache: Cache, name: str, codec: Codec, **more: Any) -> LogitsRecord:
    return LogitsRecord(
        **about(cache, name, "tgt"),
        source="src",
        source_digest=cache.stream("src").digest,
        at="targets",
        vocab_size=VOCAB,
        codec=codec,
        temperatures=TEMPERATURES,
        **more,
    )
