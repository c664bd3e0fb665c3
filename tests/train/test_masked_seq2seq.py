"""MASS: an encoder-decoder that learns masked segments, alone and from a teacher."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kdcache.cli import main
from kdcache.dump.runner import dump
from kdcache.errors import RecipeError
from kdcache.formats.cache import open_cache
from kdcache.labels.decoding import decode
from kdcache.recipe import parse_recipe
from kdcache.train.families.masked_lm import score_masked
from kdcache.train.runs.trainer import Trainer
from kdcache.train.students.student import decoder_start
from tests.dump.zoo import make
from tests.train.conftest import STUDENT, make_lines

T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BART = {"model_type": "bart", "max_position_embeddings": 64, "dropout": 0.0}
BART |= {key: STUDENT[key] for key in STUDENT if key.startswith(("d_", "encoder_", "decoder_"))}
MARIAN = STUDENT | {"dropout": 0.0}
HARD = {"loss": "cross_entropy", "masks": "masks"}
SOFT = {"loss": "forward_kl", "signal": "logits", "weight": 0.7, "temperature": 2.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache of two masked segments of each text, and what a tiny BART says of them."""
    root = tmp_path_factory.mktemp("segments")
    lines = make_lines(40)[0]
    (root / "text").write_text("".join(line + "\n" for line in lines))
    make("bart", "lm", root / "teacher", lines)
    full = {"name": "full", "values": "float32"}
    labels = {"stream": "text", "masks": "masks", "codec": full}
    tree = {
        "name": "test",
        "corpus": {"fields": {"text": str(root / "text")}},
        "dump": {
            "teacher": {"path": str(root / "teacher"), "device": "cpu"},
            "streams": {"text": {"field": "text"}},
            "shard_tokens": 300,
            "signals": {
                "masks": {"kind": "masks", "scheme": "segment", "replicas": 2},
                "logits": {"at": "segment_in_place", **labels},
                "packed": {"at": "segment", **labels},
            },
        },
    }
    dump(parse_recipe(tree), root / "cache")
    return SimpleNamespace(root=root, cache=root / "cache")


def make_trainer(world, *objective, config=MARIAN, **keys):
    section = {
        "student": {"kind": "masked_seq2seq", "config": config},
        "source": "text",
        "target": "text",
        "objective": list(objective) or [HARD],
        "device": "cpu",
        "batch_tokens": 150,
        "validation": {"corpus": {"fields": {"text": str(world.root / "text")}, "limit": 10}},
    }
    recipe = parse_recipe({"name": "test", "train": section | keys})
    return Trainer(recipe.train, open_cache(world.cache))


def written(model, truth, read, positions):
    """[N, V] logits of a segment, one token and one text at a time.

    The decoder reads the text as it is but for the segment, which starts with the start token and
    is all that it may look at.
    """
    found = []
    segment = [decoder_start(model), *truth[positions].tolist()]
    for number, position in enumerate(positions.tolist()):
        ids = truth[: position + 1].clone()
        for place, token in zip(positions.tolist()[: number + 1], segment, strict=False):
            ids[place] = token
        seen = torch.tensor([int(n in positions) for n in range(position + 1)])
        out = model(
            input_ids=read[None],
            decoder_input_ids=ids[None],
            decoder_attention_mask=seen[None],
        )
        found.append(out.logits[0, -1])
    return torch.stack(found)


def one_at_a_time(model, micro):
    """Logits and labels of the segments of a batch, text after text, masking after masking."""
    tokens, masked = micro.streams["text"], micro.signals["masks"]
    logits, labels, done = [], [], 0
    for sample, counts in enumerate(masked.counts.tolist()):
        truth = tokens.ids[sample][tokens.mask[sample]]
        for count in counts:
            positions, read = masked.positions[done : done + count], truth.clone()
            assert positions.diff().eq(1).all()
            read[positions] = masked.ids[done : done + count]
            logits.append(written(model, truth, read, positions))
            labels.append(truth[positions])
            done += count
    return torch.cat(logits), torch.cat(labels)


