"""Evaluation against oracles: one sentence at a time, sacreBLEU itself, and by hand."""

import json
import math

import pytest
import sacrebleu
import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, T5Config

from kdcache.errors import CorpusError, IdentityError, ModelError, RecipeError
from kdcache.recipe import EvaluateSection, dump_recipe, load_recipe
from kdcache.train.evaluation.baseline import RESULT, read_evaluation
from kdcache.train.evaluation.evaluate import (
    HYPOTHESES,
    corpus_scores,
    count_parameters,
    evaluate,
    load_model,
)
from kdcache.train.evaluation.paired import paired_test
from kdcache.train.evaluation.translate import translate
from kdcache.train.runs.loop import train
from kdcache.train.runs.validate import score, score_shuffled

REFERENCES = [f"the {noun} is here and {noun}s are there ." for noun in "abcdefghijklmnop"]
BETTER = REFERENCES[:12] + ["no idea at all ."] * 4
WORSE = [line.replace("is", "was") for line in REFERENCES[:6]] + ["no idea at all ."] * 10


@pytest.fixture(scope="module")
def teacher(world):
    model, tokenizer, _ = load_model(world.teacher, EvaluateSection(device="cpu"))
    return model, tokenizer


@pytest.fixture(scope="module")
def section(world):
    fields = {side: str(world.root / f"dev.{side}") for side in ("src", "tgt")}
    return EvaluateSection.model_validate(
        {
            "corpus": {"fields": fields},
            "device": "cpu",
            "num_beams": 2,
            "bootstrap_samples": 50,
            "latency_sentences": 3,
        }
    )


@pytest.fixture(scope="module")
def run(world, make_recipe, section, tmp_path_factory):
    """A finished run whose recipe says how to evaluate it."""
    recipe = make_recipe(max_steps=4, checkpoints={"every_steps": 4, "average_last": 0})
    out = tmp_path_factory.mktemp("runs") / "run"
    train(recipe.model_copy(update={"evaluate": section}), world.cache, out)
    return out


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_batch_translates_like_one_sentence_at_a_time(world, teacher, num_beams):
    model, tokenizer = teacher
    texts = world.src[:24]
    together = translate(model, tokenizer, texts, num_beams=num_beams, max_length_ratio=1.5)
    for text, found in zip(texts, together, strict=True):
        inputs = tokenizer([text], return_tensors="pt")
        limit = math.floor(1.5 * inputs["input_ids"].shape[1]) + 10
        out = model.generate(**inputs, num_beams=num_beams, do_sample=False, max_new_tokens=limit)
        assert found == tokenizer.decode(out[0], skip_special_tokens=True)
    assert len(set(together)) > 1


def test_batch_size_and_order_do_not_matter(world, teacher):
    model, tokenizer = teacher
    texts = world.src[:10]
    once = translate(model, tokenizer, texts)
    assert translate(model, tokenizer, texts, batch_tokens=1) == once
    assert translate(model, tokenizer, texts[::-1]) == once[::-1]
    assert translate(model, tokenizer, []) == []


def test_translation_leaves_the_mode_of_the_model(world, teacher):
    model, tokenizer = teacher
    model.train()
    translate(model, tokenizer, world.src[:1], num_beams=1)
    assert model.training
    model.eval()


def test_a_sentence_beyond_the_positions_is_named(teacher):
    model, tokenizer = teacher
    with pytest.raises(CorpusError, match=r"sentence 1 .* the model takes 64"):
        translate(model, tokenizer, ["the cat", "the cat sees " * 40])


def test_scores_are_sacrebleus_own():
    found = corpus_scores(WORSE, REFERENCES)
    assert found["bleu"]["score"] == sacrebleu.corpus_bleu(WORSE, [REFERENCES]).score
    assert found["chrf"]["score"] == sacrebleu.corpus_chrf(WORSE, [REFERENCES]).score
    assert "tok:13a" in found["bleu"]["signature"]
    assert f"version:{sacrebleu.__version__}" in found["chrf"]["signature"]


def test_the_paired_test_is_sacrebleus_own():
    found = paired_test(BETTER, WORSE, REFERENCES, num_samples=200)
    metrics = {"a": BLEU(references=[REFERENCES]), "b": CHRF(references=[REFERENCES])}
    systems = [("worse", WORSE), ("better", BETTER)]
    _, scores = PairedTest(systems, metrics, None, test_type="bs", n_samples=200)()
    for key, name in (("bleu", "BLEU"), ("chrf", "chrF2")):
        worse, better = scores[name]
        assert found[key]["baseline"] == worse.score
        assert found[key]["score"] == better.score
        assert found[key]["p_value"] == better.p_value
        assert found[key]["interval"] == better.ci
    assert found["bleu"]["difference"] > 0
    assert found["bleu"]["p_value"] < 0.05
    assert "bs:200" in found["bleu"]["signature"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_are_counted_once(tied):
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    inner = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 10}
    config = BartConfig(**sizes, **heads, **inner, tie_word_embeddings=tied)
    model = AutoModelForSeq2SeqLM.from_config(config)
    attention, feed_forward, norm = 4 * (8 * 8 + 8), 8 * 16 + 16 + 16 * 8 + 8, 2 * 8
    encoder = attention + feed_forward + 2 * norm + norm  # and the norm of its embeddings
    decoder = 2 * attention + feed_forward + 3 * norm + norm
    found = count_parameters(model)
    assert found["without_embeddings"] == encoder + decoder
    assert found["total"] == sum(p.numel() for p in model.parameters())
    assert found["total"] >= encoder + decoder + 20 * 8


