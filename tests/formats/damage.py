"""Damage: bits flipped, files cut, lengthened and exchanged, and what a cache makes of each.

One trial damages one cache in one way, then asks `verify` and a trainer. It is a miss where
`verify` does not name every damaged file, where the trainer gets other values than the cache
holds without an error, or where anything but a KDCacheError comes out. A process that dies in a
trial, as a reader that trusts damaged offsets may, is a miss too: trials run in child processes.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import KDCacheError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codec import Codec, SampledCodec, ThresholdCodec
from kdcache.formats.ragged import Ragged
from kdcache.formats.signals import AttentionRecord, HiddenRecord
from kdcache.formats.window import WindowReader
from kdcache.train.batches.stream import BatchStream
from tests.formats.kinds import make_kinds
from tests.formats.labels import SENTENCES

#: How often each damage is done.
DAMAGES = {"flip": 0.7, "truncate": 0.08, "extend": 0.07, "swap": 0.08, "foreign": 0.07}

#: What a trainer streams; other signals are read whole through windows.
TARGET_LABELS = ["drawn", "logits"]

Digests = dict[str, str]


@dataclass(frozen=True)
class World:
    """A whole cache, and others whose files are put in place of its own.

    Attributes:
        root: the cache.
        donors: caches of the same signals: of other text, of another teacher and other codecs.
        files: kind of file to the paths of the cache's files, in order.
        expected: what reads give.
    """

    root: Path
    donors: tuple[Path, ...]
    files: Mapping[str, list[str]]
    expected: Digests


def make_world(folder: Path, only: Sequence[str] | None = None) -> World:
    """Write the caches.

    Args:
        folder: where they go.
        only: these signals beside the target labels; all kinds in all their forms without it.
    """
    codecs: dict[str, Codec] = {"logits": ThresholdCodec(c=1 / 8), "drawn": SampledCodec(n=5)}
    others: dict[str, Codec] = {"logits": ThresholdCodec(c=1 / 9), "drawn": SampledCodec(n=6)}
    cut: dict[str, Any] = {"shard_tokens": 36, "part_samples": 3, "only": only}
    root = make_kinds(folder / "cache", codecs=codecs, **cut).root
    backwards = {name: [text[::-1] for text in texts] for name, texts in SENTENCES.items()}
    donors = (
        make_kinds(folder / "other-text", codecs=codecs, sentences=backwards, **cut).root,
        make_kinds(folder / "other-teacher", codecs=others, seed=2, **cut).root,
    )
    assert open_cache(root).num_shards > 1
    return World(root, donors, files_by_kind(root), read_all(root))


def files_by_kind(root: Path) -> dict[str, list[str]]:
    """Kind of file to the paths of all files of a cache but its lock."""
    kinds: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*")):
        path = file.relative_to(root).as_posix()
        if file.is_file() and path != ".lock":
            kinds.setdefault(kind_of(root, path), []).append(path)
    return dict(sorted(kinds.items()))


@lru_cache(maxsize=64)
def _signal_kinds(root: Path) -> dict[str, str]:
    return {name: record.kind for name, record in open_cache(root).signals.items()}


def kind_of(root: Path, path: str) -> str:
    """What a file is, in words."""
    folder, *rest = path.split("/")
    if not rest:
        return "manifest"
    if folder in ("tokenizers", "signals"):
        return "tokenizer file" if folder == "tokenizers" else "signal record"
    if folder == "commits":
        return "commit of samples" if rest[0].startswith("samples.") else "commit of a signal"
    if folder == "samples":
        return "samples"
    kind = _signal_kinds(root)[folder]
    if not rest[0].endswith(".zarr"):
        return f"{kind} (Arrow)"
    if rest[-1] == "zarr.json":
        return "Zarr metadata"
    return f"{kind} ({'scales' if rest[1] == 'scale' else 'Zarr shard'})"


def read_all(root: Path) -> Digests:
    """Everything that a trainer can be handed, as a digest each."""
    cache = open_cache(root)
    found = {f"tokens of {name}": _digest(cache.tokens(name)) for name in cache.manifest.tokenizers}
    dense = [
        name
        for name, record in cache.signals.items()
        if isinstance(record, HiddenRecord | AttentionRecord)
    ]
    found |= _windows(cache, [name for name in cache.signals if name not in dense])
    found |= {name: _digest(*_dense(cache, name)) for name in dense}
    found["batches"] = _digest(*_batches(cache))
    return found


def _windows(cache: Cache, signals: list[str]) -> Digests:
    """Texts, streams and ragged signals of all shards, and what the records say of them."""
    shards, streams = list(range(cache.num_shards)), list(cache.manifest.streams)
    window = WindowReader(cache, shards, streams, signals)
    rows = np.arange(window.num_samples)
    found = {"samples": _digest(window.sample_id, window.row)}
    for name in cache.manifest.corpus.fields:
        texts = [cache.samples(shard).text(name).to_pylist() for shard in shards]
        found[f"field {name}"] = _digest(texts)
    for name in streams:
        found[f"stream {name}"] = _digest(*_columns({"": window.take_stream(name, rows)}))
    for name in signals:
        said = cache.signal(name).model_dump(mode="json", exclude={"recipe", "versions"})
        found[name] = _digest(said, *_columns(window.take_signal(name, rows)))
    return found


def _columns(columns: Mapping[str, Ragged]) -> Iterator[np.ndarray | str]:
    for name, column in columns.items():
        yield name
        yield column.offsets
        for field, values in column.fields.items():
            yield field
            yield values


def _dense(cache: Cache, name: str) -> Iterator[Any]:
    record = cache.signal(name)
    assert isinstance(record, HiddenRecord | AttentionRecord)
    yield record.model_dump(mode="json", exclude={"recipe", "versions"})
    for number in range(cache.num_shards):
        shard = cache.dense_shard(name, number)
        for layer in range(len(record.layers)):
            yield shard.decode(shard.start, shard.stop, layer)


def _batches(cache: Cache) -> Iterator[np.ndarray]:
    """One epoch of what `train` is fed."""
    stream = BatchStream(cache, ["src", "tgt"], TARGET_LABELS, 24, seed=3, window_shards=2)
    stream.max_epochs = 1
    for batch in stream:
        for micro in batch.micro:
            yield micro.rows
            for tokens in micro.streams.values():
                yield from (tokens.ids.numpy(), tokens.mask.numpy(), tokens.flat.numpy())
            for coded in micro.signals.values():
                values = [value for value in vars(coded).values() if hasattr(value, "numpy")]
                yield from (value.numpy() for value in values)


def _digest(*pieces: Any) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        if isinstance(piece, np.ndarray):
            hasher.update(f"{piece.dtype.str}{piece.shape}".encode())
            hasher.update(np.ascontiguousarray(piece).tobytes())
        else:
            hasher.update(repr(piece).encode())
    return hasher.hexdigest()


@dataclass(frozen=True)
class Damage:
    """What is done in one trial.

    Attributes:
        number: of the trial; with the seed it says everything.
        name: one of DAMAGES.
        kind: of the file.
        files: paths in the cache to the bytes that are put there.
    """

    number: int
    name: str
    kind: str
    files: Mapping[str, bytes]


def draw_damage(world: World, seed: int, number: int) -> Damage:
    """The damage of one trial: every kind of file has the same chance, then every file of it."""
    draw = np.random.default_rng([seed, number])
    while True:
        kinds = list(world.files)
        kind = kinds[int(draw.integers(len(kinds)))]
        path = world.files[kind][int(draw.integers(len(world.files[kind])))]
        name = str(draw.choice(list(DAMAGES), p=list(DAMAGES.values())))
        files = _damaged(world, draw, name, kind, path)
        if files and all((world.root / at).read_bytes() != data for at, data in files.items()):
            return Damage(number, name, kind, files)


def _damaged(
    world: World, draw: np.random.Generator, name: str, kind: str, path: str
) -> dict[str, bytes]:
    """Paths to other bytes; none where this damage cannot be done to the file."""
    data = (world.root / path).read_bytes()
    if name == "flip":
        place = int(draw.integers(8 * len(data)))
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        return {path: bytes(flipped)}
    if name == "truncate":
        return {path: data[: int(draw.integers(len(data)))]}
    if name == "extend":
        more = draw.bytes(int(draw.integers(1, 40)))
        return {path: data + (more if draw.random() < 0.5 else bytes(len(more)))}
    if name == "swap":
        others = [other for other in world.files[kind] if other != path]
        if not others:
            return {}
        other = others[int(draw.integers(len(others)))]
        return {path: (world.root / other).read_bytes(), other: data}
    donor = world.donors[int(draw.integers(len(world.donors)))]
    theirs = counterparts(donor, path)
    if draw.random() < 0.3 or not theirs:
        theirs = files_by_kind(donor).get(kind, [])
    if not theirs:
        return {}
    return {path: (donor / theirs[int(draw.integers(len(theirs)))]).read_bytes()}


def counterparts(donor: Path, path: str) -> list[str]:
    """The file of another cache that has the same place, whatever the digest in its name."""
    pattern = re.sub("-[0-9a-f]{16}[.]", "-*.", path)
    return [found.relative_to(donor).as_posix() for found in sorted(donor.glob(pattern))]


def try_damage(world: World, work: Path, damage: Damage) -> list[str]:
    """Do one damage to a copy, ask for it, and undo it.

    Args:
        world: whose cache was copied.
        work: the copy, made of hard links, so that whoever has mapped a file keeps it as it was.
        damage: what is done.

    Returns:
        What went wrong, one line each; nothing where the damage was found.
    """
    try:
        for path, data in damage.files.items():
            (work / path).unlink()
            (work / path).write_bytes(data)
        return [*_ask_verify(work, damage), *_ask_trainer(world, work)]
    finally:
        gc.collect()  # threads and maps of this trial must not reach into the next
        for path in damage.files:
            (work / path).unlink(missing_ok=True)
            os.link(world.root / path, work / path)


def _ask_verify(work: Path, damage: Damage) -> list[str]:
    try:
        faults = verify_cache(work).faults
    except KDCacheError as error:
        faults = [str(error)]
    except BaseException as error:
        return [f"verify raised {type(error).__name__}: {error}"]
    if not faults:
        return ["verify found nothing"]
    unnamed = [path for path in damage.files if not any(path in fault for fault in faults)]
    lines = [f"verify names no {path}: {faults[:2]}" for path in unnamed]
    return lines + [f"a fault of more than one line: {f!r}" for f in faults if "\n" in f]


def _ask_trainer(world: World, work: Path) -> list[str]:
    try:
        found = read_all(work)
    except KDCacheError:
        return []
    except BaseException as error:
        return [f"a trainer gets {type(error).__name__}: {error}"]
    wrong = [name for name in world.expected if found.get(name) != world.expected[name]]
    return [f"a trainer gets wrong {', '.join(wrong)}"] if wrong else []


def linked_copy(root: Path, work: Path) -> Path:
    """A copy of a cache whose files are hard links."""
    shutil.copytree(root, work, copy_function=os.link)
    return work


def run_trials(
    world: World, folder: Path, count: int, seed: int, workers: int = 1
) -> Iterator[tuple[Damage, list[str]]]:
    """Trials in child processes, in no order.

    Args:
        world: what is damaged.
        folder: for the copies.
        count: of trials.
        seed: of all of them.
        workers: processes at a time.

    Yields:
        The damage and what went wrong.
    """
    todo = [list(range(first, count, workers))[::-1] for first in range(workers)]
    running = {}
    for worker in range(workers):
        running[worker] = _Child(world, folder / f"copy-{worker}", seed, todo[worker])
    while running:
        ready = multiprocessing.connection.wait([child.results for child in running.values()])
        for worker, child in list(running.items()):
            if child.results not in ready:
                continue
            number, lines = child.next_result()
            if number is not None:
                todo[worker].pop()
                yield draw_damage(world, seed, number), lines
            if not child.alive:
                del running[worker]
                if todo[worker]:  # one that died goes on behind the trial that killed it
                    copy = folder / f"copy-{worker}-{len(todo[worker])}"
                    running[worker] = _Child(world, copy, seed, todo[worker])


class _Child:
    """A process that does trials, last of the list first."""

    def __init__(self, world: World, copy: Path, seed: int, numbers: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.results, theirs = context.Pipe(duplex=False)
        self._numbers = numbers
        self.alive = True
        arguments = (world, copy, seed, numbers[::-1], theirs)
        self._process = context.Process(target=_work, args=arguments)
        self._process.start()
        theirs.close()

    def next_result(self) -> tuple[int | None, list[str]]:
        """The next trial and what went wrong in it; no number where the list is done."""
        try:
            number, lines = self.results.recv()
        except EOFError:
            self.alive = False
            self._process.join()
            if not self._numbers:
                return None, []
            number = self._numbers[-1]
            return number, [f"the process died with exit code {self._process.exitcode}"]
        return number, lines


def _work(world: World, copy: Path, seed: int, numbers: list[int], results: Any) -> None:
    """Body of a child process."""
    linked_copy(world.root, copy)
    for number in numbers:
        results.send((number, try_damage(world, copy, draw_damage(world, seed, number))))
    # The copy must be as it was: a trial that was not undone would find the next one's damage.
    assert verify_cache(copy).faults == []
    assert read_all(copy) == world.expected
    results.close()
