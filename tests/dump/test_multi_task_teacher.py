"""Teachers with a head for each of several tasks."""

import json

import numpy as np
import pytest
import torch

from kdcache.dump.runner import dump
from kdcache.errors import ModelError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.models.multi_task import MultiTaskConfig, MultiTaskModel
from kdcache.recipe import parse_recipe
from tests.dump.test_classes import stored
from tests.train.conftest import make_lines
from tests.train.test_masked_lm import BERT, save_tokenizer

TASKS = {"feel": {"labels": ["no", "maybe", "yes"]}, "near": {"kind": "similarity"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two random models of two tasks, and a corpus of them."""
    root = tmp_path_factory.mktemp("heads")
    lines = make_lines(40)[0]
    for seed, name in enumerate(("one", "two")):
        size = save_tokenizer(root / name, lines)
        torch.manual_seed(seed)
        body = BERT | {"vocab_size": size, "max_position_embeddings": 64}
        model = MultiTaskModel(MultiTaskConfig(body, TASKS, pooling="mean_cls", head_size=8))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.4)
        model.save_pretrained(root / name)
    rows = {
        "feel": [{"text": line} for line in lines[:9]],
        "near": [{"text": a, "pair": b} for a, b in zip(lines[9:16], lines[20:27], strict=True)],
    }
    for name, found in rows.items():
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    return root


def recipe_of(root, signals, **section):
    fields = {"feel": ["text"], "near": ["text", "pair"]}
    tasks = {
        name: {"format": "jsonl", "path": str(root / name), "fields": {n: n for n in names}}
        for name, names in fields.items()
    }
    tree = {
        "teacher": {"path": str(root / "one"), "device": "cpu"},
        "streams": {"text": {"field": "text", "pair": "pair"}},
        "shard_tokens": 60,
        "signals": signals,
    }
    return parse_recipe({"name": "test", "corpus": {"tasks": tasks}, "dump": tree | section})


SIGNALS = {f"scores_{name}": {"kind": "classes", "task": name} for name in TASKS}


def oracle(directory, cache):
    """Row to scores, each text alone in float64."""
    model = MultiTaskModel.from_pretrained(directory).double().eval()
    found = {}
    for number in range(cache.num_shards):
        samples = cache.samples(number)
        column = samples.streams["text"]
        for n, (row, task) in enumerate(zip(samples.row, samples.tasks().to_pylist(), strict=True)):
            part = slice(column.offsets[n], column.offsets[n + 1])
            ids, types = (
                torch.from_numpy(column.fields[key][part].astype(np.int64))[None]
                for key in ("id", "segment")
            )
            with torch.no_grad():
                out = model(ids, torch.ones_like(ids), types, task=task)
            found[int(row)] = task, out.logits[0].numpy()
    return found


@pytest.mark.parametrize("batch_tokens", [1, 500])
def test_each_sample_is_scored_by_the_head_of_its_task(root, tmp_path, batch_tokens):
    hidden = {"hidden": {"kind": "hidden", "stream": "text", "layers": "all"}}
    dump(recipe_of(root, SIGNALS | hidden, batch_tokens=batch_tokens), tmp_path / "c")
    cache = open_cache(tmp_path / "c")
    assert verify_cache(tmp_path / "c").faults == []
    right = oracle(root / "one", cache)
    for name in TASKS:
        record, found = cache.signal(f"scores_{name}"), stored(tmp_path / "c", f"scores_{name}")
        assert record.labels == TASKS[name].get("labels", ["score"])
        assert record.problem == ("regression" if name == "near" else "classification")
        own = {row: scores for row, (task, scores) in right.items() if task == name}
        assert {row for row, scores in found.items() if len(scores)} == set(own)
        for row, scores in own.items():
            np.testing.assert_allclose(found[row], scores, rtol=1e-4, atol=1e-5)
    assert cache.signal("hidden").layers[0] == 0  # the body's, embeddings first


def test_an_ensemble_averages_each_task(root, tmp_path):
    teacher = {"path": [str(root / "one"), str(root / "two")], "device": "cpu"}
    dump(recipe_of(root, SIGNALS, teacher=teacher), tmp_path / "c")
    cache = open_cache(tmp_path / "c")
    both = [oracle(root / name, cache) for name in ("one", "two")]
    for name in TASKS:
        for row, scores in stored(tmp_path / "c", f"scores_{name}").items():
            members = [one[row][1] for one in both if one[row][0] == name]
            if not members:
                assert not len(scores)
            elif name == "near":
                np.testing.assert_allclose(scores, np.mean(members, axis=0), rtol=1e-4, atol=1e-5)
            else:
                each = [np.exp(one) / np.exp(one).sum() for one in members]
                np.testing.assert_allclose(np.exp(scores), np.mean(each, axis=0), rtol=1e-4)


@pytest.mark.parametrize("task", [None, "near"])
def test_a_signal_without_a_head_is_refused_in_a_line(root, tmp_path, task):
    if task is not None:  # a model of another task alone
        body = MultiTaskConfig.from_pretrained(root / "one").text_config
        MultiTaskModel(
            MultiTaskConfig(body, {"a": TASKS["feel"], "b": TASKS["near"]})
        ).save_pretrained(tmp_path / "other")
        save_tokenizer(tmp_path / "tokens", make_lines(40)[0])
        for file in (tmp_path / "tokens").iterdir():
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    path = str(root / "one" if task is None else tmp_path / "other")
    signals = {"scores": {"kind": "classes", "task": task}}
    recipe = recipe_of(root, signals, teacher={"path": path, "device": "cpu"})
    with pytest.raises(ModelError, match=f"of task {task!r}; its heads are of the tasks") as found:
        dump(recipe, tmp_path / "c")
    assert "\n" not in str(found.value)
