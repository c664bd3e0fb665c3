"""Hostile records: whatever their JSON says, only a KDCacheError of one line comes out.

A record is changed anywhere and sealed with a right checksum, so that it is believed; then
everything that reads it is called. Memory and processor time are limited: what allocates by what a
record claims, or never ends, fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.errors import FormatError, IntegrityError, KDCacheError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codec import ThresholdCodec
from kdcache.formats.manifest import MAX_SHARDS
from kdcache.formats.record import decode_json
from kdcache.formats.signals import AttentionRecord, HiddenRecord
from kdcache.formats.stores.store import MAX_SMALL_BYTES
from kdcache.formats.window import WindowReader
from kdcache.formats.writer import CacheWriter
from tests.formats.kinds import make_kinds
from tests.formats.test_manifest import sealed

SIGNALS = ["masks", "beams", "masked_hidden", "attention", "masked_classes", "at_masked", "every"]

MORE_BYTES = 1 << 29
CPU_SECONDS = 20.0


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cache; not to be changed."""
    codecs = {"logits": ThresholdCodec(c=1 / 8)}
    folder = tmp_path_factory.mktemp("sound")
    cut = {"shard_tokens": 36, "part_samples": 3}
    return make_kinds(folder / "cache", only=SIGNALS, codecs=codecs, **cut).root


@pytest.fixture(scope="module")
def victim(sound: Path) -> Path:
    """A copy of hard links, made whole again by `restored`."""
    root = sound.parent / "victim"
    shutil.copytree(sound, root, copy_function=os.link)
    return root


@contextlib.contextmanager
def restored(sound: Path, root: Path) -> Iterator[None]:
    """Undo whatever happens to the files of the copy."""
    try:
        yield
    finally:
        for file in sound.rglob("*"):
            mine = root / file.relative_to(sound)
            if file.is_dir():
                mine.mkdir(exist_ok=True)
            elif not mine.exists() or not mine.samefile(file):
                mine.unlink(missing_ok=True)
                os.link(file, mine)


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    """No test may take much memory beyond what the process has, or hang."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.exists():
        now = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MORE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {CPU_SECONDS} seconds of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns; None after a KDCacheError, which is one line of bounded length."""
    try:
        return call(*arguments)
    except KDCacheError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 4000
    return None


def exercise(root: Path) -> None:
    """Everything that reads a cache."""
    with limited_time():
        report = attempt(verify_cache, root)
        assert report is None or not any("\n" in fault for fault in report.faults)
        attempt(write, root)
        cache = attempt(open_cache, root)
        if cache is None:
            return
        for name in list(cache.manifest.tokenizers)[:3]:
            attempt(cache.tokens, name)
        ragged = []
        for number in range(min(cache.num_shards, 3)):
            attempt(cache.samples, number)
        for name, record in cache.signals.items():
            if isinstance(record, HiddenRecord | AttentionRecord):
                for number in range(min(cache.num_shards, 3)):
                    attempt(read_dense, cache, name, number)
            else:
                ragged.append(name)
        for name in ragged:
            attempt(read_window, cache, name)


def read_dense(cache: Any, name: str, number: int) -> None:
    shard = cache.dense_shard(name, number)
    shard.decode(shard.start, shard.start + 1, 0)


def read_window(cache: Any, name: str) -> None:
    shards = list(range(min(cache.num_shards, 3)))
    window = WindowReader(cache, shards, list(cache.manifest.streams), [name])
    window.take_signal(name, np.arange(min(window.num_samples, 100)))


def write(root: Path) -> None:
    """What a dump does first: it sweeps, and looks at what is committed."""
    with CacheWriter(root) as writer:
        for name in ["samples", *SIGNALS]:
            for shard in sorted(writer.committed(name))[:3]:
                writer.commit_record(name, shard)
                with writer.claimed(name, shard):
                    pass


