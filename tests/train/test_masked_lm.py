"""Masked LMs as students: from tokens alone and from a teacher's labels, to a teacher again."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertTokenizerFast

from kdcache.dump.runner import dump
from kdcache.errors import IdentityError, ModelError, RecipeError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.labels.decoding import decode
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import EvaluateSection, MasksSignal, load_recipe, parse_recipe
from kdcache.text.masking import scheme_of
from kdcache.train.evaluation.baseline import read_evaluation
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.evaluation.masked import masks_of
from kdcache.train.families.masked_lm import masked_texts, scheme_of_record, score_masked
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from tests.train.conftest import make_lines

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
HARD = {"loss": "cross_entropy", "masks": "masks"}
SOFT = {"loss": "forward_kl", "signal": "logits", "weight": 0.7, "temperature": 2.0}


def save_tokenizer(directory, lines):
    """Words, some of them in two pieces; returns its size."""
    words = sorted({word for line in lines for word in line.split()})
    pieces = sorted(
        {piece for word in words for piece in (word[:3], "##" + word[3:]) if piece != "##"}
    )
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join([*SPECIAL, *pieces]) + "\n")
    BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    return len(SPECIAL) + len(pieces)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache of two maskings of each text, and what a tiny random BERT says of them."""
    root = tmp_path_factory.mktemp("masked")
    lines = make_lines(60)[0]
    (root / "text").write_text("".join(line + "\n" for line in lines[:50]))
    (root / "dev").write_text("".join(line + "\n" for line in lines[50:]))
    size = save_tokenizer(root / "teacher", lines)
    torch.manual_seed(3)
    model = BertForMaskedLM(BertConfig(**BERT | {"vocab_size": size + 3}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(root / "teacher")
    full = {"name": "full", "values": "float32"}
    tree = {
        "name": "test",
        "corpus": {"fields": {"text": str(root / "text")}},
        "dump": {
            "teacher": {"path": str(root / "teacher"), "device": "cpu"},
            "streams": {"text": {"field": "text"}, "other": {"field": "text"}},
            "shard_tokens": 300,
            "signals": {
                "masks": {"kind": "masks", "probability": 0.3, "replicas": 2},
                "logits": {"at": "masked", "stream": "text", "masks": "masks", "codec": full},
                "others": {"kind": "masks", "stream": "other", "scheme": "span"},
                "again": {"kind": "masks", "scheme": "whole_word"},
            },
        },
    }
    dump(parse_recipe(tree), root / "cache")
    return SimpleNamespace(root=root, cache=root / "cache", size=size, tree=tree, lines=lines)


def make_recipe(world, *objective, student=None, **train_keys):
    section = {
        "student": {"kind": "masked_lm", "config": BERT, "init": "transformers"} | (student or {}),
        "source": "text",
        "target": "text",
        "objective": list(objective) or [HARD],
        "device": "cpu",
        "max_steps": 6,
        "batch_tokens": 200,
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "checkpoints": {"every_steps": 3, "average_last": 2},
        "validation": {"corpus": {"fields": {"text": str(world.root / "dev")}}, "every_steps": 3},
    }
    return parse_recipe({"name": "test", "train": section | train_keys})


def make_trainer(world, *objective, **keys):
    return Trainer(make_recipe(world, *objective, **keys).train, open_cache(world.cache))


def one_at_a_time(model, micro):
    """Logits and labels of masked tokens, of each masking of each text by itself."""
    tokens, masked = micro.streams["text"], micro.signals["masks"]
    logits, labels, begin = [], [], 0
    for sample in range(len(tokens.ids)):
        length = int(tokens.mask[sample].sum())
        for count in masked.counts[sample].tolist():
            ids = tokens.ids[sample, :length].clone()
            at = masked.positions[begin : begin + count]
            labels.append(ids[at].clone())
            ids[at] = masked.ids[begin : begin + count]
            logits.append(model(input_ids=ids[None]).logits[0, at])
            begin += count
    return torch.cat(logits), torch.cat(labels)


def test_a_recipe_says_whether_all_maskings_are_read_at_once(world):
    for replicas, number in (("by_epoch", 1), ("all", 2)):
        batch = next(iter(make_trainer(world, replicas=replicas).stream))
        assert batch.micro[0].signals["masks"].counts.shape[1] == number


OTHERS = {
    "roberta": BERT,
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "electra": BERT | {"embedding_size": 8},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_fill_in_masks(world, family):
    config = OTHERS[family] | {"model_type": family, "max_position_embeddings": 16}
    made = make_trainer(world, student={"config": config})
    # RoBERTa's positions begin after that of its padding.
    assert made.max_positions == (15 if family == "roberta" else 16)
    batch = next(iter(made.stream))
    made.distillation.eval()
    found = made.backward(batch)
    logits, labels = one_at_a_time(made.model, batch.micro[0])
    assert found[0].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert sum(one.grad is not None for one in made.parameters) >= len(made.parameters) - 2


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_losses_are_those_of_masked_tokens_one_text_at_a_time(world, tied):
    config = BERT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    soft = {"loss": "reverse_kl", "signal": "logits", "weight": 0.2}
    student = {"config": config | {"tie_word_embeddings": tied}}
    made = make_trainer(world, HARD | {"label_smoothing": 0.1}, SOFT, soft, student=student)
    batch = next(iter(made.stream))
    (micro,) = batch.micro
    total, values = made.distillation(micro, batch.counts, made.objective.at(1, 10))
    gradients = torch.autograd.grad(total, made.parameters, allow_unused=True)

    logits, labels = one_at_a_time(made.model, micro)
    assert len(labels) == batch.counts["masks.masked"] == batch.counts["logits"] > 20
    teacher = decode(micro.signals["logits"])
    dense = torch.zeros(len(labels), world.size + 3)
    dense[teacher.rows, teacher.ids] = teacher.values
    log_q = dense[:, : logits.shape[1]].log()
    warm = [(one / 2).log_softmax(1) for one in (logits, log_q)]
    cold = [one.log_softmax(1) for one in (logits, log_q)]
    expected = torch.stack(
        [
            F.cross_entropy(logits, labels, label_smoothing=0.1),
            F.kl_div(*warm, reduction="batchmean", log_target=True),
            F.kl_div(*reversed(cold), reduction="batchmean", log_target=True),
        ]
    )
    torch.testing.assert_close(values, expected.detach(), rtol=1e-4, atol=1e-5)
    whole = expected[0] + 0.7 * 4 * expected[1] + 0.2 * expected[2]
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-5)
    others = torch.autograd.grad(whole, made.parameters, allow_unused=True)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_micro_batches_add_up(world):
    found = []
    for parts in (1, 3):
        made = make_trainer(world, HARD, SOFT, accumulate=parts)
        made.distillation.eval()
        batch = next(iter(made.stream))
        assert len(batch.micro) == parts
        found.append([made.backward(batch), *(one.grad for one in made.parameters)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_labels_of_other_tokens_are_noticed(world):
    made = make_trainer(world, SOFT)
    (micro,) = next(iter(made.stream)).micro
    made.family.check_labels(micro, made.objective)
    tokens = micro.streams["text"]
    moved = replace(tokens, ids=tokens.ids.roll(1, 1))
    with pytest.raises(TrainingError, match="signal 'logits': labels are shifted"):
        made.family.check_labels(replace(micro, streams={"text": moved}), made.objective)


def test_a_bert_of_ones_own_is_trained_written_and_is_a_teacher(world, tmp_path):
    recipe = make_recipe(world, max_steps=30)
    summary = train(recipe, world.cache, tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in metrics]
    losses = [line["dev_loss"] for line in lines if "dev_loss" in line]
    assert summary["dev_loss"] == losses[-1] < losses[0] - 0.3
    assert summary["best_dev_loss"] == min(losses)
    assert 0 < summary["dev_accuracy"] <= 1
    assert "dev_loss_shuffled" not in summary
    best = tmp_path / "run" / "best"
    # Nothing says how the run's texts were masked, so 15% of BERT's are.
    corpus = {"fields": {"text": str(world.root / "dev")}}
    found = evaluate(tmp_path / "run", EvaluateSection(corpus=corpus, device="cpu"))
    model, texts = AutoModelForMaskedLM.from_pretrained(best), world.lines[50:]
    masked = masked_texts(load_tokenizer(best), texts, scheme_of(MasksSignal(kind="masks")), 32)
    alone = score_masked(model, masked, torch.device("cpu"), 64)
    assert found["loss_nats"] == pytest.approx(alone.loss_nats, rel=1e-5)
    assert found["num_tokens"] == alone.num_tokens == sum(map(len, masked.ids))
    assert found["masks"]["probability"] == 0.15
    assert read_evaluation(tmp_path / "run") == found
    tree = {
        **world.tree,
        "dump": world.tree["dump"] | {"teacher": {"path": str(best), "device": "cpu"}},
    }
    dump(parse_recipe(tree), tmp_path / "cache")
    record = open_cache(tmp_path / "cache").signal("logits")
    assert record.teacher.kind == "masked_lm"
    # And from that cache a student that has no gold at all, from the weights before.
    student = {"config": None, "path": str(best)}
    soft = make_recipe(world, {"loss": "forward_kl", "signal": "logits"}, student=student)
    summary = train(soft, tmp_path / "cache", tmp_path / "second")
    assert summary["steps"] == 6
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "second" / "averaged")


def test_development_texts_are_masked_once_and_scored_by_the_token(world):
    made = make_trainer(world)
    again = make_trainer(world)
    for one, other in zip(vars(made.dev).values(), vars(again.dev).values(), strict=True):
        assert len(one) == 10
        assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))
    losses, hits = [], []
    for tokens, positions, ids in zip(
        made.dev.tokens, made.dev.positions, made.dev.ids, strict=True
    ):
        budget = round(0.3 * (len(tokens) - 2))  # [CLS] and [SEP] do not count
        assert len(positions) == len(ids) == budget
        read = torch.from_numpy(tokens)[None].clone()
        read[0, positions] = torch.from_numpy(ids)
        with torch.no_grad():
            logits = made.model.eval()(input_ids=read).logits[0, positions]
        labels = torch.from_numpy(tokens[positions])
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        hits.append(logits.argmax(1) == labels)
    made.model.train()
    found = made.validate()
    assert found["dev_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found["dev_accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())
    assert made.model.training
    alone = score_masked(made.model, made.dev, torch.device("cpu"), 1)
    assert alone.loss_nats == pytest.approx(found["dev_loss"], rel=1e-5)
    record = open_cache(world.cache).signal("others")
    scheme = scheme_of_record(record)
    assert (scheme.name, scheme.span_max, scheme.probability) == ("span", 10, 0.15)
    tokenizer = load_tokenizer(world.root / "teacher")
    limited = masked_texts(tokenizer, world.lines, scheme, 8, limit_tokens=20)
    assert 0 < sum(map(len, limited.tokens)) <= 20
    assert max(map(len, limited.tokens)) <= 8


REFUSED = [
    ([{"loss": "cross_entropy"}], {}, RecipeError, r"0\.masks: is null; .* has \['again', 'masks'"),
    ([HARD | {"masks": "no"}], {}, RecipeError, "'no' is no masks signal of the cache.*dump no:"),
    ([HARD | {"masks": "others"}], {}, IdentityError, "'others' masks stream 'other', the student"),
    ([SOFT | {"signal": "masks"}], {}, RecipeError, r"'masks' is no logits .* has \['logits'\]"),
    ([HARD | {"masks": "again"}, SOFT], {}, RecipeError, "is of masks 'masks', .* of 'again'; a m"),
    ([{"loss": "hidden_mse", "signal": "x"}], {}, RecipeError, "hidden_mse is no term of a masked"),
    ([SOFT | {"sample_weight": {"by": "teacher_loss"}}], {}, RecipeError, "terms have none"),
    ([HARD], {"target": "other"}, RecipeError, "give both the same stream"),
    ([HARD], {"gate": {"terms": [0]}}, RecipeError, "train.gate: goes with a student of kind"),
    ([HARD], {"student": {"kind": "encoder_decoder"}}, RecipeError, "goes with a student of kind"),
    ([HARD], {"student": {"config": {"model_type": "t5"}}}, ModelError, "'t5' is not a masked LM"),
]


@pytest.mark.parametrize(("objective", "keys", "error", "message"), REFUSED)
def test_what_a_masked_lm_cannot_have_is_refused_in_a_line(world, objective, keys, error, message):
    with pytest.raises(error, match=message) as found:
        make_trainer(world, *objective, **keys)
    assert "\n" not in str(found.value)


def test_an_encoder_decoder_is_not_built_of_a_masked_lm(world):
    plain = {"kind": "encoder_decoder"}
    with pytest.raises(ModelError, match="'bert' is not an encoder-decoder"):
        make_trainer(world, {"loss": "cross_entropy"}, student=plain)


@pytest.mark.parametrize("name", ["masked-lm", "masked-lm-span"])
def test_a_bert_comes_of_text_alone(world, tmp_path, name):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    overrides = [(f"train.student.config.{key}", str(value)) for key, value in sizes.items()]
    overrides += [
        ("corpus.fields.text", str(world.root / "text")),
        ("dump.tokenizers.pieces.vocab_size", "36"),
        ("train.student.config.num_attention_heads", "2"),
        ("train.max_steps", "2"),
        ("train.device", "cpu"),
    ]
    recipe = load_recipe(name, overrides)
    dump(recipe, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    tokenizer, record = cache.tokenizer("pieces"), cache.signal("masks")
    assert cache.tokens("pieces")[:5] == ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    assert (tokenizer.mask_id, record.mask_id, record.replicas) == (4, 4, 4)
    assert masks_of(recipe).scheme == record.scheme == ("span" if "span" in name else "bert")
    train(recipe, tmp_path / "cache", tmp_path / "run")
    section = EvaluateSection(corpus={"fields": {"text": str(world.root / "dev")}}, device="cpu")
    assert evaluate(tmp_path / "run", section)["masks"]["scheme"] == record.scheme
    backend = load_tokenizer(tmp_path / "run" / "best")
    assert backend.mask_token_id == 4
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "best")
    assert (model.config.vocab_size, model.config.pad_token_id) == (36, 0)
    # It is the teacher of an encoder's tokens, as the mask task wants it.
    labels = {"at": "masked", "stream": "text", "masks": "masks"}
    more = [
        ("dump.teacher", f"{{path: {tmp_path / 'run' / 'best'}, device: cpu}}"),
        ("dump.tokenizers.pieces", "{kind: pretrained}"),
        ("dump.signals.logits", json.dumps(labels)),
    ]
    dump(load_recipe(name, [overrides[3], *more]), tmp_path / "labels")
    again = open_cache(tmp_path / "labels")
    assert again.tokenizer("pieces").digest == tokenizer.digest
    assert again.signal("logits").vocab_size == 36
