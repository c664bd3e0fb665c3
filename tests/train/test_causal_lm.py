"""Causal LMs as students: from text alone and from a teacher's labels, to a teacher again."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from kdcache.dump.runner import dump
from kdcache.errors import CorpusError, IdentityError, ModelError, RecipeError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.labels.decoding import decode
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import EvaluateSection, load_recipe, parse_recipe
from kdcache.train.evaluation.baseline import read_evaluation
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.families.causal_lm import score_causal
from kdcache.train.losses.causal_objective import CausalObjective
from kdcache.train.runs.loop import train
from kdcache.train.runs.parallel import Ranks
from kdcache.train.runs.trainer import Trainer
from tests.dump.zoo import SIZES, make
from tests.train import many_ranks
from tests.train.conftest import make_lines

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
HARD = {"loss": "cross_entropy"}
SOFT = {"loss": "forward_kl", "signal": "logits", "weight": 0.7, "temperature": 2.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache of texts, one of them a single token, and of chats; and what a tiny Qwen says."""
    root = tmp_path_factory.mktemp("causal")
    lines = make_lines(60)[0]
    texts = [*lines[:49], "a"]
    chats = [
        [
            {"role": "user", "content": lines[n]},
            {"role": "assistant", "content": lines[59 - n]},
            *([{"role": "user", "content": "why"}] if n % 3 else []),
        ]
        for n in range(50)
    ]
    for name, rows in (("train", slice(50)), ("dev", slice(40, 50))):
        pairs = zip(texts[rows], chats[rows], strict=True)
        rows = [json.dumps({"text": text, "chat": chat}) + "\n" for text, chat in pairs]
        (root / f"{name}.jsonl").write_text("".join(rows))
    (root / "other.jsonl").write_text('{"words": "a b"}\n')
    make("qwen2", "lm", root / "teacher", lines)
    full = {"name": "full", "values": "float32"}
    tree = {
        "name": "test",
        "corpus": corpus_of(root, "train"),
        "dump": {
            "teacher": {"path": str(root / "teacher"), "device": "cpu"},
            "streams": {
                "text": {"field": "text"},
                "other": {"field": "text"},
                "pairs": {"field": "text", "pair": "text"},
                "talk": {"field": "chat", "template": "chat"},
            },
            "shard_tokens": 1500,
            "signals": {
                "logits": {"at": "positions", "stream": "text", "codec": full},
                "said": {"at": "positions", "stream": "talk", "codec": full},
                "states": {"kind": "hidden", "side": "decoder", "stream": "text"},
                "looks": {"kind": "attention", "side": "decoder", "stream": "text"},
            },
        },
    }
    dump(parse_recipe(tree), root / "cache")
    return SimpleNamespace(root=root, cache=root / "cache", tree=tree, texts=texts)


def corpus_of(root, name):
    fields = {"text": "text", "chat": "chat"}
    return {"format": "jsonl", "path": str(root / f"{name}.jsonl"), "fields": fields}


def make_recipe(world, *objective, student=None, stream="text", **train_keys):
    section = {
        "student": {"kind": "causal_lm", "config": GPT2, "init": "transformers"} | (student or {}),
        "source": stream,
        "target": stream,
        "objective": list(objective) or [HARD],
        "device": "cpu",
        "max_steps": 6,
        "batch_tokens": 300,
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "checkpoints": {"every_steps": 3, "average_last": 2},
        "validation": {"corpus": corpus_of(world.root, "dev"), "every_steps": 3},
    }
    streams = {"dump": {"streams": world.tree["dump"]["streams"]}}
    return parse_recipe({"name": "test", "train": section | train_keys, **streams})


def make_trainer(world, *objective, **keys):
    return Trainer(make_recipe(world, *objective, **keys).train, open_cache(world.cache))


