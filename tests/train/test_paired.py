"""Predictions of single samples, and paired tests of runs, against enumeration and a few lines."""

import json
import math
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from kdcache.cli import main
from kdcache.errors import IdentityError, ModelError
from kdcache.models.loading import load_tokenizer
from kdcache.models.multi_task import MultiTaskConfig, MultiTaskModel
from kdcache.models.tasks import Task
from kdcache.recipe import dump_recipe, load_recipe, parse_recipe
from kdcache.train.evaluation.baseline import PREDICTIONS, RESULT, Baseline
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.evaluation.metrics import macro_f1, matthews
from kdcache.train.evaluation.paired import compare, mcnemar, resampled
from kdcache.train.evaluation.predictions import Predictions, parse_predictions, sample_losses
from kdcache.train.losses.task_losses import task_loss
from tests.dump.zoo import make
from tests.train import test_classifier, test_multi_task
from tests.train.conftest import make_lines
from tests.train.test_classifier import BERT, LABELS, save_model
from tests.train.test_masked_lm import save_tokenizer
from tests.train.test_multi_task import HEADS

CLASSES = Task("classification", ("a", "b", "c"))
RANKING = Task("ranking", ("other", "answer"))
NUMBER = Task("similarity")
R = 60


def one_sided(alone, other):
    """Enumeration: how often so many of n fair coins, or more, fall on the commoner side."""
    count, most = alone + other, max(alone, other)
    falls = [sum(coins) for coins in product((0, 1), repeat=count)]
    return sum(fall >= most for fall in falls) / len(falls)


@pytest.mark.parametrize("alone", range(6))
@pytest.mark.parametrize("other", range(6))
def test_mcnemar_is_what_counting_all_splits_gives(alone, other):
    right = np.array([True] * alone + [False] * other + [True, True, False])
    theirs = np.array([False] * alone + [True] * other + [True, True, False])
    found = mcnemar(right, theirs)
    assert (found["right_alone"], found["baseline_right_alone"]) == (alone, other)
    assert found["mcnemar_p_value"] == min(1, 2 * one_sided(alone, other))


def test_mcnemar_of_many_samples_is_exact():
    right = np.arange(30_000) < 10_200
    found = mcnemar(right, ~right & (np.arange(30_000) < 20_000))
    # The normal distribution with a correction for continuity, good at so many.
    near = math.erfc((400 - 1) / math.sqrt(20_000) / math.sqrt(2))
    assert found["mcnemar_p_value"] == pytest.approx(near, rel=1e-2)
    assert mcnemar(right, ~right & (np.arange(30_000) > 30_000))["mcnemar_p_value"] == 0.0


@pytest.mark.parametrize("num_classes", [2, 5])
def test_f1_and_mcc_count_as_a_loop_does(num_classes):
    draw = np.random.default_rng(num_classes)
    gold, said = draw.integers(0, num_classes, (2, 40)) * 2  # every other class is absent
    both = set(gold) | set(said)
    pairs = Counter(zip(gold.tolist(), said.tolist(), strict=True))
    f1 = [2 * pairs[c, c] / ((gold == c).sum() + (said == c).sum()) for c in both]
    assert macro_f1(gold, said) == pytest.approx(np.mean(f1), abs=1e-15)
    # Of many classes it is the correlation of indicators, taken over all of them together.
    one, two = (
        np.stack([side == c for c in both], 1) - np.array([[(side == c).mean() for c in both]])
        for side in (gold, said)
    )
    expected = (one * two).sum() / math.sqrt((one**2).sum() * (two**2).sum())
    assert matthews(gold, said) == pytest.approx(expected, abs=1e-12)


def test_units_are_drawn_whole_and_as_sacrebleu_draws_them():
    unit = np.array([4, 9, 4, 7, 9, 9])
    members = {0: [0, 2], 1: [3], 2: [1, 4, 5]}  # of 4, 7 and 9
    draws = np.random.default_rng(3).choice(3, size=(50, 3), replace=True)
    found = list(resampled(unit, 50, np.random.default_rng(3)))
    for chosen, drawn in zip(found, draws, strict=True):
        assert chosen.tolist() == [sample for one in drawn.tolist() for sample in members[one]]