WORDS = [
    "",
    "x",
    "../x",
    "../../etc/passwd",
    "/etc/passwd",
    "logits/../../x",
    "samples",
    "masks",
    "tgt",
    "a" * 300,
    "a" * 100_000,
    "\x00",
    "\ud800",
    "line\nbreak",
    "\x1b[31m",
    "0" * 32,
    "9" * 5000,
    "1/0",
    "\U0001f408",
]
NUMBERS = [
    *(0, 1, 2, 3, 7, 255, 256, 65_535, 65_536, 1 << 24, 1 << 31, 1 << 53),
    *((1 << 61) + 1, (1 << 62) - 1, 1 << 62, 1 << 63, 10**30, -1, -(1 << 63)),
    *(0.5, -0.0, 1e-300, 5e-324, 1e300, float("nan"), float("inf")),
]
#: Stands for a list in a list in a list, so often.
DEEP = "lists:"
VALUES = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(NUMBERS),
    st.sampled_from([None, True, False, [], {}, [[]], [None], {"": None}, {"x": {}}]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers() | st.text(max_size=5), max_size=4),
    st.integers(1, 5000).map(lambda depth: f"{DEEP}{depth}"),
).map(deepcopy)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values in a tree."""
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    return [p for key, item in items for p in [(*path, key), *places(item, (*path, key))]]


def mutate(tree: Any, data: st.DataObject) -> None:
    """Change one thing in a tree."""
    *path, last = data.draw(st.sampled_from(places(tree)))
    node = tree
    for key in path:
        node = node[key]
    value = node[last]
    how = ["value", "value", "remove", "add"]
    how += ["near"] * 3 if isinstance(value, int | float) else []
    how += ["list"] * 2 if isinstance(value, list) else []
    match data.draw(st.sampled_from(how)):
        case "value":
            node[last] = data.draw(VALUES)
        case "remove":
            del node[last]
        case "add" if isinstance(node, dict):
            node[data.draw(st.sampled_from(WORDS))] = data.draw(VALUES)
        case "add":
            node.insert(0, data.draw(VALUES))
        case "near":
            node[last] = data.draw(st.sampled_from([value + 1, value - 1, 2 * value, -value]))
        case "list":
            node[last] = data.draw(st.sampled_from([value[::-1], value[1:], value * 2, value * 50]))


def records_of(root: Path) -> list[str]:
    """Paths of all JSON records."""
    found = [root / "kdcache.json", *root.glob("signals/*.json"), *root.glob("commits/*.json")]
    return sorted(file.relative_to(root).as_posix() for file in found)


def put(root: Path, path: str, data: bytes) -> None:
    """Replace a file by another one: the old one has other names."""
    (root / path).unlink(missing_ok=True)
    (root / path).write_bytes(data)


def text_of(tree: Any, repeated: bool = False) -> str:
    """JSON of a tree from its second line on; on demand with a key twice."""
    text = json.dumps(tree)[1:] + "\n"
    text = re.sub(f'"{DEEP}([0-9]+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text)
    return '"shard": 0, "shard": 0, ' + text if repeated else text


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_record_with_anything_in_it_is_read_or_refused(
    sound: Path, victim: Path, data: st.DataObject
) -> None:
    with restored(sound, victim):
        for _ in range(data.draw(st.integers(1, 2))):
            path = data.draw(st.sampled_from(records_of(sound)))
            tree = decode_json((sound / path).read_bytes(), path)
            for _ in range(data.draw(st.integers(1, 3))):
                mutate(tree, data)
                if not tree:
                    break
            repeated = data.draw(st.sampled_from([False] * 19 + [True]))
            put(victim, path, sealed(text_of(tree, repeated)))
        exercise(victim)


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_that_are_no_record_are_refused(
    sound: Path, victim: Path, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(records_of(sound)))
    whole = (sound / path).read_bytes()
    anything = data.draw(
        st.binary(max_size=300)
        | st.binary(max_size=300).map(lambda raw: sealed(raw.decode("latin-1")))
        | st.integers(0, len(whole)).map(lambda n: whole[:n] + whole[n + 1 :])
    )
    if anything == whole:
        return
    with restored(sound, victim):
        put(victim, path, anything)
        exercise(victim)
        assert verify_cache(victim).faults


def replaced(root: Path, path: str, change: Callable[[dict], None]) -> None:
    """Change a record of the copy and seal it again."""
    tree = decode_json((root / path).read_bytes(), path)
    change(tree)
    put(root, path, sealed(text_of(tree)))


def test_a_claim_of_2_to_the_61_samples_allocates_nothing(sound: Path, victim: Path) -> None:
    count = 1 << 61

    def claim(tree: dict) -> None:
        last = tree["parts"][-1] if "parts" in tree else tree["shards"][-1]
        last["stop"] = count
        if "parts" in tree:
            tree["stop"] = count
        else:
            tree["corpus"]["num_samples"] = count

    last = max(path for path in records_of(sound) if "samples." in path).split(".")[1]
    with restored(sound, victim):
        for path in ["kdcache.json", *(p for p in records_of(sound) if f".{last}." in p)]:
            replaced(victim, path, claim)
        exercise(victim)
        faults = verify_cache(victim).faults
        assert any(re.search(r"rows, expected 2305843009213693\d{3}", f) for f in faults), faults


@pytest.mark.parametrize("key", ["replicas", "num_hypotheses", "width", "heads", "hypothesis"])
@pytest.mark.parametrize("value", [1 << 40, 1 << 61, 10**30])
def test_a_signal_that_claims_a_huge_size_allocates_nothing(
    sound: Path, victim: Path, key: str, value: int
) -> None:
    with restored(sound, victim):
        for path in records_of(sound):
            tree = decode_json((sound / path).read_bytes(), path)
            if path.startswith("signals/") and key in tree:
                replaced(victim, path, lambda tree: tree.update({key: value}))
        exercise(victim)
        assert verify_cache(victim).faults


def test_more_shards_than_a_cache_may_have_are_refused(sound: Path, victim: Path) -> None:
    shards = [{"start": n, "stop": n + 1, "tokens": 1} for n in range(MAX_SHARDS + 1)]
    with restored(sound, victim):
        replaced(victim, "kdcache.json", lambda tree: tree.update(shards=shards))
        with pytest.raises(FormatError, match=f"shards: .* at most {MAX_SHARDS}") as caught:
            open_cache(victim)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["kdcache.json", "signals/logits.json", "commits/logits.00000.json"]
)
def test_a_record_that_is_too_long_is_not_read_to_its_end(
    sound: Path, victim: Path, path: str
) -> None:
    with restored(sound, victim):
        put(victim, path, b"")
        with (victim / path).open("wb") as stream:
            stream.truncate(1 << 40)  # takes no room on the disk
        assert MAX_SMALL_BYTES < MORE_BYTES
        exercise(victim)
        with pytest.raises(IntegrityError, match=f"{path}: .* a record has at most"):
            open_cache(victim).commit_record("logits", 0)


LINKS = {
    "manifest": "kdcache.json",
    "signal": "signals/logits.json",
    "commit": "commits/logits.00000.json",
    "folder of commits": "commits",
    "samples": "samples/00000.0-*.arrow",
    "labels": "logits/00000.0-*.arrow",
    "folder of labels": "logits",
    "Zarr group": "attention/00000.0-*.zarr",
    "Zarr shard": "attention/00000.0-*.zarr/values/c/0/0/0",
    "tokens": "tokenizers/teacher/tokens.json",
}


@pytest.mark.parametrize("pattern", LINKS.values(), ids=LINKS.keys())
def test_a_link_out_of_the_cache_is_refused(sound: Path, tmp_path: Path, pattern: str) -> None:
    root = tmp_path / "cache"
    shutil.copytree(sound, root)
    (file,) = root.glob(pattern)
    outside = tmp_path / "outside"
    file.rename(outside)  # the very same bytes, so nothing but the link is wrong
    file.symlink_to(outside)
    with pytest.raises(IntegrityError, match="a link that leads out of the cache"):
        read_everything(root)
    faults = verify_cache(root).faults
    assert any("a link that leads out of the cache" in fault for fault in faults), faults


def test_a_link_that_stays_in_the_cache_is_followed(sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(sound, root)
    (root / "commits/logits.00000.json").rename(root / "elsewhere")
    (root / "commits/logits.00000.json").symlink_to("../elsewhere")
    link = tmp_path / "link"
    link.symlink_to(root)
    read_everything(link)
    assert verify_cache(link).faults == []


@pytest.mark.parametrize(
    "pattern", ["kdcache.json", "commits/logits.00000.json", "logits/00000.0-*.arrow"]
)
def test_what_is_no_file_is_refused(sound: Path, tmp_path: Path, pattern: str) -> None:
    root = tmp_path / "cache"
    shutil.copytree(sound, root)
    (file,) = root.glob(pattern)
    file.unlink()
    os.mkfifo(file)  # whoever opens it for reading waits for ever
    with pytest.raises(IntegrityError, match="not a file"):
        read_everything(root)
    with limited_time():
        assert verify_cache(root).faults


def read_everything(root: Path) -> None:
    cache = open_cache(root)
    for name in cache.manifest.tokenizers:
        cache.tokens(name)
    for name, record in cache.signals.items():
        if isinstance(record, HiddenRecord | AttentionRecord):
            for number in range(cache.num_shards):
                shard = cache.dense_shard(name, number)
                shard.decode(shard.start, shard.stop, 0)
        else:
            WindowReader(cache, range(cache.num_shards), list(cache.manifest.streams), [name])