def one_at_a_time(model, tokens):
    """Logits and labels of the predicted tokens, of each text by itself."""
    logits, labels = [], []
    for sample in range(len(tokens.ids)):
        ids = tokens.ids[sample, : int(tokens.mask[sample].sum())]
        said = model(input_ids=ids[None]).logits[0, :-1]
        counted = [
            n for n in range(1, len(ids)) if tokens.loss is None or bool(tokens.loss[sample, n])
        ]
        logits.append(said[[n - 1 for n in counted]])
        labels.append(ids[counted])
    return torch.cat(logits), torch.cat(labels)


STUDENTS = {
    "gpt2": ("text", GPT2 | QUIET),
    "gpt2 of a chat": ("talk", GPT2 | QUIET | {"tie_word_embeddings": False}),
    "llama": ("text", {"model_type": "llama", **SIZES["llama"]}),
    # Its logits are no plain product.
    "gemma2": (
        "talk",
        {"model_type": "gemma2", **SIZES["gemma2"], "final_logit_softcapping": 30.0},
    ),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_losses_are_those_of_tokens_one_text_at_a_time(world, name):
    stream, config = STUDENTS[name]
    signal = {"signal": "logits" if stream == "text" else "said"}
    terms = [HARD | {"label_smoothing": 0.1, "weight": 0.3}, SOFT | signal]
    terms.append({"loss": "reverse_kl", "weight": 0.2} | signal)
    made = make_trainer(world, *terms, student={"config": config}, stream=stream)
    assert made.distillation._linear == (name != "gemma2")
    made.distillation.double()
    batch = next(iter(made.stream))
    (micro,) = batch.micro
    total, values = made.distillation(micro, batch.counts, made.objective.at(1, 10))
    gradients = torch.autograd.grad(total, made.parameters, allow_unused=True)

    logits, labels = one_at_a_time(made.model, micro.streams[stream])
    tokens = int(micro.streams[stream].mask.sum())
    counted = batch.counts[f"{stream}.predicted"]
    assert counted == batch.counts[signal["signal"]] == len(labels)
    assert counted == tokens - len(micro) if stream == "text" else 0 < counted < tokens / 2
    teacher = decode(micro.signals[signal["signal"]])
    width = open_cache(world.cache).signal("logits").vocab_size
    dense = torch.zeros(len(labels), width, dtype=torch.float64)
    dense[teacher.rows, teacher.ids] = teacher.values.double()
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
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    whole = 0.3 * expected[0] + 0.7 * 4 * expected[1] + 0.2 * expected[2]
    torch.testing.assert_close(total.double(), whole, rtol=1e-5, atol=1e-6)
    others = torch.autograd.grad(whole, made.parameters, allow_unused=True)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


LAYERS = [
    {"loss": "hidden_mse", "signal": "states", "layers": [{"student": 1, "teacher": 2}]},
    {"loss": "attention_mse", "signal": "looks", "layers": [{"student": 1, "teacher": 1}]},
]


def test_layers_are_those_of_one_text_at_a_time(world):
    config = GPT2 | QUIET | {"n_embd": 24, "n_head": 4}
    made = make_trainer(world, HARD, *LAYERS, student={"config": config})
    batch = next(iter(made.stream))
    (micro,) = batch.micro
    total, values = made.distillation(micro, batch.counts, made.objective.at(1, 10))
    states, looks = (
        micro.signals[name].decode()[:, micro.signals[name].layers.index(layer)]
        for name, layer in (("states", 2), ("looks", 1))
    )
    own_states, own_looks = [], []
    for ids, mask in zip(micro.streams["text"].ids, micro.streams["text"].mask, strict=True):
        out = made.model(
            input_ids=ids[mask][None], output_hidden_states=True, output_attentions=True
        )
        own_states.append(out.hidden_states[1][0])
        own_looks.append(out.attentions[0][0].mean(0).flatten())
    logits, labels = one_at_a_time(made.model, micro.streams["text"])
    expected = torch.stack(
        [
            F.cross_entropy(logits, labels),
            F.mse_loss(torch.cat(own_states), states),
            F.mse_loss(torch.cat(own_looks), looks[:, 0]),
        ]
    )
    torch.testing.assert_close(values, expected.detach(), rtol=1e-4, atol=1e-6)
    both = [
        torch.autograd.grad(one, made.parameters, allow_unused=True)
        for one in (total, expected.sum())
    ]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_parts_of_a_batch_add_up(world):
    found = {}
    for parts, stream in ((1, "text"), (50, "text"), (1, "talk"), (3, "talk")):
        soft = SOFT | {"signal": "logits" if stream == "text" else "said"}
        made = make_trainer(world, HARD, soft, accumulate=parts, stream=stream)
        made.distillation.eval()
        batch = next(iter(made._open_stream()))
        # A text of one token has a micro-batch of its own, in which nothing is predicted.
        assert len(batch.micro) == min(parts, len(batch.rows))
        values = [made.backward(batch), *(one.grad for one in made.parameters)]
        torch.testing.assert_close(found.setdefault(stream, values), values, rtol=1e-4, atol=1e-5)
        totals, counts = [], []
        for rank in range(2):
            made.ranks = Ranks(rank, 2)
            share = next(iter(made._open_stream()))
            counts.append(share.counts)
            moments = made.objective.at(1, 10)
            totals += [made.distillation(one, share.counts, moments)[0] for one in share.micro]
        assert counts[0] == counts[1] == batch.counts
        assert sum(totals).item() == pytest.approx(values[0][0].item(), rel=1e-5)


def test_labels_of_other_tokens_are_noticed(world):
    for stream, name in (("text", "logits"), ("talk", "said")):
        made = make_trainer(world, SOFT | {"signal": name}, stream=stream)
        (micro,) = next(iter(made.stream)).micro
        made.family.check_labels(micro, made.objective)
        tokens = micro.streams[stream]
        moved = replace(tokens, ids=tokens.ids.roll(1, 1))
        with pytest.raises(TrainingError, match=f"signal '{name}': labels are shifted"):
            made.family.check_labels(replace(micro, streams={stream: moved}), made.objective)


def brute_force(model, tokenizer, texts):
    """Summed nats, tokens and first choices of all tokens but the first, one by one."""
    nats = hits = count = 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for end in range(1, len(ids)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[:end]])).logits[0, -1].double()
            nats -= logits.log_softmax(0)[ids[end]].item()
            hits += int(logits.argmax()) == ids[end]
            count += 1
    return nats, count, hits


