"""Training off a cache that is read through a URL: the same run, bit by bit."""

import shutil
from pathlib import Path

import fsspec
import pytest
from transformers import AutoTokenizer

from kdcache.cli import main
from kdcache.formats.cache import open_cache
from kdcache.recipe import dump_recipe
from kdcache.train.batches.growth import Growth
from kdcache.train.runs.loop import train
from tests.train.test_loop import metrics, weights


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A store in memory, which its local copy must hold a part of at a time."""
    store = fsspec.filesystem("memory")
    monkeypatch.setenv("KDCACHE_LOCAL_COPY", str(tmp_path / "copy"))
    yield store
    store.rm("/", recursive=True)


def upload(store, cache: Path, url: str, but: str = ""):
    for file in sorted(cache.rglob("*")):
        name = file.relative_to(cache).as_posix()
        if file.is_file() and not name.startswith(".") and not (but and name.startswith(but)):
            store.pipe_file(f"{url}/{name}", file.read_bytes())


def data_bytes(cache: Path) -> list[int]:
    return [
        file.stat().st_size for name in ("samples", "full") for file in (cache / name).iterdir()
    ]


def test_a_run_off_a_url_is_that_off_the_directory(
    world, make_recipe, tmp_path, memory, monkeypatch
):
    upload(memory, world.cache, "memory://caches/deen")
    tokenizers = sum(f.stat().st_size for f in (world.cache / "tokenizers").rglob("*.*"))
    sizes = data_bytes(world.cache)
    bound = tokenizers + sum(sizes) // 2
    assert bound > tokenizers + 2 * max(sizes)
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", str(bound))
    recipe = make_recipe("full", max_steps=30)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    words = ["train", str(tmp_path / "recipe.yaml"), "--cache", "memory://caches/deen"]
    assert main([*words, "--out", str(tmp_path / "remote")]) == 0
    train(recipe, world.cache, tmp_path / "local")
    assert metrics(tmp_path / "remote") == metrics(tmp_path / "local")
    for folder in ("best", "last", "averaged"):
        assert weights(tmp_path / "remote" / folder) == weights(tmp_path / "local" / folder)
    names = [
        sorted(file.name for file in (tmp_path / run / "best").iterdir())
        for run in ("remote", "local")
    ]
    assert names[0] == names[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "remote" / "best").vocab_size > 3
    copied = sum(f.stat().st_size for f in (tmp_path / "copy").rglob("*") if f.is_file())
    assert 0 < copied <= bound


def test_a_run_at_a_url_joins_what_another_process_commits(
    world, make_recipe, tmp_path, memory, monkeypatch
):
    """Each look lists the store anew: no listing of before is taken for what is there now."""
    url, signal = "memory://caches/growing", "commits/threshold."
    upload(memory, world.cache, url, but=signal)
    pins, real = iter([1, 2, 4, 4]), Growth.prefix
    shown = []

    def prefix(self):
        count = next(pins, 4)
        for shard in range(count):
            name = f"{signal}{shard:05d}.json"
            memory.pipe_file(f"{url}/{name}", (world.cache / name).read_bytes())
        shown.append(real(self))
        return shown[-1]

    monkeypatch.setattr(Growth, "prefix", prefix)
    recipe = make_recipe(while_dumping=True, dev=False, max_steps=30)
    train(recipe, url, tmp_path / "remote")
    assert shown[:3] == [1, 2, 4]
    local = tmp_path / "cache"
    shutil.copytree(world.cache, local)
    for file in local.glob(f"{signal}*"):
        file.rename(tmp_path / file.name)
    pins, shown = iter([1, 2, 4, 4]), []

    def local_prefix(self):
        for shard in range(next(pins, 4)):
            name = f"{signal}{shard:05d}.json"
            shutil.copyfile(world.cache / name, local / name)
        return real(self)

    monkeypatch.setattr(Growth, "prefix", local_prefix)
    train(recipe, local, tmp_path / "local")
    assert metrics(tmp_path / "remote") == metrics(tmp_path / "local")
    assert open_cache(local).committed("threshold") == set(range(4))
