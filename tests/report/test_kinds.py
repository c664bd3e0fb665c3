"""Inspection of every kind of signal: its numbers and samples against what was put in."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.signals import ClassesRecord
from kdcache.report import commits
from kdcache.report.gold import Gold
from kdcache.report.inspect import inspect_cache
from kdcache.report.inspection_text import inspection_text
from kdcache.report.signal_text import signal_text
from kdcache.report.signals import probabilities
from tests.report.kinds import (
    DECODING,
    GOLD,
    LABELS,
    MASK_ID,
    SRC,
    TASK,
    TGT,
    TOKENS,
    Kinds,
    chained,
    hypotheses_of,
    make_kinds,
    predicted,
)

LOGITS = ["targets", "causal", "document", "mlm", "segment", "best", "every"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    return make_kinds(tmp_path_factory.mktemp("kinds") / "cache")


@pytest.fixture(scope="module")
def found(made: Kinds) -> dict[str, Any]:
    return inspect_cache(made.path, num_samples=len(SRC))


def names(ids: list[int]) -> list[str]:
    return [TOKENS[i] if i < len(TOKENS) else f"<{i}>" for i in ids]


def test_json_holds_everything(found: dict) -> None:
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["signals"].keys() == found["signals"].keys()
    assert len(again["samples"]) == len(SRC)


def test_sizes_are_those_of_the_files(made: Kinds, found: dict) -> None:
    for name, signal in found["signals"].items():
        files = [file for file in (made.path / name).rglob("*") if file.is_file()]
        num_bytes = sum(file.stat().st_size for file in files)
        assert signal["bytes"] == num_bytes == found["bytes"][name]
        tokens = len(chained(made.ids[signal["stream"]]))
        assert signal["bytes_per_stream_token"] == pytest.approx(num_bytes / tokens)
        assert signal["num_samples"] == len(SRC)


def test_streams_and_tasks(found: dict) -> None:
    corpus, streams = found["corpus"], found["streams"]
    assert corpus["task_shares"] == {"nli": 5 / 8, "sent": 3 / 8}
    spoken, heard = (len(chained([*text, "."] for text in side)) for side in (TGT, SRC))
    assert streams["chat"]["loss_share"] == pytest.approx(spoken / (spoken + heard))
    assert "loss_share" not in streams["src"]
    first = found["samples"][0]
    assert first["task"] == "nli"
    assert first["tokens"]["pair"] == ["a", "b", "</s>", "b", "a", "</s>"]
    assert first["extras"]["pair"] == {"segment": [0, 0, 0, 1, 1, 1]}
    assert first["extras"]["chat"] == {"loss": [0, 0, 0, 1, 1, 1]}
    assert found["samples"][5]["task"] == "sent"


@pytest.mark.parametrize("name", LOGITS)
def test_every_label_stands_by_the_token_it_predicts(name: str, made: Kinds, found: dict) -> None:
    lists = predicted(made, open_cache(made.path).logits(name))
    log_probs, at = made.log_probs[name], 0
    for ids, sample in zip(lists, found["samples"], strict=True):
        labels = sample["labels"][name]
        assert [label["target"] for label in labels] == names(ids)
        for label, gold in zip(labels, ids, strict=True):
            row = log_probs[at]
            # A uint8 code of the root of the log-prob: half a step is 0.01 of a root nat.
            root = math.sqrt(-math.log(label["target_probability"]))
            assert root == pytest.approx(math.sqrt(-row[gold]), abs=0.011)
            for token, weight in label["exact"]:
                number = names(list(range(len(row)))).index(token)
                assert math.sqrt(-math.log(weight)) == pytest.approx(
                    math.sqrt(-row[number]), abs=0.011
                )
            left = 1 - sum(np.exp(np.sort(row)[::-1][: label["num_exact"]]))
            assert label["tail_mass"] == pytest.approx(left, abs=2e-3)
            at += 1
    assert at == len(log_probs) == found["signals"][name]["num_tokens"]


@pytest.mark.parametrize("name", LOGITS)
def test_loss_and_entropy_are_the_teachers(name: str, made: Kinds, found: dict) -> None:
    log_probs, gold = made.log_probs[name], made.gold[name]
    signal = found["signals"][name]
    loss = -log_probs[np.arange(len(gold)), gold].mean()
    assert signal["teacher_loss_nats"] == pytest.approx(loss, rel=0.02)
    entropy = -(np.exp(log_probs) * log_probs).sum(1).mean()
    assert signal["entropy_nats"] == pytest.approx(entropy, rel=0.01)
    assert signal["measured_tokens"] == len(gold)


def test_labels_say_where_they_stand(found: dict) -> None:
    def places(name: str, sample: int, *keys: str) -> list[tuple[int, ...]]:
        labels = found["samples"][sample]["labels"][name]
        return [tuple(label[key] for key in keys) for label in labels]

    # "abcab" with an end has six tokens; replica 0 masks 0 and 2, replica 1 masks 1 and 3.
    assert places("mlm", 3, "replica", "position") == [(0, 0), (0, 2), (1, 1), (1, 3)]
    assert places("causal", 3, "position") == [(6,), (7,), (8,)]
    assert places("document", 3, "position") == [(1,), (2,)]
    # "bb" backwards with an end, and the same with a b more.
    both = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert places("every", 3, "hypothesis", "position") == both
    assert places("best", 3, "hypothesis", "position") == both[3:]
    assert places("targets", 3, "position") == [(0,), (1,), (2,)]
    assert "replica" not in found["samples"][3]["labels"]["targets"][0]
    signals = found["signals"]
    assert (signals["best"]["hypothesis"], signals["every"]["hypothesis"]) == (1, "all")
    assert (signals["best"]["hypotheses"], signals["mlm"]["masks"]) == ("beams", "masks")
    assert signals["targets"]["hypothesis"] is None


def test_hidden_states(made: Kinds, found: dict) -> None:
    signal, pooled = found["signals"]["hidden"], found["signals"]["pooled"]
    values, counts = made.dense["hidden"]
    assert (signal["side"], signal["layers"], signal["width"]) == ("encoder", [0, 1, 2], 3)
    assert (signal["pool"], signal["values"], signal["row_bytes"]) == ("none", "bfloat16", 18)
    assert signal["num_rows"] == len(values) == counts.sum()
    assert signal["bytes_per_row"] == pytest.approx(signal["bytes"] / len(values))
    per_layer = signal["bytes_per_stream_token"] / 3
    assert signal["bytes_per_token_and_layer"] == pytest.approx(per_layer)
    assert (pooled["pool"], pooled["num_replicas"], pooled["num_rows"]) == ("mean", 2, 16)
    assert pooled["row_bytes"] == 3 + 4  # int8, and a scale
    for name, tolerance in (("hidden", 0.01), ("pooled", 0.01)):
        values, counts = made.dense[name]
        ends = np.cumsum(counts)
        for sample, begin, end in zip(found["samples"], ends - counts, ends, strict=True):
            rms = np.sqrt((values[begin:end] ** 2).mean(axis=(0, 2)))
            labels = sample["labels"][name]
            assert labels["num_rows"] == end - begin
            assert labels["rms_of_layers"] == pytest.approx(rms.tolist(), rel=tolerance)


def test_attention_shows_what_every_token_attends_to(made: Kinds, found: dict) -> None:
    values, counts = made.dense["attention"]
    ends = np.cumsum(counts)
    for sample, begin, end in zip(found["samples"], ends - counts, ends, strict=True):
        tokens = sample["tokens"]["src"]
        labels = sample["labels"]["attention"]
        assert [label["query"] for label in labels] == tokens
        n = len(tokens)
        mean = values[begin:end].mean(axis=2).reshape(n, n, 2)  # heads averaged
        for query, label in enumerate(labels):
            for layer, (token, weight) in enumerate(label["most_attended"]):
                assert token == tokens[int(mean[query, :, layer].argmax())]
                assert weight == pytest.approx(mean[query, :, layer].max(), abs=1e-3)
    signal = found["signals"]["attention"]
    assert (signal["heads"], signal["averaged"], signal["layers"]) == (2, False, [1, 2])
    assert signal["num_rows"] == sum((len(text) + 1) ** 2 for text in SRC)


def test_beams(made: Kinds, found: dict) -> None:
    signal, hypotheses = found["signals"]["beams"], hypotheses_of(made)
    fields = made.columns["beams"]["hypotheses"].fields
    for key, rows in (("best", slice(0, None, 2)), ("all", slice(None))):
        lengths = [len(ids) for both in hypotheses for ids in both][rows]
        log_probs, scores = fields["log_prob"][rows], fields["score"][rows]
        means = signal[key]
        assert means["num_hypotheses"] == len(lengths)
        assert means["mean_length"] == pytest.approx(np.mean(lengths))
        assert means["mean_log_prob_nats"] == pytest.approx(log_probs.mean(), rel=1e-5)
        per_token = log_probs.sum() / np.sum(lengths)
        assert means["log_prob_per_token_nats"] == pytest.approx(per_token, rel=1e-5)
        assert means["mean_score"] == pytest.approx(scores.mean(), rel=1e-5)
    reference = sum(len(text) + 1 for text in TGT)
    best = sum(len(both[0]) for both in hypotheses)
    assert signal["best"]["length_ratio"] == pytest.approx(best / reference)
    assert signal["decoding"] == DECODING
    assert signal["hypotheses_per_sample"] == 2
    for number, (both, sample) in enumerate(zip(hypotheses, found["samples"], strict=True)):
        labels = sample["labels"]["beams"]
        assert [label["tokens"] for label in labels] == [names(ids) for ids in both]
        log_probs = fields["log_prob"][2 * number : 2 * number + 2].tolist()
        assert [label["log_prob_nats"] for label in labels] == log_probs


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@pytest.mark.parametrize(
    ("name", "tasks", "replicas"), [("nli", [0], 1), ("augmented", [0, 1], 2)], ids=["nli", "all"]
)
def test_classes(name: str, tasks: list[int], replicas: int, made: Kinds, found: dict) -> None:
    values = iter(made.columns[name]["scores"].fields["value"].tolist())
    probs, samples = [], []
    for number, task in enumerate(TASK):
        for _ in range(replicas if task in tasks else 0):
            probs.append(softmax([next(values) for _ in LABELS]))
            samples.append(number)
    signal = found["signals"][name]
    best = [LABELS[row.index(max(row))] for row in probs]
    assert signal["num_described"] == signal["num_measured"] == len(probs)
    shares = {label: best.count(label) / len(best) for label in LABELS}
    assert signal["predicted"] == pytest.approx(shares)
    entropy = -sum(p * math.log(p) for row in probs for p in row) / len(probs)
    assert signal["entropy_nats"] == pytest.approx(entropy, rel=1e-5)
    for row, number in zip(probs, samples, strict=True):
        shown = found["samples"][number]["labels"][name]
        assert len(shown) == replicas
        expected = {label: pytest.approx(p, rel=1e-5) for label, p in zip(LABELS, row, strict=True)}
        mine = next(scores for scores in shown if dict(scores) == expected)
        assert [p for _, p in mine] == sorted((p for _, p in mine), reverse=True)
    if name == "nli":
        gold = ["no", "maybe", "yes", "no", "yes"]  # "2" is the number of yes
        right = sum(a == b for a, b in zip(best, gold, strict=True))
        assert signal["gold_accuracy"] == pytest.approx(right / 5)
        assert 0 < right < 5
        assert all(not sample["labels"]["nli"] for sample in found["samples"][5:])
    else:
        assert signal["gold_accuracy"] is None  # some gold labels are scores


def test_scores_and_several_labels(made: Kinds, found: dict) -> None:
    score = made.columns["score"]["scores"].fields["value"].astype(float)
    signal = found["signals"]["score"]
    spread = {"mean": score.mean(), "std": score.std(), "min": score.min(), "max": score.max()}
    assert signal["scores"]["similarity"] == pytest.approx(spread)
    gold = [float(label) for label in GOLD[5:]]
    assert signal["gold_pearson"] == pytest.approx(np.corrcoef(score, gold)[0, 1])
    assert found["samples"][5]["labels"]["score"] == [[("similarity", score[0])]]
    topics = made.columns["topics"]["scores"].fields["value"].reshape(-1, 2).astype(float)
    shares = dict(zip(("sport", "art"), (topics > 0).mean(axis=0), strict=True))
    assert found["signals"]["topics"]["predicted"] == pytest.approx(shares)
    first = dict(found["samples"][0]["labels"]["topics"][0])
    assert first["sport"] == pytest.approx(1 / (1 + math.exp(-topics[0, 0])), rel=1e-6)
    assert found["signals"]["topics"]["gold_accuracy"] is None
    said = [1 / (1 + math.exp(-x)) for x in topics.ravel()]
    entropy = -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in said) / len(said)
    assert found["signals"]["topics"]["entropy_nats"] == pytest.approx(entropy, rel=1e-5)


def test_extreme_scores_are_probabilities(made: Kinds) -> None:
    cache = open_cache(made.path)
    scores = np.array([[1000.0, -1000.0, 999.0]])
    found = probabilities(cast(ClassesRecord, cache.signal("nli")), scores)
    assert found[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 0, 1 / (1 + math.e)])
    found = probabilities(cast(ClassesRecord, cache.signal("topics")), scores[:, :2])
    assert found[0].tolist() == [1, 0]


def test_gold_labels_count_for_every_masking(made: Kinds) -> None:
    gold = Gold(cast(ClassesRecord, open_cache(made.path).signal("augmented")))
    scores = np.eye(3)[[0, 1, 2, 2, 0, 1]]
    gold.add(["no", "", "yes"], np.array([2, 0, 2]), scores[:4])
    gold.add(["1"], np.array([2]), scores[4:])
    # no: 0 1, yes: 2 2, maybe: 0 1
    assert gold.summary() == {"gold_accuracy": pytest.approx(4 / 6)}
    gold.add(["3"], np.array([1]), scores[:1])
    assert gold.summary() == {"gold_accuracy": None}


def test_masks(found: dict) -> None:
    stands = {"mask": 0, "other": 0, "own": 0}
    for text, sample in zip(SRC, found["samples"], strict=True):
        replicas = sample["labels"]["masks"]
        assert len(replicas) == 2
        for replica, masked in enumerate(replicas):
            chosen = [t for t in range(len(text)) if t % 2 == replica][:2]
            assert [one["position"] for one in masked] == chosen
            assert [one["token"] for one in masked] == [text[t] for t in chosen]
            assert [one["shown"] for one in masked] == ["<mask>", "c"][: len(chosen)]
            for t, shown in zip(chosen, ("<mask>", "c"), strict=False):
                stands["mask" if shown == "<mask>" else "own" if text[t] == "c" else "other"] += 1
    signal, total = found["signals"]["masks"], sum(stands.values())
    assert min(stands.values()) > 0
    assert signal["num_masked"] == total
    assert signal["share_masked"] == pytest.approx(total / (2 * sum(len(s) + 1 for s in SRC)))
    shares = {key: count / total for key, count in stands.items()}
    assert signal["shares_of_masked"] == pytest.approx(shares)
    assert (signal["mask_id"], signal["teacher"]) == (MASK_ID, None)


def test_an_unbegun_signal_does_not_hide_the_samples(tmp_path: Path) -> None:
    skip = [(name, shard) for name in ("nli", "hidden") for shard in range(4)]
    made = make_kinds(tmp_path / "cache", skip_commits=[*skip, ("mlm", 0)])
    found = inspect_cache(made.path, num_samples=8)
    # Shard 0, which mlm lacks, has two samples.
    assert [sample["row"] for sample in found["samples"]] == [6, 9, 12, 15, 18, 21]
    assert not {"nli", "hidden"} & found["samples"][0]["labels"].keys()
    empty = found["signals"]["nli"]
    assert (empty["num_described"], empty["entropy_nats"], empty["gold_accuracy"]) == (
        0,
        None,
        None,
    )
    assert found["signals"]["hidden"]["bytes_per_row"] is None
    assert found["signals"]["mlm"]["num_shards_committed"] == 3
    text = inspection_text(found)
    assert "nli: classification of pair (task nli) (unfinished: 0 of 4 shards)" in text
    assert "mlm: logits of the masked tokens of src, masked by masks (unfinished: 3 of" in text
    assert json.dumps(found, allow_nan=False)


def test_a_big_cache_is_measured_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_kinds(tmp_path / "cache", shard_tokens=1)
    opened: list[tuple[str, int]] = []
    real = Cache.signal_shard

    def counted(self: Cache, name: str, shard: int) -> Any:
        opened.append((name, shard))
        return real(self, name, shard)

    monkeypatch.setattr(Cache, "signal_shard", counted)
    monkeypatch.setattr(Cache, "dense_shard", None)  # sizes need no data
    monkeypatch.setattr(commits, "MEASURED_SHARDS", 3)
    found = inspect_cache(made.path, num_samples=0)
    assert found["num_shards"] == len(SRC)
    for name in ("targets", "beams", "nli", "masks"):
        assert [shard for signal, shard in opened if signal == name] == [0, 3, 6]
    assert found["signals"]["targets"]["measured_tokens"] == sum(len(TGT[m]) + 1 for m in (0, 3, 6))
    best = found["signals"]["beams"]["best"]
    assert best["length_ratio"] == pytest.approx(1)
    assert best["num_hypotheses"] == 3
    assert found["signals"]["nli"]["num_measured"] == 2
    assert found["signals"]["nli"]["num_described"] == 5


def test_text_tells_every_kind(found: dict) -> None:
    text = inspection_text(found)
    for line in (
        "tasks      nli 62.5%, sent 37.5%",
        "fields     src, tgt, label (gold label: label)",
        "src, as a chat (46.4% the assistant's)",
        "src and tgt, as a pair",
        "targets: logits of tgt given src",
        "causal: logits of chat, every token from those before it",
        "mlm: logits of the masked tokens of src, masked by masks",
        "segment: logits of the masked segments of src, masked by masks",
        "best: logits of hypothesis 1 of beams given src",
        "every: logits of all hypotheses of beams given src",
        "hidden: hidden states of src, encoder",
        "layers   0-2 (0 is the embedding output)",
        "rows     16, one a sample, the mean over its tokens; 2 maskings of every sample",
        "attention: self-attention over src, encoder",
        "values   2 heads of every layer, float16",
        "beams: hypotheses in tgt given src",
        "decoding    mode beam, num beams 4",
        "(1.000 times tgt)",
        "score: regression of pair (task sent)",
        "topics: multi-label classification of pair",
        "masks: masks over src, scheme bert",
        "in their place  the mask token",
        "  chat   a b </s> [b a </s>]",
        "  pair   a b </s> | b a </s>",
        "    {a -> <mask>} b </s>",
        "    a {b -> <mask>} </s>",
    ):
        assert line in text, line
    assert "None" not in text
    assert "nan" not in text


def test_text_tells_teachers_and_codecs_apart(found: dict) -> None:
    signal = found["signals"]["targets"]
    member = signal["teacher"]
    ensemble = member | {"path": "a + b", "average": "parameters", "members": [member] * 2}
    codec = signal["codec"] | {"temperatures": [1.0, 2.0]}
    text = signal_text("x", signal | {"teacher": ensemble, "codec": codec}, 4)
    assert "a + b (mean parameters of 2, marian, float32, digest cdcdcdcdcdcdcdcd)" in text
    assert "c 0.125), drawn for temperatures 1, 2, tail at temperatures 0.5, 1, 2" in text
    hub = member | {"revision": "0123456789abcdef"}
    sampled = {"name": "sampled", "values": "uint8", "n": 20}
    text = signal_text("x", signal | {"teacher": hub, "codec": sampled}, 4)
    assert "(marian, float32, revision 0123456789ab, digest" in text
    assert "sampled (values uint8, n 20)\n" in text
    attention = found["signals"]["attention"] | {"averaged": True, "heads": 1}
    assert "the mean of all heads of every layer" in signal_text("x", attention, 4)


def test_inspection_runs_without_torch(made: Kinds) -> None:
    program = (
        "import sys; from kdcache.report.inspect import inspect_cache; "
        "from kdcache.report.inspection_text import inspection_text; "
        f"inspection_text(inspect_cache({str(made.path)!r})); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
