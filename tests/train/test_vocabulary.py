"""Vocabularies of students: prefixes, paddings, added tokens, three-byte ids, and refusals."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from kdcache.dump.runner import dump
from kdcache.dump.tokenize import Tokenizer as DumpTokenizer
from kdcache.errors import CorpusError, IdentityError, ModelError
from kdcache.formats.cache import open_cache
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import StudentSection, parse_recipe
from kdcache.text.tokenizers import directory_files, tokenizer_digest
from kdcache.train.batches.stream import BatchStream
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.evaluation.translate import translate
from kdcache.train.runs.loop import train
from kdcache.train.runs.validate import score
from kdcache.train.students.student import embedding_rows
from kdcache.train.students.vocabulary import KnownIds, check_tokenizer
from tests.train.conftest import make_lines

SPECIAL = ["<pad>", "</s>", "<unk>"]
#: Words that no line has; they come last but for the added tokens.
UNUSED = [f"unused{n}" for n in range(6)]
ADDED = ["<lang:de>", "<lang:en>"]
TINY = {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def words_of(lines: list[str]) -> list[str]:
    return sorted({word for line in lines for word in line.split()})


def save_tokenizer(
    directory: Path, words: list[str], added: list[str] = ADDED, eos: str = "</s>"
) -> int:
    """A word-level tokenizer that ends every text; returns its size, added tokens included."""
    vocab = {word: number for number, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, vocab[eos])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token=eos, unk_token="<unk>"
    )
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(directory)
    return len(tokenizer)


def save_model(directory: Path, rows: int, seed: int = 1, std: float = 0.5) -> None:
    """A tiny T5; the larger `std`, the sharper what it says."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(vocab_size=rows, **TINY))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    model.save_pretrained(directory)


