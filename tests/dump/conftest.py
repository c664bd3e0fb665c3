"""Fixtures of the dump's tests."""

from types import SimpleNamespace

import pytest
import torch

from kdcache.dump.runner import dump
from kdcache.recipe import parse_recipe
from tests.dump import zoo as zoo_models
from tests.dump.forks import Forks
from tests.dump.ordeal import Ordeal, make_corpus
from tests.dump.world import THRESHOLD, make_bart, make_lines, make_marian, make_t5, tree


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Corpus files src and tgt, their lines, and teacher directories by family."""
    root = tmp_path_factory.mktemp("world")
    src, tgt = make_lines(60)
    (root / "src").write_text("".join(line + "\n" for line in src))
    (root / "tgt").write_text("".join(line + "\n" for line in tgt))
    make_marian(root / "marian", [*src, *tgt])
    make_t5(root / "t5", [*src, *tgt])
    make_bart(root / "bart", [*src, *tgt])
    return SimpleNamespace(root=root, src=src, tgt=tgt)


@pytest.fixture(scope="session")
def zoo(world, tmp_path_factory):
    """Directory of a tiny model: `zoo("bert")`, `zoo("bert", "classifier")`; see zoo.py."""
    root = tmp_path_factory.mktemp("zoo")

    def directory(architecture: str, head: str = "lm"):
        path = root / f"{architecture}-{head}"
        if not path.exists():
            zoo_models.make(architecture, head, path, [*world.src, *world.tgt])
        return path

    return directory


@pytest.fixture
def make_recipe(world):
    """Recipes over the world; keywords replace keys of the dump section."""

    def make(family: str | None = "marian", codec: dict | None = None, corpus=None, **dump):
        tree = {
            "name": "test",
            "corpus": corpus
            or {"fields": {"src": str(world.root / "src"), "tgt": str(world.root / "tgt")}},
            "dump": {"shard_tokens": 500, "batch_tokens": 120},
        }
        if family is not None:
            tree["dump"]["teacher"] = {"path": str(world.root / family), "device": "cpu"}
        if codec is not None:
            tree["dump"]["signals"] = {"logits": {"codec": codec}}
        tree["dump"] |= dump
        return parse_recipe(tree)

    return make


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """A recipe and the files of its dump."""
    fields = {"src": str(world.root / "src"), "tgt": str(world.root / "tgt")}
    recipe = parse_recipe(
        {
            "name": "test",
            "corpus": {"fields": fields},
            "dump": {
                "shard_tokens": 500,
                "batch_tokens": 120,
                "teacher": {"path": str(world.root / "marian"), "device": "cpu"},
                "signals": {"logits": {"codec": THRESHOLD}},
            },
        }
    )
    out = tmp_path_factory.mktemp("whole") / "cache"
    dump(recipe, out)
    return recipe, tree(out)


@pytest.fixture(scope="session")
def ordeal(tmp_path_factory):
    """A small dump in six shards that may be killed, refused and shared out; see ordeal.py."""
    root = tmp_path_factory.mktemp("ordeal")
    make_corpus(root)
    with Forks(root / "log") as forks:
        yield Ordeal(root, forks)


@pytest.fixture
def standing(whole, tmp_path):
    """A copy of the whole dump."""
    for name, data in whole[1].items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "cache"
