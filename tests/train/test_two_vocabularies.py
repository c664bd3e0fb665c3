"""Students that read one tokenizer's ids and write another's, from cache to scores."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from kdcache.dump.runner import dump
from kdcache.errors import IdentityError
from kdcache.formats.cache import open_cache
from kdcache.recipe import parse_recipe
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from kdcache.train.students.two_tokenizers import SOURCE_FOLDER
from tests.train.conftest import STUDENT, make_lines

SEPARATE = STUDENT | {"share_encoder_decoder_embeddings": False, "dropout": 0.0}


def save_tokenizer(directory, special, lines):
    """Word by word, an end token after every text; `special` are the first ids."""
    words = sorted({word for line in lines for word in line.split()})
    vocab = {word: number for number, word in enumerate([*special, *words])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    end = [("</s>", vocab["</s>"])]
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=end)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(directory)
    return len(vocab)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache whose sides have different words, other special ids and other sizes."""
    root = tmp_path_factory.mktemp("two")
    src, tgt = make_lines(40)
    for name, lines in (("src", src), ("tgt", tgt)):
        (root / name).write_text("".join(line + "\n" for line in lines))
    # The end token of what is read has the id that is padding on the side that is written.
    rows = [
        save_tokenizer(root / "reads", ["</s>", "<unk>", "<more>", "<pad>"], [*src, "extra words"]),
        save_tokenizer(root / "writes", ["<pad>", "<unk>", "</s>"], tgt),
    ]
    sides = {"src": "reads", "tgt": "writes"}
    tree = {
        "name": "test",
        "corpus": {"fields": {side: str(root / side) for side in sides}},
        "dump": {
            "tokenizers": {
                name: {"kind": "pretrained", "path": str(root / name)} for name in sides.values()
            },
            "streams": {
                side: {"field": side, "tokenizer": name, "target": side == "tgt"}
                for side, name in sides.items()
            },
        },
    }
    dump(parse_recipe(tree), root / "cache")
    return SimpleNamespace(root=root, cache=root / "cache", rows=rows, src=src, tgt=tgt)


def make_recipe(world, student, **more):
    corpus = {"fields": {side: str(world.root / side) for side in ("src", "tgt")}, "limit": 10}
    scoring = {"num_beams": 1, "latency_sentences": 0, "corpus": corpus, "device": "cpu"}
    section = {
        "student": student,
        "objective": [{"loss": "cross_entropy"}],
        "device": "cpu",
        "max_steps": 3,
        "batch_tokens": 200,
        "schedule": {"warmup_steps": 1},
        "checkpoints": {"every_steps": 3, "average_last": 0},
        "validation": {"corpus": corpus},
    }
    return parse_recipe({"name": "test", "train": section | more, "evaluate": scoring})


@pytest.fixture(scope="module")
def run(world):
    out = world.root / "run"
    summary = train(make_recipe(world, {"config": SEPARATE}), world.cache, out)
    return SimpleNamespace(path=out, summary=summary)


def test_each_side_has_its_own_table_and_special_ids(world):
    trainer = Trainer(make_recipe(world, {"config": SEPARATE}).train, open_cache(world.cache))
    model, config = trainer.model, trainer.model.config
    encoder, decoder = model.get_encoder().embed_tokens, model.get_decoder().embed_tokens
    assert [len(encoder.weight), len(decoder.weight)] == world.rows
    assert model.get_output_embeddings().weight is decoder.weight
    for one in (config, model.generation_config):
        ids = (one.pad_token_id, one.decoder_start_token_id, one.eos_token_id)
        assert ids == (0, 0, 2)
    assert (encoder.padding_idx, decoder.padding_idx) == (3, 0)
    trainer.backward(next(iter(trainer.stream)))
    assert encoder.weight.grad[0].abs().sum() > 0  # the end token of what is read
    assert encoder.weight.grad[3].abs().sum() == 0 == encoder.weight[3].abs().sum()


def test_a_run_is_scored_and_written_with_both_tokenizers(world, run):
    result = evaluate(run.path)
    model = AutoModelForSeq2SeqLM.from_pretrained(run.path / "best").eval()
    reads = AutoTokenizer.from_pretrained(run.path / "best" / SOURCE_FOLDER)
    writes = AutoTokenizer.from_pretrained(run.path / "best")
    losses, hypotheses = [], []
    for src, tgt in list(zip(world.src, world.tgt, strict=True))[:10]:
        labels = torch.tensor([writes(tgt)["input_ids"]])
        source = torch.tensor([reads(src)["input_ids"]])
        start = torch.tensor([[0]])
        inputs = torch.cat([start, labels[:, :-1]], 1)
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=inputs).logits[0]
            limit = 2 * source.shape[1] + 10
            written = model.generate(source, num_beams=1, do_sample=False, max_new_tokens=limit)
        losses.append(F.cross_entropy(logits, labels[0], reduction="none"))
        hypotheses += writes.batch_decode(written, skip_special_tokens=True)
    assert result["loss_nats"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert run.summary["dev_loss"] == pytest.approx(result["loss_nats"], rel=1e-4)
    assert (run.path / "hypotheses.txt").read_text().splitlines() == hypotheses


def test_a_written_student_trains_on_where_both_of_its_tokenizers_fit(world, run, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(run.path / "best", start)
    recipe = make_recipe(world, {"path": str(start)})
    trainer = Trainer(recipe.train, open_cache(world.cache))
    assert trainer.model.get_encoder().embed_tokens.padding_idx == 3
    trainer.save_model(tmp_path / "again")
    assert (tmp_path / "again" / SOURCE_FOLDER / "tokenizer.json").is_file()
    # Ids of the source that mean something else to the student.
    vocabulary = start / SOURCE_FOLDER / "tokenizer.json"
    tree = json.loads(vocabulary.read_text())
    ids = tree["model"]["vocab"]
    ids["cat"], ids["dog"] = ids["dog"], ids["cat"]
    vocabulary.write_text(json.dumps(tree))
    with pytest.raises(
        IdentityError, match=rf"{SOURCE_FOLDER}: .* id \d+ is 'dog' there and 'cat'"
    ):
        Trainer(recipe.train, open_cache(world.cache))
    # One tokenizer for both sides, as most students have, cannot read the source's ids.
    shutil.rmtree(start / SOURCE_FOLDER)
    with pytest.raises(IdentityError, match="the cache's 'reads'"):
        Trainer(recipe.train, open_cache(world.cache))


def test_one_table_for_two_vocabularies_is_warned_of(world, caplog):
    recipe = make_recipe(world, {"config": STUDENT})
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(recipe.train, open_cache(world.cache))
    assert "share_encoder_decoder_embeddings false has one for each" in caplog.text
    table = trainer.model.get_encoder().embed_tokens
    assert (len(table.weight), table.padding_idx) == (max(world.rows), None)