@pytest.mark.parametrize("config", [MARIAN, BART, T5], ids=["marian", "bart", "t5"])
def test_losses_are_those_of_segments_one_token_at_a_time(world, config):
    made = make_trainer(world, HARD, SOFT, config=config)
    made.distillation.eval()
    batch = next(iter(made.stream))
    (micro,) = batch.micro
    total, values = made.distillation(micro, batch.counts, made.objective.at(1, 10))
    logits, labels = one_at_a_time(made.model, micro)
    assert len(labels) == batch.counts["masks.masked"] == batch.counts["logits"] > 20
    teacher = decode(micro.signals["logits"])
    dense = torch.zeros(len(labels), made.distillation.vocab_size)
    dense[teacher.rows, teacher.ids] = teacher.values
    warm = [(one / 2).log_softmax(1) for one in (logits, dense.log())]
    hard = F.cross_entropy(logits, labels)
    soft = F.kl_div(*warm, reduction="batchmean", log_target=True)
    torch.testing.assert_close(values, torch.stack([hard, soft]).detach(), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(total, made.parameters, allow_unused=True)
    # Hinton's factor of the temperature squared.
    expected = torch.autograd.grad(hard + 0.7 * 4 * soft, made.parameters, allow_unused=True)
    for one, other in zip(gradients, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5)


def test_a_segment_is_half_of_a_text(world):
    made = make_trainer(world)
    batch = next(iter(made.stream))
    (micro,) = batch.micro
    masked = micro.signals["masks"]
    assert made.objective.count(0, batch.counts) == len(masked.positions)
    for length, counts in zip(micro.streams["text"].mask.sum(1), masked.counts, strict=True):
        assert set(counts.tolist()) == {round((int(length) - 2) / 2)}  # begin and end stay


def test_development_texts_are_scored_by_the_token(world):
    made = make_trainer(world)
    made.model.eval()
    found = made.validate()
    nats, hits, count = 0.0, 0, 0
    with torch.no_grad():
        for truth, positions, ids in zip(
            made.dev.tokens, made.dev.positions, made.dev.ids, strict=True
        ):
            truth, positions = torch.from_numpy(truth), torch.from_numpy(positions)
            read = truth.clone()
            read[positions] = torch.from_numpy(ids)
            logits = written(made.model, truth, read, positions)
            nats += F.cross_entropy(logits, truth[positions], reduction="sum").item()
            hits += int((logits.argmax(1) == truth[positions]).sum())
            count += len(positions)
    assert found["dev_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["dev_accuracy"] == pytest.approx(hits / count)
    alone = score_masked(made.model, made.dev, torch.device("cpu"), 1)
    assert alone.loss_nats == pytest.approx(found["dev_loss"], rel=1e-5)


REFUSED = [
    ([SOFT | {"signal": "packed"}], {}, r"at masked segments in their places, .* has \['logits'\]"),
    ([{"loss": "cross_entropy"}], {}, "a masked_seq2seq predicts the tokens of a masks signal"),
    ([{"loss": "score_mse", "signal": "x"}], {}, "score_mse is no term of a masked_seq2seq"),
    ([HARD], {"target": "src"}, "a masked_seq2seq predicts segments of what it reads"),
    ([HARD], {"gate": {"terms": [0]}}, "train.gate: goes with a student of kind encoder_decoder"),
]


@pytest.mark.parametrize(("objective", "keys", "message"), REFUSED)
def test_what_a_masked_seq2seq_cannot_have_is_refused(world, objective, keys, message):
    with pytest.raises(RecipeError, match=message):
        make_trainer(world, *objective, **keys)


def test_from_text_alone_to_a_translator_by_two_teachers(tmp_path, capsys):
    src, tgt = make_lines(60)
    for name, lines in (("src", src), ("tgt", tgt), ("text", [*src, *tgt])):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    text = ["--corpus.fields.text", str(tmp_path / "text")]
    fields = [w for s in ("src", "tgt") for w in (f"--corpus.fields.{s}", str(tmp_path / s))]
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tiny = [w for k, v in sizes.items() for w in (f"--train.student.config.{k}", str(v))]
    tiny += ["--train.max_steps", "3", "--train.device", "cpu", "--train.batch_tokens", "300"]
    dev = [f"--stages.pretraining.evaluate.corpus.fields.text={tmp_path / 'tgt'}"]
    dev += [
        f"--stages.finetuning.evaluate.corpus.fields.{s}={tmp_path / s}" for s in ("src", "tgt")
    ]
    dev += ["--evaluate.num_beams", "1", "--evaluate.latency_sentences", "1"]

    def run(*words):
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    # A teacher of one's own: text, its segments, a tokenizer with a mask token.
    pieces = "{kind: sentencepiece, vocab_size: 39, fields: [text], mask: true}"
    alone = ["--dump.tokenizers.teacher", pieces]
    alone += ["--dump.signals", "{masks: {kind: masks, stream: text, scheme: segment}}"]
    run("dump", "lightpaff-mass:pretraining", "--out", tmp_path / "alone", *text, *alone)
    only = ["--train.objective", "[{loss: cross_entropy, masks: masks}]", *tiny]
    # A teacher that only repeats what it reads would look as if its labels were shifted.
    only += ["--train.max_steps", "60", "--train.optimizer.lr", "0.02"]
    only += ["--train.schedule.warmup_steps", "5"]
    run(
        *("train", "lightpaff-mass:pretraining", "--cache", tmp_path / "alone"),
        *("--out", tmp_path / "mass", *only),
    )
    teacher = ["--dump.teacher.device", "cpu", "--dump.teacher.path", tmp_path / "mass" / "best"]
    run("dump", "lightpaff-mass:pretraining", "--out", tmp_path / "pre", *text, *teacher)
    run("dump", "lightpaff-mass:finetuning", "--out", tmp_path / "fine", *fields, *teacher)
    caches = [
        f"--cache={s}={tmp_path / c}" for s, c in (("pretraining", "pre"), ("finetuning", "fine"))
    ]
    found = run("train", "lightpaff-mass", *caches, "--out", tmp_path / "run", *tiny, *dev)
    assert {name: one["steps"] for name, one in found["stages"].items()} == {
        "pretraining": 3,
        "finetuning": 3,
    }
    (terms,) = {
        tuple(json.loads(line)["terms"])
        for line in (tmp_path / "run" / "pretraining" / "metrics.jsonl").read_text().splitlines()
    }
    assert terms == ("cross_entropy", "forward_kl")
    filled = run("evaluate", tmp_path / "run" / "pretraining")
    assert filled["masks"]["scheme"] == "segment"
    assert 0 <= filled["accuracy"] <= 1
    translated = run("evaluate", tmp_path / "run")
    assert translated["num_sentences"] == 60
    assert translated["bleu"]["score"] >= 0