def make_world(
    root: Path, words: list[str], src: list[str], tgt: list[str], extra: int, std: float = 0.5
) -> Path:
    """A cache of one signal by a teacher with `extra` rows beyond its tokenizer."""
    for name, lines in (("src", src), ("tgt", tgt)):
        (root / name).write_text("".join(line + "\n" for line in lines))
    size = save_tokenizer(root / "teacher", words)
    save_model(root / "teacher", size + extra, std=std)
    recipe = parse_recipe(
        {
            "name": "test",
            "corpus": {"fields": {"src": str(root / "src"), "tgt": str(root / "tgt")}},
            "dump": {
                "teacher": {"path": str(root / "teacher"), "device": "cpu"},
                "shard_tokens": 400,
                "signals": {"logits": {"codec": {"name": "threshold", "c": "1/8"}}},
            },
        }
    )
    dump(recipe, root / "cache")
    return root / "cache"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache, the words of its lines, and the size of its tokenizer."""
    root = tmp_path_factory.mktemp("words")
    src, tgt = make_lines(40)
    words = words_of([*src, *tgt])
    path = make_world(root, [*words, *UNUSED], src, tgt, extra=5)
    size = len(SPECIAL) + len(words) + len(UNUSED) + len(ADDED)
    return SimpleNamespace(root=root, cache=path, words=words, size=size, src=src, tgt=tgt)


@pytest.fixture
def cache(world):
    return open_cache(world.cache)


def make_recipe(world, student: dict, **train_keys):
    corpus = {"fields": {side: str(world.root / side) for side in ("src", "tgt")}, "limit": 8}
    section = {
        "student": student,
        "objective": [{"loss": "cross_entropy"}, {"loss": "forward_kl"}],
        "device": "cpu",
        "max_steps": 3,
        "batch_tokens": 200,
        "checkpoints": {"every_steps": 3, "average_last": 0},
        "validation": {"corpus": corpus},
    }
    scoring = {"num_beams": 1, "latency_sentences": 0, "max_length_ratio": 1.0}
    tree = {"name": "test", "train": section | train_keys, "evaluate": scoring}
    return parse_recipe(tree | {"evaluate": scoring | {"corpus": corpus}})


def make_student(
    directory: Path, rows: int, words: list[str] | None = None, **tokenizer
) -> StudentSection:
    """A student directory, with a tokenizer of its own where it has words."""
    save_model(directory, rows, seed=2)
    if words is not None:
        save_tokenizer(directory, words, **tokenizer)
    return StudentSection(path=str(directory))


def test_the_digest_of_a_directory_is_the_dumps(world, cache):
    directory = world.root / "teacher"
    backend = load_tokenizer(directory)
    digest = tokenizer_digest(backend, directory_files(backend, directory))
    assert digest == DumpTokenizer.load(str(directory)).digest == cache.tokenizer("teacher").digest


@pytest.mark.parametrize(
    ("change", "added"),
    [(0, ADDED), (-len(UNUSED), []), (0, ADDED[:1]), (0, [*ADDED, "<more>"])],
    ids=["same", "prefix", "prefix with an added token", "padding"],
)
def test_a_prefix_or_a_padding_fits(change, added, world, cache, tmp_path, caplog):
    words = [*world.words, *UNUSED]
    words = words[: len(words) + change]
    section = make_student(tmp_path / "student", 10, words, added=added)
    with caplog.at_level(logging.INFO):
        files = check_tokenizer(section, cache, "teacher")
    assert {file.name for file in files} >= {"tokenizer.json", "tokenizer_config.json"}
    assert all(file.is_file() for file in files)
    own = DumpTokenizer.load(section.path).digest
    same = own == cache.tokenizer("teacher").digest
    assert same == (change == 0 and added == ADDED)
    assert same == (own not in caplog.text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"words": [w[1], w[0], *w[2:]]}, r"id 3 is '\w+' there and '\w+' in the cache"),
        (lambda w: {"words": ["new", *w]}, "id 3 is 'new' there"),
        (lambda w: {"words": w[:-1]}, "id {last} is '<lang:de>' there and 'unused5' in the cache"),
        (lambda w: {"words": w, "added": ADDED[::-1]}, "is '<lang:en>' there and '<lang:de>'"),
        (lambda w: {"words": w, "eos": "unused0"}, "eos_id is {eos} there and 1 in the cache"),
    ],
    ids=["two swapped", "shifted", "a word left out", "added tokens swapped", "another end"],
)
def test_another_tokenizer_is_refused(change, message, world, cache, tmp_path):
    words = [*world.words, *UNUSED]
    section = make_student(tmp_path / "student", world.size, **change(words))
    message = message.replace("{last}", str(len(SPECIAL) + len(words) - 1))
    message = message.replace("{eos}", str(len(SPECIAL) + words.index("unused0")))
    with pytest.raises(IdentityError, match=message) as caught:
        check_tokenizer(section, cache, "teacher")
    text = str(caught.value)
    assert "\n" not in text
    assert section.path in text
    for digest in (DumpTokenizer.load(section.path).digest, cache.tokenizer("teacher").digest):
        assert digest in text
    with pytest.raises(IdentityError, match=message):
        train(make_recipe(world, {"path": section.path}), world.cache, tmp_path / "run")


def test_a_role_that_one_side_lacks_is_no_conflict(world, cache, tmp_path):
    section = make_student(tmp_path / "student", world.size, [*world.words, *UNUSED])
    backend = AutoTokenizer.from_pretrained(section.path)
    backend.pad_token = None
    backend.bos_token = "<unk>"  # the cache's tokenizer begins with nothing
    backend.save_pretrained(section.path)
    assert load_tokenizer(section.path).pad_token_id is None
    assert check_tokenizer(section, cache, "teacher")


def test_two_vocabularies_must_be_equal(world, cache, tmp_path, monkeypatch):
    section = make_student(tmp_path / "student", world.size, world.words, added=[])
    backend = load_tokenizer(section.path)
    backend.separate_vocabs = True  # as a Marian tokenizer may have
    monkeypatch.setattr("kdcache.train.students.vocabulary.load_tokenizer", lambda path: backend)
    with pytest.raises(IdentityError, match="two vocabularies"):
        check_tokenizer(section, cache, "teacher")


def test_a_student_without_a_tokenizer_is_checked_by_size(world, cache, tmp_path, caplog):
    section = make_student(tmp_path / "small", 20)
    with caplog.at_level(logging.INFO):
        assert check_tokenizer(section, cache, "teacher") == []
    assert f"{section.path}: no tokenizer beside the student" in caplog.text
    message = f"20 rows for the ids of stream 'src', which has {world.size} ids"
    with pytest.raises(ModelError, match=message):
        train(make_recipe(world, {"path": section.path}), world.cache, tmp_path / "run")
    large = make_student(tmp_path / "large", world.size + 70)
    summary = train(make_recipe(world, {"path": large.path}), world.cache, tmp_path / "other")
    assert summary["steps"] == 3
    # What it is saved with is the cache's.
    written = tmp_path / "other" / "last" / "tokenizer.json"
    assert written.read_bytes() == (world.root / "teacher" / "tokenizer.json").read_bytes()


def test_no_tokenizer_is_made_up(tmp_path):
    save_model(tmp_path / "student", 10)
    with pytest.raises(ModelError, match="found no tokenizer"):
        load_tokenizer(tmp_path / "student")


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_rows_are_counted_on_both_sides(family):
    if family == "t5":
        model = T5ForConditionalGeneration(T5Config(vocab_size=30, **TINY))
        assert embedding_rows(model) == (30, 30)
        return
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 8}
    config = MarianConfig(
        vocab_size=30,
        decoder_vocab_size=20,
        share_encoder_decoder_embeddings=False,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        decoder_start_token_id=0,
        forced_eos_token_id=1,
        **heads,
    )
    assert embedding_rows(MarianMTModel(config)) == (30, 20)


def first_batch(cache):
    stream = BatchStream(cache, ["src", "tgt"], ["logits"], 4000, 1, 9, max_epochs=1)
    return next(iter(stream)).micro[0]


def test_a_token_without_a_row_is_named_with_its_sample(world, cache):
    batch = first_batch(cache)
    tokens = batch.streams["tgt"]
    used = int(tokens.flat.max())
    model = T5ForConditionalGeneration(T5Config(vocab_size=used + 1, **TINY))
    ids = KnownIds.of(model, cache, "src", "tgt", all_needed=False)
    # All of its tokens are known; the padding, which is not, is put on a row.
    padded = replace(tokens, ids=torch.where(tokens.mask, tokens.ids, 10_000))
    far = replace(batch, streams={**batch.streams, "tgt": padded})
    checked = ids.checked(far).streams["tgt"]
    assert checked.ids.max() == used
    assert torch.equal(checked.ids[tokens.mask], tokens.flat)
    narrow = replace(ids, target_rows=used)
    sample, position = (int(i) for i in ((tokens.ids == used) & tokens.mask).nonzero()[0])
    token = cache.tokens("teacher")[used]
    with pytest.raises(ModelError) as caught:
        narrow.checked(batch)
    assert str(caught.value).startswith(
        f"student: has {used} ids, and stream 'tgt' has id {used} ({token!r}) at token {position} "
        f"of corpus row {batch.rows[sample]}: "
    )
    with pytest.raises(ModelError, match="stream 'src' has id"):
        replace(ids, source_rows=4).checked(batch)
    whole = KnownIds(cache, "src", "tgt", None, None)
    assert whole.checked(batch).streams == batch.streams


def test_a_prefix_trains_and_is_scored_with_its_own_tokenizer(world, tmp_path):
    rows = len(SPECIAL) + len(world.words)
    section = make_student(tmp_path / "student", rows, world.words, added=[])
    run = tmp_path / "run"
    summary = train(make_recipe(world, {"path": section.path}), world.cache, run)
    assert summary["steps"] == 3
    assert len(AutoTokenizer.from_pretrained(run / "last")) == rows
    # Nothing but model and tokenizer is taken along.
    assert not {f.name for f in (run / "last").iterdir()} - {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert evaluate(run)["num_sentences"] == 8


def test_a_prefix_that_lacks_a_word_of_the_text_is_refused_where_it_is_read(world, tmp_path):
    words = world.words[:8]
    section = make_student(tmp_path / "student", len(SPECIAL) + 8, words, added=[])
    with pytest.raises(ModelError, match=r"student: has 11 ids, and stream 'src' has id \d+ \('"):
        train(make_recipe(world, {"path": section.path}), world.cache, tmp_path / "run")


@pytest.mark.parametrize(
    "more", [-2, 0, 3, 5, 64], ids=["prefix", "tokenizer", "between", "teacher", "padded"]
)
def test_students_of_any_width_train(more, world, tmp_path):
    rows = world.size + more
    student = {"config": {"model_type": "t5", "vocab_size": rows} | TINY}
    run = tmp_path / "run"
    summary = train(make_recipe(world, student), world.cache, run)
    assert summary["steps"] == 3
    assert summary["loss"] < 20
    model = T5ForConditionalGeneration.from_pretrained(run / "last")
    assert embedding_rows(model) == (rows, rows)
    if more >= 0:
        assert evaluate(run)["bleu"]["score"] >= 0


def test_scoring_names_an_id_that_the_model_lacks(world):
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, **TINY)).eval()
    tokenizer = load_tokenizer(world.root / "teacher")
    with pytest.raises(CorpusError, match=r"sentence 0 .* has the token id \d+; the model has 9"):
        translate(model, tokenizer, world.src[:2])
    with pytest.raises(
        CorpusError, match=r"pair 0 .* source has the token id \d+, the model has 9"
    ):
        score(model, tokenizer, world.src[:2], world.tgt[:2], torch.device("cpu"))


def test_vocabularies_of_three_byte_ids(tmp_path):
    """Words below and above id 65,536, from the dump to the scores."""
    src, tgt = make_lines(12)
    words = words_of([*src, *tgt])
    filler = [f"filler{n}" for n in range(90_000)]
    half = len(words) // 2
    path = make_world(tmp_path, [*words[:half], *filler, *words[half:]], src, tgt, extra=3, std=8.0)
    cache = open_cache(path)
    world = SimpleNamespace(root=tmp_path, cache=path)
    batch = first_batch(cache)
    src, labels = batch.streams["src"], batch.streams["tgt"]
    assert labels.flat.max() >= 1 << 16
    tokens = cache.tokens("teacher")
    rows = {int(row): n for n, row in enumerate(batch.rows)}
    first = labels.ids[rows[0]][labels.mask[rows[0]]].tolist()
    assert [tokens[i] for i in first] == [*tgt[0].split(), "</s>"]
    teacher = T5ForConditionalGeneration.from_pretrained(tmp_path / "teacher").eval()
    inputs = {"input_ids": src.ids, "attention_mask": src.mask.long()}
    with torch.no_grad():
        logits = teacher(**inputs, labels=labels.ids).logits[labels.mask]
    probs = torch.softmax(logits.double(), dim=-1)  # [N, V]
    coded = batch.signals["logits"]
    sure = (probs - 1 / 8).abs().min(dim=1).values > 1e-5  # no float noise decides
    rows_of = torch.arange(len(probs)).repeat_interleave(coded.num_exact)
    listed = torch.zeros_like(probs, dtype=torch.bool)
    listed[rows_of, coded.exact_id.long()] = True
    assert torch.equal(listed[sure], probs[sure] >= 1 / 8)
    assert coded.exact_id.max() >= 1 << 16
    assert coded.exact_id.min() < 1 << 16
    assert coded.drawn_id.max() >= 1 << 16
    student = {"config": {"model_type": "t5"} | TINY}
    run = tmp_path / "run"
    summary = train(make_recipe(world, student, max_steps=2), path, run)
    assert summary["steps"] == 2
    result = evaluate(run)
    assert result["num_sentences"] == 8
    assert result["loss_nats"] > 0


def test_a_renamed_copy_is_the_same_tokenizer(world, cache, tmp_path, caplog):
    """Saving a tokenizer again, or a student of it, changes nothing that counts."""
    section = make_student(tmp_path / "student", world.size)
    load_tokenizer(world.root / "teacher").save_pretrained(section.path)
    with caplog.at_level(logging.INFO):
        assert check_tokenizer(section, cache, "teacher")
    assert not caplog.records
    shutil.copy(world.root / "teacher" / "tokenizer.json", Path(section.path) / "tokenizer.json")
    assert check_tokenizer(section, cache, "teacher")