def predictions_of(task, seed, count=40, noise=1.0):
    """What a model says that is right the less, the more noise there is."""
    draw = np.random.default_rng(seed)
    query = np.arange(count) // 4
    if task.kind == "similarity":
        gold = np.random.default_rng(1).normal(size=count)
        scores = gold[:, None] + noise * draw.normal(size=(count, 1))
    else:
        gold = np.random.default_rng(1).integers(0, len(task.labels), count)
        scores = 2.0 * (np.arange(len(task.labels)) == gold[:, None])
        scores = scores + noise * draw.normal(size=scores.shape)
        scores = scores[:, 1:] - scores[:, :1] if task.kind == "ranking" else scores
    return Predictions.of(task, scores, gold, query, np.arange(count) * 2)


def against(own, other, num_samples=R):
    """A comparison of one task."""
    held = Baseline("other", "own", {}, (), {"": other})
    return compare({"": own}, held, num_samples)


@pytest.mark.parametrize("task", [CLASSES, RANKING, NUMBER], ids=lambda task: task.kind)
def test_runs_that_say_the_same_differ_by_nothing(task):
    found = against(predictions_of(task, 2), predictions_of(task, 2))
    tests = {key: one for key, one in found.items() if isinstance(one, dict)}
    assert set(tests) == set(predictions_of(task, 2).metrics())
    for one in tests.values():
        assert (one["difference"], one["p_value"]) == (0, 1)
        assert one["difference_interval"] == [0, 0]
        assert one["interval"] == one["baseline_interval"] > 0
    assert found["unit"] == ("query" if task is RANKING else "text")
    assert found["num_units"] == (10 if task is RANKING else 40)
    # The binomial is of independent samples.
    if "accuracy" in tests:
        assert ("mcnemar_p_value" in tests["accuracy"]) == (task is CLASSES)
        assert tests["accuracy"].get("mcnemar_p_value", 1) == 1


def test_a_run_that_is_right_everywhere_is_better_than_one_that_is_nowhere():
    best = predictions_of(CLASSES, 2, noise=0)
    worst = parse_predictions(
        CLASSES,
        [json.loads(line) | {"prediction": "c" if n == "a" else "a"} for n, line in named(best)],
    )
    found = against(best, worst)["accuracy"]
    assert (found["score"], found["baseline"], found["difference"]) == (1, 0, 1)
    assert found["difference_interval"] == [1, 1]
    assert found["p_value"] == 1 / (R + 1)
    assert found["mcnemar_p_value"] == 2 / 2**40
    back = against(worst, best)["accuracy"]
    assert (back["difference"], back["p_value"]) == (-1, 1 / (R + 1))


def named(predictions):
    """Lines with the gold label in each."""
    return [(json.loads(line)["gold"], line) for line in predictions.lines("")]


def expected_test(own, other, drawn):
    """What is said of two columns of scores in resamplings, of which the first is of all."""
    apart = drawn[:, 0] - drawn[:, 1]
    ordered, out = sorted(apart), len(apart) // 40
    far = sum(abs(one - np.mean(apart)) >= abs(own - other) for one in apart)
    return {
        "score": pytest.approx(own, abs=1e-12),
        "baseline": pytest.approx(other, abs=1e-12),
        "difference": pytest.approx(own - other, abs=1e-12),
        "difference_interval": pytest.approx([ordered[out], ordered[-1 - out]], abs=1e-12),
        "p_value": (far + 1) / (len(apart) + 1),
    }


def subset(found, expected):
    """The same keys of what was found."""
    return {key: found[key] for key in expected}


def test_every_metric_is_resampled_by_samples_or_queries():
    for task in (CLASSES, RANKING, NUMBER):
        own, other = predictions_of(task, 2), predictions_of(task, 3, noise=1.5)
        found = against(own, other, 200)
        count = 10 if task is RANKING else 40
        draws = np.random.default_rng(12345).choice(count, size=(200, count), replace=True)
        if task is RANKING:
            draws = (draws[:, :, None] * 4 + np.arange(4)).reshape(200, 40)
        for key, value in own.metrics().items():
            drawn = np.array([[one.metrics(c)[key] for one in (own, other)] for c in draws])
            expected = expected_test(value, other.metrics()[key], drawn)
            assert subset(found[key], expected) == expected, key
        plain = {
            "accuracy": lambda g, s: np.mean(g == s),
            "pearson": lambda g, s: np.corrcoef(g, s)[0, 1],
        }
        key = "pearson" if task is NUMBER else "accuracy"
        drawn = np.array(
            [[plain[key](one.gold[c], one.said[c]) for one in (own, other)] for c in draws]
        )
        whole = [plain[key](one.gold, one.said) for one in (own, other)]
        expected = expected_test(*whole, drawn)
        assert subset(found[key], expected) == expected


