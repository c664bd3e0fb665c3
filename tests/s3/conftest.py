"""An S3 server, a bucket, a tiny teacher with its corpus, and the dump of it on the local disk."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import fsspec.config
import pytest
import torch

from kdcache.dump.runner import dump
from kdcache.formats.stores import retry
from kdcache.recipe import parse_recipe
from tests.dump.forks import Forks
from tests.dump.world import make_lines, make_marian, tree
from tests.s3.server import Server

#: One try of a request by botocore, so that it is ours that are tested.
ONE_TRY = {"retries": {"mode": "standard", "total_max_attempts": 1}}
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server():
    """S3 on loopback."""
    with Server() as running:
        running.make_bucket("bucket")
        yield running


@pytest.fixture(scope="session", autouse=True)
def _environment(server):
    """The variables that a user sets, for this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        patch.setenv("FSSPEC_S3", json.dumps({"config_kwargs": ONE_TRY}))
        # fsspec has read the environment when it was imported.
        patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": ONE_TRY})
        patch.setattr(retry, "FIRST_WAIT_SECONDS", 0.01)
        yield


@pytest.fixture(autouse=True)
def local_copy(tmp_path, monkeypatch):
    """The variables of a local copy of its own."""
    variables = {"KDCACHE_LOCAL_COPY": str(tmp_path / "copy"), "KDCACHE_LOCAL_COPY_BYTES": "1GB"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def url(request):
    """A place in the bucket for each test, the same in each run: faults are drawn by it."""
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    return f"s3://bucket/{name}/cache"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Recipe, its file, and the cache that it gives on the local disk, as a tree of bytes."""
    root = tmp_path_factory.mktemp("s3")
    src, tgt = make_lines(40)
    for name, lines in (("src", src), ("tgt", tgt)):
        (root / name).write_text("".join(line + "\n" for line in lines))
    make_marian(root / "teacher", [*src, *tgt])
    sections = {
        "name": "test",
        "corpus": {"fields": {name: str(root / name) for name in ("src", "tgt")}},
        "dump": {
            "teacher": {"path": str(root / "teacher"), "device": "cpu"},
            "shard_tokens": 300,
            "batch_tokens": 200,
            "signals": {
                "logits": {"codec": {"name": "threshold", "c": "1/8"}},
                "hidden": {"kind": "hidden", "side": "encoder", "stream": "src"},
            },
        },
    }
    (root / "recipe.yaml").write_text(json.dumps(sections))
    recipe = parse_recipe(sections)
    dump(recipe, root / "cache")
    return SimpleNamespace(
        root=root,
        recipe=recipe,
        file=root / "recipe.yaml",
        cache=root / "cache",
        tree=tree(root / "cache"),
    )


@pytest.fixture(scope="session")
def forks(world, tmp_path_factory):
    """Processes that run commands against the server."""
    work = tmp_path_factory.mktemp("forks")
    with Forks(work) as running:
        running.warm(["dump", str(world.file), "--out", str(work / "warm")])
        yield running


def local_copy_variables() -> dict[str, str]:
    """What a process that is forked must be told of this test's local copy."""
    return {name: value for name, value in os.environ.items() if name.startswith("KDCACHE_")}


def remote_tree(url: str) -> dict[str, bytes]:
    """Every file of a cache on the store, read by another client than kdcache's."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    found = {}
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    for page in pages:
        for item in page.get("Contents", []):
            body = client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
            found[item["Key"].removeprefix(f"{prefix}/")] = body
    client.close()
    return {path: data for path, data in found.items() if not path.startswith(".")}


def folder_tree(root: Path) -> dict[str, bytes]:
    """Every file of a cache on the local disk, what is no part of the format left out."""
    return {path: data for path, data in tree(root).items() if not path.startswith(".")}
