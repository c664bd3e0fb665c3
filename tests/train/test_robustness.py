"""Noise on weights, time of one text, and text put back into plain form."""

import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kdcache.models.loading import load_tokenizer
from kdcache.recipe import CorpusSection, EvaluateSection, PerturbSection, dump_recipe, parse_recipe
from kdcache.text.corpus import read_corpus
from kdcache.text.detokenize import wikitext
from kdcache.train.evaluation.evaluate import evaluate, load_model, score_model
from kdcache.train.evaluation.latency import timed
from kdcache.train.evaluation.perturb import perturbed, robustness
from kdcache.train.students.student import fixed_tables
from tests.train.conftest import make_lines
from tests.train.test_masked_lm import save_tokenizer


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(5)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3)  # their means are not near zero
    return model.eval()


@pytest.mark.parametrize("over", ["mean", "mean_abs"])
def test_noise_is_normal_in_units_of_each_parameter(gpt2, over):
    before = {name: weight.clone() for name, weight in gpt2.named_parameters()}
    found = []
    for sigma, seed in ((0.5, 1), (1.0, 1), (0.5, 2)):
        with perturbed(gpt2, sigma, seed, over):
            found.append({n: w.detach() - before[n] for n, w in gpt2.named_parameters()})
            assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
        assert all(torch.equal(w, before[n]) for n, w in gpt2.named_parameters())
    once, twice, other = found
    assert set(once) == set(before)
    for name, moved in once.items():
        unit = (before[name].abs() if over == "mean_abs" else before[name]).mean()
        z = moved / (0.5 * unit)
        assert abs(z.mean()) < 4 / math.sqrt(z.numel())
        assert abs(z.var() - 1) < 6 * math.sqrt(2 / z.numel())
        torch.testing.assert_close(twice[name], 2 * moved, rtol=1e-3, atol=1e-5)
        assert not torch.equal(other[name], moved)
    names = list(once)
    assert not torch.equal(once[names[-1]], once[names[-2]])  # each has noise of its own


def test_fixed_tables_do_not_move_and_scores_are_averaged(world):
    section = EvaluateSection(device="cpu", latency_sentences=2, num_beams=1)
    model, tokenizer, _ = load_model(world.teacher, section)
    tables = [table.clone() for table in fixed_tables(model)]
    assert tables
    seen = []

    def scores():
        assert all(map(torch.equal, tables, fixed_tables(model)))
        seen.append(model.model.shared.weight.detach().sum().item())
        return {"one": seen[-1], "num_texts": 3.0, "name": "x", "count": 4}

    noise = PerturbSection(sigmas=[0.25], seeds=[3, 4], over="mean_abs")
    found = robustness(model, noise, scores)["perturbed"]
    assert set(found["sigma=0.25"]) == {"one"}
    assert found["sigma=0.25"]["one"]["mean"] == pytest.approx(sum(seen) / 2)
    assert found["sigma=0.25"]["one"]["sd"] == pytest.approx(abs(seen[0] - seen[1]) / math.sqrt(2))
    assert robustness(model, None, scores) == {}
    noise = section.model_copy(update={"perturb": PerturbSection(sigmas=[0.0], seeds=[1])})
    result, _ = score_model(model, tokenizer, world.src[:3], world.tgt[:3], noise)
    plain = result["perturbed"]["sigma=0"]
    assert plain["loss_nats"] == {"mean": result["loss_nats"], "sd": 0.0}
    assert plain["bleu"]["mean"] == result["bleu"]["score"]
    assert result["latency_seconds"]["num_sentences"] == 2


class Elsewhere:
    """A model that lies on a device which this machine may not have."""

    def __init__(self):
        self.device, self.ran = torch.device("cuda"), []

    def to(self, device):
        self.device = torch.device(device)


def test_a_model_on_a_gpu_is_timed_there_and_on_the_cpu():
    model = Elsewhere()
    found = timed(model, lambda n: model.ran.append((model.device.type, n)), 3, {"num_tokens": 7})
    assert model.ran == [(d, n) for d in ("cuda", "cpu") for n in (0, 0, 1, 2)]  # one warms up
    assert model.device.type == "cuda"
    for key in ("latency_seconds", "latency_cpu_seconds"):
        assert (found[key]["num_sentences"], found[key]["num_tokens"]) == (3, 7)
        assert 0 <= found[key]["median"] <= found[key]["p90"]
    assert timed(model, print, 0, {}) == {"latency_seconds": None}


TOKENISED = """ = = Early life = =
He had a 4 @,@ 000 @.@ 5 m ( 13 @,@ 000 ft ) well @-@ built house ; it 's his .
" It didn 't , " he said , " go to the players ' room ! " [ 3 ]
It was 5 ° C , or so : the <unk> , 50 % of it ."""
PLAIN = """== Early life ==
He had a 4,000.5 m (13,000 ft) well-built house; it's his.
"It didn't," he said, "go to the players' room!" [3]
It was 5° C, or so: the <unk>, 50% of it."""


def test_wikitext_is_read_as_people_write_it_and_words_counted_as_it_stands(tmp_path, gpt2):
    lines = TOKENISED.split("\n")
    assert [wikitext(line) for line in lines] == PLAIN.split("\n")
    rows = [{"text": line, "label": " a , b"} for line in lines]
    (tmp_path / "text").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"format": "jsonl", "path": str(tmp_path / "text"), "label": "label"}
    tree |= {"fields": {"text": "text", "label": "label"}, "detokenize": "wikitext"}
    (batch,) = read_corpus(CorpusSection.model_validate(tree))
    assert batch.fields == {"text": PLAIN.split("\n"), "label": [" a , b"] * 4}
    # Nats are those of the plain text, words those of the file.
    run = tmp_path / "run"
    save_tokenizer(tmp_path / "tokens", make_lines(20)[0])
    tokenizer = load_tokenizer(tmp_path / "tokens")
    student = {"kind": "causal_lm", "config": {"model_type": "gpt2"}}
    train = {"student": student, "source": "text", "target": "text"}
    recipe = parse_recipe({"name": "x", "train": train, "evaluate": {"corpus": tree}})
    gpt2.save_pretrained(run / "best")
    tokenizer.save_pretrained(run / "best")
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    section = recipe.evaluate.model_copy(update={"device": "cpu", "latency_sentences": 1})
    found = evaluate(run, section)
    nats = 0.0
    for line in PLAIN.split("\n"):
        ids = torch.tensor([tokenizer(line)["input_ids"]])
        nats += gpt2(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    words = len(TOKENISED.split())
    assert found["num_words"] == words > len(PLAIN.split())
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert found["latency_seconds"]["num_tokens"] == 512