@pytest.mark.parametrize("task", [CLASSES, RANKING, NUMBER], ids=lambda task: task.kind)
def test_losses_of_samples_have_the_loss_as_their_mean_and_lines_hold_all(task):
    own = predictions_of(task, 4)
    draw = np.random.default_rng(0)
    scores, query = draw.normal(size=(40, task.num_scores)), draw.integers(0, 9, 40)
    losses = sample_losses(task, scores, own.gold, query)
    whole = task_loss(
        task,
        torch.from_numpy(scores),
        torch.from_numpy(own.gold.astype(float)),
        torch.from_numpy(query),
        1 / 40,
    )
    assert losses.mean() == pytest.approx(float(whole), rel=1e-12)
    again = parse_predictions(task, [json.loads(line) for line in own.lines("")])
    for name in ("rows", "unit", "gold", "said", "loss", "score"):
        assert np.array_equal(getattr(again, name), getattr(own, name)), name


# --- whole runs -----------------------------------------------------------------------------


def write_run(path, kind, source, field, pair, **evaluate_keys):
    """A run as it would have been trained: the recipe beside the model in best."""
    stream = {"field": field} | ({"pair": pair} if pair else {})
    terms = {
        "classifier": {"loss": "label_cross_entropy"},
        "multi_task": {"loss": "task_loss"},
        "causal_lm": {"loss": "cross_entropy"},
        "masked_lm": {"loss": "cross_entropy", "masks": "masks"},
    }
    tree = {
        "name": "test",
        "dump": {"streams": {source: stream}, "teacher": {"path": "none"}},
        "train": {
            "student": {"kind": kind, "path": str(path / "best")},
            "source": source,
            "target": source,
            "objective": [terms[kind]],
        },
        "evaluate": {
            "device": "cpu",
            "latency_sentences": 0,
            "bootstrap_samples": R,
            **evaluate_keys,
        },
    }
    if kind == "masked_lm":
        tree["dump"]["signals"] = {"masks": {"kind": "masks", "stream": source}}
    (path / "recipe.yaml").write_text(dump_recipe(parse_recipe(tree)))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Classifiers, regressors, models of several tasks and language models, all of them random."""
    root = tmp_path_factory.mktemp("paired")
    lines = make_lines(60)[0]
    rows = test_classifier.write(root / "rows", test_classifier.rows_of(lines, 2))
    corpus = rows | {"label": "label", "empty": "keep"}
    tasks = {
        name: test_multi_task.write(root / name, test_multi_task.rows_of(name, lines[:40]))
        for name in HEADS
    }
    several = {"tasks": tasks, "label": "label", "empty": "keep"}
    (root / "text").write_text("".join(line + "\n" for line in lines))
    texts = {"fields": {"text": str(root / "text")}}
    runs = {}
    for name, seed in (("one", 1), ("two", 2)):
        for kind in ("classifier", "number", "multi", "causal", "masked"):
            runs[f"{kind}-{name}"] = path = root / f"{kind}-{name}"
            path.mkdir()
            make_run(path, kind, seed, lines, (corpus, several, texts))
    return SimpleNamespace(root=root, runs=runs, corpus=corpus, several=several, lines=lines)


def make_run(path, kind, seed, lines, corpora):
    corpus, several, texts = corpora
    best = path / "best"
    if kind == "causal":
        make("gpt2", "lm", best, lines)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(best)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        model.save_pretrained(best)
        write_run(path, "causal_lm", "text", "text", None, corpus=texts)
        return
    size = save_tokenizer(best, lines)
    torch.manual_seed(seed)
    if kind == "masked":
        BertForMaskedLM(BertConfig(**BERT | {"vocab_size": size})).save_pretrained(best)
        write_run(path, "masked_lm", "text", "text", None, corpus=texts)
    elif kind == "multi":
        heads = {name: Task.of(tree).to_dict() for name, tree in HEADS.items()}
        sizes = BERT | {"vocab_size": size, "initializer_range": 0.5}
        MultiTaskModel(MultiTaskConfig(text_config=sizes, tasks=heads)).save_pretrained(best)
        write_run(path, "multi_task", "text", "text", "pair", corpus=several)
    else:
        number = kind == "number"
        save_model(best, size, ["score"] if number else LABELS, seed)
        own = corpus | ({"label": "value"} if number else {})
        write_run(path, "classifier", "both", "text", "pair", corpus=own)


def read(path):
    return [json.loads(line) for line in (path / PREDICTIONS).read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(world):
    """What every run says of its test set."""
    return {name: evaluate(path) for name, path in world.runs.items()}


def test_predictions_of_a_classifier_are_those_of_one_text_at_a_time(world, evaluated):
    rows = [json.loads(line) for line in (world.root / "rows").read_text().splitlines()]
    for kind, label in (("classifier", "label"), ("number", "value")):
        path, result = world.runs[f"{kind}-one"], evaluated[f"{kind}-one"]
        model = AutoModelForSequenceClassification.from_pretrained(path / "best").eval()
        tokenizer, found = load_tokenizer(path / "best"), read(path)
        assert [line["row"] for line in found] == [n for n, row in enumerate(rows) if row["label"]]
        for line in found:
            row = rows[line["row"]]
            with torch.no_grad():
                scores = model(**tokenizer(row["text"], row["pair"], return_tensors="pt")).logits[0]
            if kind == "number":
                assert line["gold"] == float(row[label])
                assert line["prediction"] == pytest.approx(scores.item(), abs=1e-4)
                assert line["loss"] == (line["prediction"] - line["gold"]) ** 2
                continue
            assert (line["gold"], line["prediction"]) == (row[label], LABELS[scores.argmax()])
            log_prob = scores.log_softmax(0)[LABELS.index(row[label])]
            assert line["loss"] == pytest.approx(-log_prob.item(), abs=1e-4)
            assert "task" not in line
        assert result["num_texts"] == len(found) == 48
        assert result["loss"] == pytest.approx(np.mean([line["loss"] for line in found]))
    lines = read(world.runs["classifier-one"])
    right = [line["gold"] == line["prediction"] for line in lines]
    assert evaluated["classifier-one"]["accuracy"] == np.mean(right)


def test_two_classifiers_are_compared_sample_by_sample(world, evaluated, capsys):
    one, two = world.runs["classifier-one"], world.runs["classifier-two"]
    words = ["evaluate", str(one), "--against", str(two), "--out", str(world.root / "out")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((world.root / "out" / RESULT).read_text())
    test = found["against"]
    right = [np.array([x["gold"] == x["prediction"] for x in read(run)]) for run in (one, two)]
    draws = np.random.default_rng(12345).choice(48, size=(R, 48), replace=True)
    drawn = np.stack([side[draws].mean(1) for side in right], 1)
    expected = expected_test(right[0].mean(), right[1].mean(), drawn)
    assert subset(test["accuracy"], expected) == expected
    assert (test["run"], test["num_units"], test["unit"]) == (str(two), 48, "text")
    assert {"loss", "accuracy", "macro_f1", "mcc"} <= set(test)
    for key in ("loss", "macro_f1", "mcc"):
        assert test[key]["score"] == evaluated["classifier-one"][key]
        assert test[key]["baseline"] == evaluated["classifier-two"][key]
    alone = [int((right[n] & ~right[1 - n]).sum()) for n in range(2)]
    assert test["accuracy"]["right_alone"] == alone[0] > 0
    tail = sum(math.comb(sum(alone), n) for n in range(max(alone), sum(alone) + 1))
    assert test["accuracy"]["mcnemar_p_value"] == min(1, 2 * tail / 2 ** sum(alone))
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "against.accuracy.p value" in text
    assert "against.accuracy.difference interval" in text
    numbers = evaluate(world.runs["number-one"], against=world.runs["number-two"])["against"]
    assert {"loss", "pearson", "spearman"} <= set(numbers)
    assert 0 < numbers["pearson"]["p_value"] <= 1


def test_tasks_are_compared_each_by_itself_and_in_the_mean(world, evaluated):
    one, two = world.runs["multi-one"], world.runs["multi-two"]
    test = evaluate(one, against=two, out=world.root / "multi")["against"]
    assert set(test["tasks"]) == set(HEADS)
    held = {
        name: [[line for line in read(run) if line["task"] == name] for run in (one, two)]
        for name in test["tasks"]
    }
    # Task after task from one generator.
    generator, scores = np.random.default_rng(12345), []
    for name, (own, other) in held.items():
        units = [[n] for n in range(len(own))]
        if name == "rank":
            queries = sorted({line["query"] for line in own})
            units = [[n for n, x in enumerate(own) if x["query"] == query] for query in queries]
            assert len(units) == 7 < len(own)
            assert all(x["prediction"] == HEADS[name]["labels"][x["score"] > 0] for x in own)
        draws = generator.choice(len(units), size=(R, len(units)), replace=True)
        chosen = [[n for unit in draw for n in units[unit]] for draw in draws]
        sides = []
        for lines in (own, other):
            gold, said = (np.array([x[key] for x in lines]) for key in ("gold", "prediction"))
            if name == "close":
                both = np.stack([gold, said])
                sides.append([pearson_of(both), *(pearson_of(both[:, c]) for c in chosen)])
            else:
                right = gold == said
                sides.append([right.mean(), *(right[c].mean() for c in chosen)])
        scores.append(sides)
        drawn = np.array(sides).T
        key = "pearson" if name == "close" else "accuracy"
        expected = expected_test(*drawn[0], drawn[1:])
        assert subset(test["tasks"][name][key], expected) == expected
        assert test["tasks"][name]["unit"] == ("query" if name == "rank" else "text")
    for key in ("score", "loss"):
        assert test[key]["score"] == pytest.approx(evaluated["multi-one"][key])
        assert test[key]["baseline"] == pytest.approx(evaluated["multi-two"][key])
        apart = [one[key]["difference"] for one in test["tasks"].values()]
        assert test[key]["difference"] == pytest.approx(np.mean(apart))
    # On some of the tasks alone: those that both have, and no mean.
    some = world.several | {"tasks": {"close": world.several["tasks"]["close"]}}
    section = load_recipe(str(one / "recipe.yaml")).evaluate
    section = section.model_validate(section.model_dump() | {"corpus": some})
    fewer = evaluate(one, section, against=two, out=world.root / "some")["against"]
    assert set(fewer) == {"run", "tasks"}
    close = fewer["tasks"]["close"]
    assert close["pearson"]["difference"] == test["tasks"]["close"]["pearson"]["difference"]
    evaluate(two, section, out=world.root / "other")
    section = section.model_copy(update={"corpus": None})
    corpus = {"tasks": {"rank": world.several["tasks"]["rank"]}, "label": "label", "empty": "keep"}
    section = section.model_validate(section.model_dump() | {"corpus": corpus})
    with pytest.raises(IdentityError, match=r"on the tasks \['close'\], .* on \['rank'\]: evaluat"):
        evaluate(one, section, against=world.root / "other")


def pearson_of(both):
    return 0.0 if np.ptp(both, 1).min() == 0 else np.corrcoef(*both)[0, 1]


def test_language_models_are_compared_text_by_text(world, evaluated, tmp_path):
    for kind in ("causal", "masked"):
        one, two = world.runs[f"{kind}-one"], world.runs[f"{kind}-two"]
        own, other = read(one), read(two)
        nats, counts = (
            [np.array([x[k] for x in side]) for side in (own, other)]
            for k in ("nats", "num_tokens")
        )
        assert evaluated[f"{kind}-one"]["loss_nats"] == nats[0].sum() / counts[0].sum()
        test = evaluate(one, against=two, out=tmp_path / kind)["against"]
        draws = np.random.default_rng(12345).choice(60, size=(R, 60), replace=True)
        drawn = np.stack(
            [n[draws].sum(1) / c[draws].sum(1) for n, c in zip(nats, counts, strict=True)], 1
        )
        whole = [n.sum() / c.sum() for n, c in zip(nats, counts, strict=True)]
        expected = expected_test(*whole, drawn)
        assert subset(test["loss_nats"], expected) == expected
        assert {"perplexity", "accuracy"} <= set(test)
    assert test["accuracy"].keys() == test["loss_nats"].keys()  # McNemar's is of single samples
    # With other tokens the words are what both have; without them there is nothing.
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in (RESULT, PREDICTIONS):
        (parts / name).write_text((world.runs["causal-two"] / name).read_text())
    lines = [line | {"num_tokens": line["num_tokens"] + 1} for line in read(parts)]
    write_lines(parts, lines)
    test = evaluate(world.runs["causal-one"], against=parts, out=tmp_path / "out")["against"]
    assert {key for key, one in test.items() if isinstance(one, dict)} == {"word_perplexity"}
    found = test["word_perplexity"]
    assert found["baseline"] == evaluated["causal-two"]["word_perplexity"]
    for line in lines:
        del line["num_words"]
    write_lines(parts, lines)
    with pytest.raises(IdentityError, match=r"on other tokens of the same texts: .* tokenizer$"):
        evaluate(world.runs["causal-one"], against=parts)
    for name in (RESULT, PREDICTIONS):
        (parts / name).write_text((world.runs["masked-two"] / name).read_text())
    result = json.loads((parts / RESULT).read_text())
    result["masks"]["probability"] = 0.5
    (parts / RESULT).write_text(json.dumps(result))
    with pytest.raises(IdentityError, match=r"one tokenizer and one scheme of masks"):
        evaluate(world.runs["masked-one"], against=parts)


def write_lines(path, lines):
    (path / PREDICTIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def rewritten(path, to, change):
    """An evaluation with another result."""
    to.mkdir()
    (to / PREDICTIONS).write_text((path / PREDICTIONS).read_text())
    result = json.loads((path / RESULT).read_text())
    change(result)
    (to / RESULT).write_text(json.dumps(result))
    return to


def test_what_cannot_be_compared_is_refused_before_it_is_scored(
    world, evaluated, tmp_path, monkeypatch
):
    one, two = world.runs["classifier-one"], world.runs["classifier-two"]
    monkeypatch.setattr("kdcache.train.evaluation.labelled.predict", None)  # would fail
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"not evaluated yet; run `kdcache evaluate .*` first"):
        evaluate(one, against=tmp_path / "empty")
    for name, what in {"number-one": "has numbers, ", "multi-one": "labels of several ta"}.items():
        with pytest.raises(IdentityError, match=what):
            evaluate(one, against=world.runs[name])
    with pytest.raises(IdentityError, match=r"for labels of one task, .* for the tokens of a caus"):
        evaluate(world.runs["causal-one"], against=one)

    def reorder(result):
        result["labels"].reverse()

    def shorten(result):
        result["references_digest"] = "0" * 32

    labels = rewritten(two, tmp_path / "labels", reorder)
    with pytest.raises(IdentityError, match=r"labels \['yes', 'maybe', 'no'\], .* the same order"):
        evaluate(one, against=labels)
    texts = rewritten(two, tmp_path / "texts", shorten)
    with pytest.raises(IdentityError, match=r"other texts or labels .*48 texts, digest 00000000"):
        evaluate(one, against=texts)
    old = rewritten(two, tmp_path / "old", lambda result: None)
    lines = (old / PREDICTIONS).read_text().split("\n")[:-1]
    for damaged, what in {
        "".join(line + "\n" for line in lines[1:]): "has 47 lines, its evaluation 48: evaluate",
        "".join(line + "\n" for line in [*lines[1:], "{"]): "line 48 is damaged; evaluate",
        "".join(line + "\n" for line in [*lines[1:], lines[0]]): "was scored on 48 of the texts",
        "".join(line + "\n" for line in [*lines[1:], "{}"]): "a line lacks, .* 'row'; evaluate",
    }.items():
        (old / PREDICTIONS).write_text(damaged)
        with pytest.raises(IdentityError, match=what):
            evaluate(one, against=old)
    (old / PREDICTIONS).unlink()
    with pytest.raises(ModelError, match=r"no such file, and a comparison needs it; run"):
        evaluate(one, against=old)
    assert not (one / RESULT).read_text().count("against")
