import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdcache.dump.runner import dump
from kdcache.errors import ModelError, RecipeError
from kdcache.formats import plan
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.recipe import parse_recipe
from tests.dump.descriptions import NOISE, ROUNDING, SRC, masked_inputs, recipe_of
from tests.dump.zoo import CLASSIFIERS

SRC_STREAM = {"src": {"field": "src"}}


class Oracle:
    """A classifier run by transformers, one text at a time and without padding."""

    def __init__(self, directory):
        self.model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def scores(self, text: str, second: str | None = None) -> np.ndarray:
        """[C] of a text, or of a pair."""
        inputs = self.tokenizer(text, second, return_tensors="pt")
        with torch.no_grad():
            return self.model(**inputs).logits[0].numpy()

    def scores_of_ids(self, ids: list[int]) -> np.ndarray:
        """[C] of a text that is tokenised already."""
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0].numpy()


def stored(path, name: str) -> dict[int, np.ndarray]:
    """Corpus row to its scores, one reading after another."""
    cache = open_cache(path)
    found = {}
    for number in range(cache.num_shards):
        samples = cache.samples(number)
        for start, _, columns in cache.signal_shard(name, number).parts:
            column = columns["scores"]
            for m in range(len(column)):
                values = column.fields["value"][column.offsets[m] : column.offsets[m + 1]]
                found[int(samples.row[start - samples.start + m])] = values.astype(np.float64)
    return found


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_scores_are_those_of_one_text_at_a_time(architecture, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(plan.plan_parts, "__defaults__", (60,))  # several parts a shard
    oracle = Oracle(zoo(architecture, "classifier"))
    signals = {
        "wide": {"kind": "classes", "stream": "src"},
        "narrow": {"kind": "classes", "stream": "src", "values": "float16"},
    }
    for batch_tokens in (1, 400):
        out = tmp_path / f"cache{batch_tokens}"
        options = {"streams": SRC_STREAM, "shard_tokens": 50, "batch_tokens": batch_tokens}
        dump(recipe_of(tmp_path, zoo(architecture, "classifier"), signals, **options), out)
        cache = open_cache(out)
        assert cache.num_shards > 1
        assert cache.signal("wide").labels == ["no", "maybe", "yes"]
        assert cache.signal("wide").problem == "classification"
        for name, rtol in (("wide", 1e-5), ("narrow", ROUNDING["float16"] * 1.01)):
            found = stored(out, name)
            assert len(found) == cache.num_samples >= 10
            for row, values in found.items():
                np.testing.assert_allclose(values, oracle.scores(SRC[row]), rtol=rtol, atol=NOISE)
    assert len(cache.signal_shard("wide", 0).parts) > 1
    assert verify_cache(out).faults == []


TEXTS = {
    "feel": [{"text": line} for line in SRC[:6]],
    "near": [{"text": one, "second": two} for one, two in zip(SRC[:5], SRC[3:8], strict=True)],
}


def multi_task_recipe(folder, zoo, architecture: str):
    """Two tasks, one of single texts and one of pairs; a classifier and a regressor."""
    tasks = {}
    for task, rows in TEXTS.items():
        (folder / task).write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = {name: name for name in rows[0]}
        tasks[task] = {"format": "jsonl", "path": str(folder / task), "fields": fields}
    teachers = {
        name: {"path": str(zoo(architecture, name)), "device": "cpu"}
        for name in ("classifier", "regressor")
    }
    signal = {"kind": "classes", "teacher": "classifier"}
    section = {
        "teacher": teachers["classifier"],
        "teachers": teachers,
        "streams": {"text": {"field": "text", "pair": "second"}},
        "shard_tokens": 40,
        "signals": {
            "every": signal,
            "feel": {**signal, "task": "feel"},
            "near": {**signal, "task": "near", "teacher": "regressor"},
        },
    }
    return parse_recipe({"name": "test", "corpus": {"tasks": tasks}, "dump": section})


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_signal_may_label_the_samples_of_one_task(architecture, zoo, tmp_path):
    out = tmp_path / "cache"
    dump(multi_task_recipe(tmp_path, zoo, architecture), out)
    assert verify_cache(out).faults == []
    cache = open_cache(out)
    tasks = [set(cache.samples(n).tasks().to_pylist()) for n in range(cache.num_shards)]
    assert {"feel"} in tasks  # a shard in which the signal of the other task has nothing
    assert {"near"} in tasks
    oracles = {name: Oracle(zoo(architecture, name)) for name in ("classifier", "regressor")}
    rows = [row for rows in TEXTS.values() for row in rows]
    for name, task, teacher in (
        ("every", None, "classifier"),
        ("feel", "feel", "classifier"),
        ("near", "near", "regressor"),
    ):
        found = stored(out, name)
        assert len(found) == len(rows)
        for row, values in found.items():
            own = "feel" if row < len(TEXTS["feel"]) else "near"
            if task in (None, own):
                text = rows[row]
                expected = oracles[teacher].scores(text["text"], text.get("second"))
                np.testing.assert_allclose(values, expected, rtol=1e-5, atol=NOISE)
            else:
                assert len(values) == 0
    record = cache.signal("near")
    assert (record.task, record.problem, record.labels) == ("near", "regression", ["score"])
    assert cache.signal("feel").task == "feel"


def test_token_types_change_what_a_pair_is(zoo):
    # Or the test above would pass without them.
    oracle = Oracle(zoo("bert", "regressor"))
    inputs = oracle.tokenizer(SRC[0], SRC[3])["input_ids"]
    assert abs(oracle.scores(SRC[0], SRC[3]) - oracle.scores_of_ids(inputs)).max() > 0.01


def test_every_masking_of_a_sample_has_scores(zoo, tmp_path):
    signals = {
        "masks": {"kind": "masks", "stream": "src", "replicas": 3, "probability": 0.5},
        "plain": {"kind": "classes", "stream": "src"},
        "scores": {"kind": "classes", "stream": "src", "masks": "masks"},
    }
    options = {"streams": SRC_STREAM, "shard_tokens": 50, "batch_tokens": 60}
    recipe = recipe_of(tmp_path, zoo("bert", "classifier"), signals, **options)
    dump(recipe, tmp_path / "cache")
    assert verify_cache(tmp_path / "cache").faults == []
    oracle = Oracle(zoo("bert", "classifier"))
    found, plain = (stored(tmp_path / "cache", name) for name in ("scores", "plain"))
    readings = masked_inputs(tmp_path / "cache", "src", "masks")
    assert open_cache(tmp_path / "cache").signal("scores").masks == "masks"
    moved = []
    for row, values in found.items():
        expected = [oracle.scores_of_ids(ids) for ids in readings[row]]
        np.testing.assert_allclose(values.reshape(3, 3), expected, rtol=1e-5, atol=NOISE)
        moved.append(np.abs(values.reshape(3, 3) - plain[row]).max())
    assert np.median(moved) > 0.01


def test_several_labels_may_hold_at_once(zoo, tmp_path):
    source = zoo("bert", "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "many")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "many")
    signals = {"scores": {"kind": "classes", "stream": "src"}}
    dump(recipe_of(tmp_path, tmp_path / "many", signals), tmp_path / "cache")
    assert open_cache(tmp_path / "cache").signal("scores").problem == "multi_label"


def test_a_teacher_without_classes_is_refused(zoo, tmp_path):
    signals = {"scores": {"kind": "classes", "stream": "src"}}
    message = r"a teacher of kind masked_lm has no classes \(scores\); it has logits, hidden"
    with pytest.raises(ModelError, match=message):
        dump(recipe_of(tmp_path, zoo("bert"), signals), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("task", ["near", "feel"])
def test_a_task_that_the_corpus_has_not_is_refused(task, zoo, tmp_path):
    recipe = multi_task_recipe(tmp_path, zoo, "bert")
    tree = recipe.model_dump(mode="json")
    del tree["corpus"]["tasks"][task]
    (left,) = tree["corpus"]["tasks"]
    tree["corpus"]["tasks"][left]["fields"]["second"] = "text"
    with pytest.raises(RecipeError, match=rf"signals.{task}.task is '{task}'; .*\['{left}'\]"):
        dump(parse_recipe(tree), tmp_path / "cache")


def spoil(source, folder, value: float) -> None:
    """A classifier whose second score is a number of one's own."""
    model = AutoModelForSequenceClassification.from_pretrained(source)
    with torch.no_grad():
        model.classifier.bias[1] = value
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_named(value, zoo, tmp_path):
    spoil(zoo("bert", "classifier"), tmp_path / "broken", value)
    signals = {"scores": {"kind": "classes", "stream": "src"}}
    recipe = recipe_of(tmp_path, tmp_path / "broken", signals, batch_tokens=1)
    with pytest.raises(ModelError) as caught:
        dump(recipe, tmp_path / "cache")
    assert re.fullmatch(
        r"signal 'scores', corpus rows (\d+) to \1: corpus row \1: the score of 'maybe' is "
        rf"{value}, expected a finite number; check the teacher and its dtype",
        str(caught.value),
    )


def test_a_score_that_float16_does_not_hold_is_refused(zoo, tmp_path):
    spoil(zoo("bert", "classifier"), tmp_path / "large", 1e5)
    signals = {"scores": {"kind": "classes", "stream": "src", "values": "float16"}}
    with pytest.raises(ModelError, match=r"more than float16 holds \(65504\); .* float32"):
        dump(recipe_of(tmp_path, tmp_path / "large", signals), tmp_path / "cache")
