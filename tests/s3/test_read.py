"""A cache on a real S3 server read by every command: what they say is what a local one says."""

import json
import os
from contextlib import closing
from pathlib import Path

import boto3
import pytest

from kdcache.cli import main
from kdcache.dump.runner import dump
from kdcache.formats.checks.verify import verify_cache
from kdcache.recipe import parse_recipe
from kdcache.train.runs.loop import train
from tests.s3.conftest import folder_tree, local_copy_variables, remote_tree
from tests.s3.proxy import Proxy, seeded
from tests.train.conftest import STUDENT


@pytest.fixture(scope="module")
def stored(world):
    """URL of the world's cache on the server."""
    url = "s3://bucket/stored/cache"
    dump(world.recipe, url)
    return url


@pytest.fixture
def client():
    """Another client than kdcache's."""
    with closing(boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])) as found:
        yield found


def training(**changes):
    tree = {
        "student": {"config": STUDENT},
        "objective": [
            {"loss": "cross_entropy", "weight": 0.5},
            {"loss": "forward_kl", "weight": 0.5, "signal": "logits"},
        ],
        "device": "cpu",
        "max_steps": 12,
        "batch_tokens": 120,
        "window_shards": 2,
        "log_every": 1,
        "schedule": {"warmup_steps": 5},
        "optimizer": {"lr": 0.005},
        "checkpoints": {"every_steps": 6},
    }
    return parse_recipe({"name": "test", "train": tree | changes})


def small_bound(world) -> int:
    """Room for the tokenizers and one data file that is trained on, not for two."""
    sizes = {path: len(data) for path, data in world.tree.items()}
    data = [size for path, size in sizes.items() if path.split("/")[0] in ("samples", "logits")]
    tokenizers = sum(size for path, size in sizes.items() if path.startswith("tokenizers/"))
    assert 1.9 * max(data) < sum(data) / 2
    return tokenizers + int(1.9 * max(data))


def weights(run: Path) -> bytes:
    return (run / "last" / "model.safetensors").read_bytes()


def test_verify_says_the_same(world, stored, tmp_path):
    here, there = verify_cache(world.cache), verify_cache(stored)
    assert not there.faults
    assert (there.files, there.bytes) == (here.files, here.bytes)
    assert not (tmp_path / "copy").exists()  # it reads the store, not a copy
    assert verify_cache(stored, quick=True).files == verify_cache(world.cache, quick=True).files


def test_verify_finds_what_is_broken_in_the_store(world, url, client):
    prefix = url.removeprefix("s3://bucket/")
    for path, data in world.tree.items():
        client.put_object(Bucket="bucket", Key=f"{prefix}/{path}", Body=data)
    broken = {path for path in world.tree if path.startswith("logits/")}
    cut = sorted(broken)[0]
    for path in broken:
        data = bytearray(world.tree[path])
        data[len(data) // 2] ^= 1
        data = data[:-1] if path == cut else data
        client.put_object(Bucket="bucket", Key=f"{prefix}/{path}", Body=bytes(data))
    faults = verify_cache(url).faults
    assert {path for path in broken if any(f"{url}/{path}" in fault for fault in faults)} == broken
    (fault,) = verify_cache(url, quick=True).faults
    assert cut in fault


def test_inspect_says_the_same(world, stored, capsys):
    told = []
    for place in (str(world.cache), stored):
        assert main(["inspect", place]) == 0
        told.append(capsys.readouterr().out.replace(place, "CACHE"))
    assert told[0] == told[1]


def test_training_from_s3_is_training_from_the_disk(world, stored, tmp_path):
    train(training(), world.cache, tmp_path / "here")
    train(training(), stored, tmp_path / "there")
    assert weights(tmp_path / "there") == weights(tmp_path / "here")


def test_training_under_faults_and_a_small_local_copy(world, stored, server, tmp_path, monkeypatch):
    """5% errors, 5% dropped connections, and room for the largest file but not for two."""
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", str(small_bound(world)))
    train(training(max_steps=8), world.cache, tmp_path / "here")
    with Proxy(server.port, seeded(4, 0.05, 0.05)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        train(training(max_steps=8), stored, tmp_path / "there")
        assert sum(proxy.seen.values()) - proxy.seen["passed"] > 2
    assert weights(tmp_path / "there") == weights(tmp_path / "here")


def test_two_trainers_share_one_small_local_copy(world, stored, forks, tmp_path, monkeypatch):
    """Each gets what a local cache gives, and both together stay under the bound."""
    bound = small_bound(world)
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", str(bound))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(training(max_steps=10).model_dump_json(exclude_unset=True))
    runs = [tmp_path / "one", tmp_path / "two"]
    running = [
        forks.start(
            ["train", str(recipe), "--cache", stored, "--out", str(run)],
            run,
            environment=local_copy_variables(),
        )
        for run in runs
    ]
    train(training(max_steps=10), world.cache, tmp_path / "here")
    for process, run in zip(running, runs, strict=True):
        ended = process.wait()
        assert ended.code == 0, ended.err
        assert weights(run) == weights(tmp_path / "here")
    here = [path.stat().st_size for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert 0 < sum(here) <= bound


def test_compile_reads_from_s3_and_writes_to_it(world, stored, url, tmp_path):
    """The data files are those of a compile from disk to disk."""
    assert main(["compile", str(world.cache), "--out", str(tmp_path / "out"), "--count", "9"]) == 0
    assert main(["compile", stored, "--out", url, "--count", "9"]) == 0
    assert not verify_cache(url, quick=True).faults
    trees = folder_tree(tmp_path / "out"), remote_tree(url)
    here, there = (
        {path: data for path, data in tree.items() if not path.endswith(".json")} for tree in trees
    )
    assert len(here) >= 4
    assert here == there


def test_a_command_that_meets_no_bucket_says_so_in_one_line(capsys):
    assert main(["inspect", "s3://nobucket/cache"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("kdcache: s3://nobucket/cache/")
    assert err.endswith(": cannot be read: no such bucket; make it, or correct the URL\n")
    assert err.count("\n") == 1


def test_the_json_of_inspect_names_the_url(stored, capsys):
    assert main(["inspect", stored, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == stored