def test_relative_positions_have_no_limit():
    config = T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    model = AutoModelForSeq2SeqLM.from_config(config)
    config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0

    class Letters:
        """A tokenizer of letters, enough for a search."""

        def __call__(self, texts):
            return {"input_ids": [[3 + ord(letter) % 16 for letter in text] for text in texts]}

        def batch_decode(self, rows, **_):
            return [" ".join(str(i) for i in row.tolist()) for row in rows]

    assert len(translate(model, Letters(), ["a" * 600], max_length_ratio=0.01)) == 1


def test_a_model_directory_is_scored(world, section, teacher, tmp_path):
    result = evaluate(world.teacher, section, out=tmp_path / "scores")
    model, tokenizer = teacher
    src, tgt = world.src[100:], world.tgt[100:]
    lines = (tmp_path / "scores" / HYPOTHESES).read_text().split("\n")[:-1]
    assert lines == translate(model, tokenizer, src, num_beams=2)
    assert result["bleu"]["score"] == sacrebleu.corpus_bleu(lines, [tgt]).score
    plain = score(model, tokenizer, src, tgt, torch.device("cpu"))
    other = score_shuffled(model, tokenizer, src, tgt, torch.device("cpu"))
    assert result["loss_nats"] == pytest.approx(plain.loss_nats, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(plain.loss_nats), rel=1e-5)
    assert result["shuffled"]["loss_nats"] == pytest.approx(other.loss_nats, rel=1e-5)
    latency = result["latency_seconds"]
    assert 0 < latency["median"] <= latency["p90"]
    assert latency["num_sentences"] == 3
    assert json.loads((tmp_path / "scores" / RESULT).read_text()) == result
    assert not (world.teacher / RESULT).exists()


def test_a_run_is_scored_by_its_own_recipe(run):
    result = evaluate(run)
    assert result["model"] == str(run / "best")
    assert result["num_beams"] == 2
    assert read_evaluation(run) == result
    assert AutoTokenizer.from_pretrained(run / "best").decode([3], skip_special_tokens=True) == ""


def test_two_runs_are_compared(world, run, section, tmp_path):
    evaluate(world.teacher, section, out=tmp_path / "teacher")
    result = evaluate(run, against=tmp_path / "teacher")
    lines = {
        name: (path / HYPOTHESES).read_text().split("\n")[:-1]
        for name, path in (("run", run), ("teacher", tmp_path / "teacher"))
    }
    expected = paired_test(lines["run"], lines["teacher"], world.tgt[100:], 50)
    assert result["against"] == {"run": str(tmp_path / "teacher"), **expected}


def test_a_run_of_stages_is_compared_with_by_its_last(world, run, section, tmp_path):
    last = tmp_path / "two" / "finetuning"
    evaluate(world.teacher, section, out=last)
    for folder, name in ((last, "lightpaff-mass:finetuning"), (last.parent, "lightpaff-mass")):
        (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(name)))
    found = evaluate(run, against=last.parent)
    assert found["against"] == evaluate(run, against=last)["against"]


def test_other_references_are_refused(world, run, section, tmp_path):
    corpus = section.corpus.model_copy(update={"limit": 5})
    evaluate(world.teacher, section.model_copy(update={"corpus": corpus}), out=tmp_path / "teacher")
    with pytest.raises(IdentityError, match=r"scored on other text .*5 sentences"):
        evaluate(run, against=tmp_path / "teacher")


def test_hypotheses_that_lost_lines_are_refused(world, run, section, tmp_path):
    evaluate(world.teacher, section, out=tmp_path / "teacher")
    (tmp_path / "teacher" / HYPOTHESES).write_text("only one\n")
    with pytest.raises(IdentityError, match=r"has 1 lines, its evaluation 20"):
        evaluate(run, against=tmp_path / "teacher")


def test_what_cannot_be_scored_is_named(world, run, section, tmp_path):
    with pytest.raises(RecipeError, match=r"no text to score on"):
        evaluate(world.teacher)
    with pytest.raises(ModelError, match=r"neither a run .* nor a transformers model"):
        evaluate(tmp_path, section)
    with pytest.raises(ModelError, match=r"no checkpoint 'averaged'; it has best, last"):
        evaluate(run, section.model_copy(update={"checkpoint": "averaged"}))
    with pytest.raises(ModelError, match=r"not evaluated yet"):
        evaluate(run, section, against=world.teacher)
    fields = {"de": section.corpus.fields["src"], "en": section.corpus.fields["tgt"]}
    corpus = section.corpus.model_copy(update={"fields": fields})
    with pytest.raises(RecipeError, match=r"has \['de', 'en'\]; scoring needs \['src', 'tgt'\]"):
        evaluate(run, section.model_copy(update={"corpus": corpus}))
