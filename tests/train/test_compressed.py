"""Training from a cache that is compressed for transfer."""

import json

from kdcache.formats.stores.transfer import compress_cache
from kdcache.train.runs.loop import train


def test_a_run_equals_one_from_the_cache_itself(world, make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_LOCAL_COPY", str(tmp_path / "copy"))
    compress_cache(world.cache, tmp_path / "packed")
    recipe = make_recipe(max_steps=6)
    logs = []
    for cache in (world.cache, tmp_path / "packed"):
        out = tmp_path / f"run-{len(logs)}"
        train(recipe, cache, out)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 6
    assert list((tmp_path / "copy").rglob("*.arrow"))