def test_a_gpt2_of_ones_own_is_trained_scored_and_is_a_teacher(world, tmp_path):
    recipe = make_recipe(world, max_steps=20)
    summary = train(recipe, world.cache, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["dev_loss"] for line in map(json.loads, lines) if "dev_loss" in line]
    assert summary["dev_loss"] == losses[-1] < losses[0] - 0.3
    assert summary["dev_perplexity"] == pytest.approx(math.exp(losses[-1]))

    section = EvaluateSection(corpus=corpus_of(world.root, "dev"), device="cpu", batch_tokens=60)
    found = evaluate(tmp_path / "run", section)
    best = tmp_path / "run" / "best"
    model = AutoModelForCausalLM.from_pretrained(best)
    texts = world.texts[40:50]
    nats, count, hits = brute_force(model, load_tokenizer(best), texts)
    assert found["num_tokens"] == count
    assert found["loss_nats"] == pytest.approx(nats / count, rel=1e-5)
    assert found["loss_nats"] == pytest.approx(min(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    # The text of one token has nothing to predict.
    assert (found["num_texts"], found["num_too_long"]) == (9, 0)
    words = len(" ".join(texts[:-1]).split(" "))
    assert found["num_words"] == words
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert found["accuracy"] == pytest.approx(hits / count)
    assert found["parameters"]["total"] == sum(one.numel() for one in model.parameters())
    assert read_evaluation(tmp_path / "run") == found

    streams, labels = {"text": {"field": "text"}}, {"at": "positions", "stream": "text"}
    changes = {"streams": streams, "signals": {"logits": labels}}
    changes["teacher"] = {"path": str(best), "device": "cpu"}
    dump(parse_recipe(world.tree | {"dump": world.tree["dump"] | changes}), tmp_path / "cache")
    record = open_cache(tmp_path / "cache").signal("logits")
    assert (record.teacher.kind, record.at) == ("causal_lm", "positions")
    student = {"config": None, "path": str(best)}
    terms = [HARD | {"weight": 0.6}, {"loss": "forward_kl", "weight": 0.4}]
    soft = make_recipe(world, *terms, student=student)
    # One at once, and one that is stopped in its middle and goes on.
    train(soft, tmp_path / "cache", tmp_path / "whole")
    halted = soft.model_dump(mode="json"), str(tmp_path / "cache"), str(tmp_path / "again")
    assert many_ranks.train(*halted, stop=4) is None
    train(soft, tmp_path / "cache", tmp_path / "again")
    whole, again = (
        load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_gpt2_comes_of_text_alone_and_teaches_the_next(world, tmp_path):
    (tmp_path / "text").write_text("".join(f"{text}\n" for text in world.texts))
    shared = [
        ("corpus.fields.text", str(tmp_path / "text")),
        ("evaluate.corpus.fields.text", str(tmp_path / "text")),
        ("train.student.config.n_embd", "12"),
        ("train.max_steps", "2"),
        ("train.device", "cpu"),
    ]
    sizes = [("dump.tokenizers.pieces.vocab_size", "34")]
    recipe = load_recipe("causal-lm", [*shared, *sizes])
    dump(recipe, tmp_path / "cache")
    train(recipe, tmp_path / "cache", tmp_path / "run")
    teacher = [("dump.teacher", f"{{path: {tmp_path / 'run' / 'best'}, device: cpu}}")]
    recipe = load_recipe("lightpaff-gpt2:finetuning", [*shared, *teacher])
    assert [(term.loss, term.weight) for term in recipe.train.objective] == [
        ("cross_entropy", 0.6),
        ("forward_kl", 0.4),
    ]
    dump(recipe, tmp_path / "labels")
    train(recipe, tmp_path / "labels", tmp_path / "student")
    found = evaluate(tmp_path / "student")
    ids = load_tokenizer(tmp_path / "student" / "best")(world.texts)["input_ids"]
    assert found["num_tokens"] == sum(len(one) - 1 for one in ids)
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    (terms,) = [json.loads(line)["terms"] for line in lines if "terms" in line]
    assert set(terms) == {"cross_entropy", "forward_kl"}


def test_of_a_chat_the_assistant_is_scored(world, tmp_path):
    train(make_recipe(world, stream="talk", max_steps=2), world.cache, tmp_path / "run")
    section = EvaluateSection(corpus=corpus_of(world.root, "dev"), device="cpu")
    found = evaluate(tmp_path / "run", section)
    student = {"path": str(tmp_path / "run" / "best"), "config": None}
    made = make_trainer(world, stream="talk", student=student)
    nats = count = 0
    for tokens, chosen in zip(made.dev.tokens, made.dev.predicted, strict=True):
        ids = torch.from_numpy(tokens)
        logits = made.model.eval()(input_ids=ids[None]).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        nats += losses[torch.from_numpy(chosen[1:])].sum().item()
        count += int(chosen.sum())
        assert "assistant" not in made.cache.tokens(made.tokenizer)[tokens[chosen][0]]
    assert found["num_tokens"] == count < sum(map(len, made.dev.tokens)) / 2
    assert found["loss_nats"] == pytest.approx(nats / count, rel=1e-5)
    assert found["word_perplexity"] is None
    alone = score_causal(made.model, made.dev, torch.device("cpu"), 1)
    assert alone.loss_nats == pytest.approx(found["loss_nats"], rel=1e-5)


BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 2, "intermediate_size": 32}
OTHER = {"format": "jsonl", "fields": {"words": "words"}}
REFUSED = [
    ([HARD | {"masks": "m"}], {}, RecipeError, r"0\.masks: a causal LM predicts the tokens of"),
    ([HARD | {"hypotheses": "b"}], {}, RecipeError, r"0\.hypotheses: a causal LM predicts the"),
    ([SOFT | {"signal": "no"}], {}, RecipeError, r"'no' is no logits .* has \['logits', 'said'\]"),
    ([SOFT | {"signal": "states"}], {}, RecipeError, r"dump with .* \{at: positions, stream: text"),
    ([SOFT | {"signal": "said"}], {}, IdentityError, "'said' labels stream 'talk', the student"),
    ([{"loss": "score_mse", "signal": "x"}], {}, RecipeError, "score_mse is no term of a causal"),
    ([{"loss": "hidden_mse", "signal": "x"}], {}, RecipeError, "no signal 'x'; dump one of kind h"),
    ([LAYERS[0]], {"source": "other", "target": "other"}, IdentityError, "describes stream 'text'"),
    ([{"loss": "masked_kl", "signal": "x"}], {}, RecipeError, "masked_kl is no term of a causal"),
    ([SOFT | {"sample_weight": {"by": "teacher_loss"}}], {}, RecipeError, "terms have none"),
    ([HARD], {"target": "other"}, RecipeError, "give both the same stream"),
    ([HARD], {"gate": {"terms": [0]}}, RecipeError, "train.gate: goes with a student of kind"),
    ([HARD], {"student": {"config": {"model_type": "t5"}}}, ModelError, "'t5' is not a causal LM"),
    ([HARD], {"student": {"config": BERT}}, ModelError, "BertLMHeadModel reads the tokens after"),
    ([HARD], {"student": {"layers": {"encoder": [1]}}}, ModelError, "train.student.layers: "),
    ([HARD], {"validation": {"corpus": OTHER}}, RecipeError, r"has \['words'\]; .* reads text"),
    ([HARD], {"student": {"config": GPT2 | {"n_positions": 1}}}, RecipeError, "fits the student's"),
]


@pytest.mark.parametrize(("objective", "keys", "error", "message"), REFUSED)
def test_what_a_causal_lm_cannot_have_is_refused_in_a_line(world, objective, keys, error, message):
    if "validation" in keys:
        keys = {"validation": {"corpus": OTHER | {"path": str(world.root / "other.jsonl")}}}
    if "layers" in keys.get("student", {}):
        path = {"config": None, "path": str(world.root / "teacher")}
        keys = {"student": keys["student"] | path}
    with pytest.raises(error, match=message) as found:
        make_trainer(world, *objective, **keys)
    assert "\n" not in str(found.value)


def test_layers_of_an_encoder_are_refused(world):
    signals = dict(open_cache(world.cache).signals)
    signals["states"] = signals["states"].model_copy(update={"side": "encoder"})
    terms = make_recipe(world, LAYERS[0]).train.objective
    with pytest.raises(RecipeError, match=r"'states' is of side encoder, .* side: decoder\}"):
        CausalObjective(terms, signals, "text")


def test_texts_that_cannot_be_read_are_refused_in_a_line(world, tmp_path):
    short = {"config": GPT2 | {"n_positions": 8}}
    made = make_trainer(world, student=short, validation={})
    with pytest.raises(ModelError, match=r"takes 8 positions, .* dump.max_tokens 8"):
        made.step(next(iter(made.stream)))
    made = make_trainer(world, stream="pairs")
    with pytest.raises(RecipeError, match="stream 'pairs' is of pairs, a causal LM reads one text"):
        made.step(next(iter(made.stream)))
    section = EvaluateSection(corpus=corpus_of(world.root, "dev"), device="cpu")
    train(make_recipe(world, max_steps=1), world.cache, tmp_path / "run")
    best = tmp_path / "run" / "best"
    lengths = [len(ids) for ids in load_tokenizer(best)(world.texts[40:49])["input_ids"]]
    config = AutoConfig.from_pretrained(best, n_positions=max(lengths) - 1)
    AutoModelForCausalLM.from_config(config).save_pretrained(best)
    found = evaluate(tmp_path / "run", section)
    assert found["num_too_long"] == lengths.count(max(lengths)) == 9 - found["num_texts"]
    config.n_positions = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(best)
    with pytest.raises(CorpusError, match=r"evaluate\.corpus has no text to score"):
        evaluate(tmp_path / "run", section)
