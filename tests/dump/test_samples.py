"""Samples of pairs, chats and tasks, from corpus files to a cache and back."""

import json
import struct

import numpy as np
import pytest
import xxhash
from transformers import AutoTokenizer

from kdcache.dump.runner import dump
from kdcache.errors import CorpusError, IdentityError, ModelError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.schema import join_ids
from kdcache.recipe import parse_recipe
from tests.dump.test_tokenize_pairs import large_tokenizer
from tests.dump.world import make_lines, rows_of, tree
from tests.dump.zoo import TOKENIZERS

SRC, TGT = make_lines(30)
WORDS = sorted({word for line in [*SRC, *TGT] for word in line.split()})
POLAR = [(text, str(n % 2)) for n, text in enumerate(SRC[:9])]
ENTAIL = [(a, b, "yes" if n % 3 else "no") for n, (a, b) in enumerate(zip(SRC, TGT, strict=True))]
CHATS = [
    [
        {"role": role, "content": SRC[(n + i) % 30]}
        for i, role in enumerate(["user", "assistant"] * (1 + n % 2))
    ]
    for n in range(12)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Corpus files, and tokenizers by family."""
    root = tmp_path_factory.mktemp("samples")
    for name in ("bert", "llama", "gpt2", "qwen2"):
        TOKENIZERS[name](WORDS).save_pretrained(root / name)
    write_tsv(root / "polar.tsv", ("text", "label"), POLAR)
    write_tsv(root / "entail.tsv", ("text", "pair", "label"), ENTAIL)
    lines = [json.dumps({"messages": chat}) for chat in CHATS]
    (root / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_tsv(path, header, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))


def recipe(root, corpus, streams, tokenizer="bert", **section):
    return parse_recipe(
        {
            "name": "test",
            "corpus": corpus,
            "dump": {
                "shard_tokens": 120,
                "tokenizers": {"own": {"kind": "pretrained", "path": str(root / tokenizer)}},
                "streams": {
                    name: {"tokenizer": "own", **stream} for name, stream in streams.items()
                },
                **section,
            },
        }
    )


def task_corpus(root, **changes):
    fields = {"text": "text", "label": "label"}
    tasks = {
        "polar": {"format": "tsv", "path": str(root / "polar.tsv"), "fields": fields},
        "entail": {
            "format": "tsv",
            "path": str(root / "entail.tsv"),
            "fields": {**fields, "pair": "pair"},
        },
    }
    return {"tasks": tasks, "label": "label", **changes}


PAIR = {"text": {"field": "text", "pair": "pair"}}


def tasks_recipe(root, streams=PAIR, tokenizer="bert", **changes):
    return recipe(root, task_corpus(root, **changes), streams, tokenizer)


def chat_recipe(root, tokenizer="llama", **stream):
    corpus = {
        "format": "jsonl",
        "path": str(root / "chat.jsonl"),
        "fields": {"chat": "messages"},
    }
    return recipe(
        root, corpus, {"text": {"field": "chat", "template": "chat", **stream}}, tokenizer
    )


def stored(cache, stream):
    """Every field of a stream, sample by sample."""
    out = []
    for shard in range(cache.num_shards):
        column = cache.samples(shard).streams[stream]
        fields = {"id": join_ids(column.fields)}
        fields |= {k: v for k, v in column.fields.items() if k not in ("id", "id_high")}
        for begin, end in zip(column.offsets, column.offsets[1:], strict=False):
            out.append({name: values[begin:end].tolist() for name, values in fields.items()})
    return out


def texts_of(cache, field):
    return [t for n in range(cache.num_shards) for t in cache.samples(n).text(field).to_pylist()]


def ids_of(cache):
    return [row.tobytes() for n in range(cache.num_shards) for row in cache.samples(n).sample_id]


def expected_id(fields, task="", label=""):
    """A sample's id as docs/format.md says it is."""
    joined = b""
    for text in (*fields, task, label):
        joined += struct.pack("<Q", len(text.encode())) + text.encode()
    return xxhash.xxh3_128_digest(joined)


def expected_digest(tokenizer_digest, samples, extra):
    """A stream's digest as docs/format.md says it is."""

    def digest(values, dtype):
        return xxhash.xxh3_128_digest(np.array(values, dtype=dtype).tobytes())

    joined = tokenizer_digest.encode()
    joined += digest([len(s["id"]) for s in samples], "<i8")
    joined += digest([i for s in samples for i in s["id"]], "<i4")
    if extra is not None:
        joined += extra.encode() + digest([v for s in samples for v in s[extra]], "u1")
    return xxhash.xxh3_128_hexdigest(joined)


def check_stream(cache, stream, extra):
    samples, record = stored(cache, stream), cache.stream(stream)
    tokenizer = cache.tokenizer(record.tokenizer)
    assert record.digest == expected_digest(tokenizer.digest, samples, extra)
    assert record.num_tokens == sum(len(sample["id"]) for sample in samples)
    assert verify_cache(cache.path).faults == []


def test_tasks_with_pairs_and_labels(root, tmp_path):
    dump(tasks_recipe(root), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.num_shards > 2
    corpus = cache.manifest.corpus
    assert (corpus.fields, corpus.tasks) == (["text", "label", "pair"], ["polar", "entail"])
    assert (corpus.label, corpus.num_samples) == ("label", 39)
    record = cache.stream("text")
    assert (record.field, record.pair, record.template) == ("text", "pair", "none")
    backend = AutoTokenizer.from_pretrained(root / "bert")
    expected = [backend(text) for text, _ in POLAR] + [backend(a, b) for a, b, _ in ENTAIL]
    assert stored(cache, "text") == [
        {"id": e["input_ids"], "segment": e["token_type_ids"]} for e in expected
    ]
    shards = [cache.samples(n) for n in range(cache.num_shards)]
    index = np.concatenate([shard.task_index(corpus.tasks) for shard in shards])
    assert index.dtype == np.int64
    assert index.tolist() == [0] * 9 + [1] * 30
    names = [name for shard in shards for name in shard.tasks().to_pylist()]
    assert names == [corpus.tasks[i] for i in index]
    assert rows_of(cache.path) == list(range(39))
    assert texts_of(cache, "pair") == [""] * 9 + [pair for _, pair, _ in ENTAIL]
    assert ids_of(cache) == [
        *(expected_id((text, label, ""), "polar", label) for text, label in POLAR),
        *(expected_id((a, label, b), "entail", label) for a, b, label in ENTAIL),
    ]
    check_stream(cache, "text", "segment")


def test_the_manifest_has_what_masking_needs(root, tmp_path):
    dump(tasks_recipe(root), tmp_path / "cache")
    record = open_cache(tmp_path / "cache").tokenizer("own")
    backend = AutoTokenizer.from_pretrained(root / "bert")
    assert record.mask_id == backend.mask_token_id
    assert record.special_ids == sorted(backend.all_special_ids)


def test_a_corpus_without_tasks_names_none(root, tmp_path):
    corpus = task_corpus(root)["tasks"]["entail"]
    dump(recipe(root, corpus, {"text": {"field": "text"}}), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert (cache.manifest.corpus.tasks, cache.manifest.corpus.label) == ([], None)
    shard = cache.samples(0)
    assert shard.tasks() is None
    assert shard.task_index([]).tolist() == [0] * len(shard.row)
    assert "task" not in cache.samples_schema.names
    assert ids_of(cache) == [expected_id((a, label, b)) for a, b, label in ENTAIL]
    check_stream(cache, "text", None)


def test_the_task_and_the_label_are_in_the_sample_id(root, tmp_path):
    corpus = task_corpus(root)["tasks"]["polar"]
    for number, label in enumerate(["label", None]):
        given = recipe(root, {**corpus, "label": label}, {"text": {"field": "text"}})
        dump(given, tmp_path / str(number))
    labelled, plain = (ids_of(open_cache(tmp_path / n)) for n in ("0", "1"))
    assert labelled == [expected_id((text, label), "", label) for text, label in POLAR]
    assert not set(labelled) & set(plain)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_chats(name, root, tmp_path):
    dump(chat_recipe(root, name), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    backend = AutoTokenizer.from_pretrained(root / name)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected = [backend.apply_chat_template(chat, **options) for chat in CHATS]
    found = stored(cache, "text")
    assert found == [{"id": e["input_ids"], "loss": e["assistant_masks"]} for e in expected]
    assert all(0 < sum(sample["loss"]) < len(sample["loss"]) for sample in found)
    assert [json.loads(text) for text in texts_of(cache, "chat")] == CHATS
    assert cache.stream("text").template == "chat"
    check_stream(cache, "text", "loss")


def test_ids_of_three_bytes_with_a_loss(tmp_path):
    backend = large_tokenizer(70_000)
    backend.add_tokens(["<left>"])
    backend.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    backend.save_pretrained(tmp_path / "large")
    turns = [("user", "w1 w69999"), ("assistant", "<left> w65534"), ("user", "w65533")]
    chat = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    dump(chat_recipe(tmp_path, "large"), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert stored(cache, "text") == [
        {"id": [3, 70_001, 70_002, 65_536, 65_535], "loss": [0, 0, 1, 1, 0]}
    ]
    assert set(cache.samples(0).streams["text"].fields) == {"id", "id_high", "loss"}
    assert cache.stream("text").vocab_size == 70_003
    check_stream(cache, "text", "loss")


def test_a_changed_loss_or_segment_is_another_stream(root, tmp_path):
    dump(tasks_recipe(root), tmp_path / "pair")
    dump(tasks_recipe(root, streams={"text": {"field": "text"}}), tmp_path / "plain")
    pair, plain = (open_cache(tmp_path / n).stream("text").digest for n in ("pair", "plain"))
    assert pair != plain
    cache = open_cache(tmp_path / "pair")
    samples = stored(cache, "text")
    digest = cache.tokenizer("own").digest
    assert expected_digest(digest, samples, "segment") == pair
    samples[-1]["segment"][-1] = 0
    assert expected_digest(digest, samples, "segment") != pair


def test_the_same_recipe_gives_the_same_bytes_and_stands(root, tmp_path):
    for given in (tasks_recipe(root), chat_recipe(root)):
        name = given.dump.streams["text"].template
        dump(given, tmp_path / f"{name}.a")
        dump(given, tmp_path / f"{name}.b")
        before = tree(tmp_path / f"{name}.a")
        assert before == tree(tmp_path / f"{name}.b")
        dump(given, tmp_path / f"{name}.a")
        assert tree(tmp_path / f"{name}.a") == before


def test_files_may_move(root, tmp_path):
    dump(tasks_recipe(root), tmp_path / "cache")
    for name in ("polar.tsv", "entail.tsv", "bert"):
        (tmp_path / name).symlink_to(root / name)
    lines = [json.dumps({"a": text, "b": label}) for text, label in POLAR]
    (tmp_path / "polar.jsonl").write_text("\n".join(lines))
    moved = task_corpus(tmp_path)
    moved["tasks"]["polar"] = {
        "format": "jsonl",
        "path": str(tmp_path / "polar.jsonl"),
        "fields": {"text": "a", "label": "b"},
    }
    dump(recipe(tmp_path, moved, PAIR), tmp_path / "cache")


def without_pair(root):
    corpus = task_corpus(root)
    del corpus["tasks"]["entail"]["fields"]["pair"]
    corpus["tasks"]["polar"]["fields"]["pair"] = "text"
    return recipe(root, corpus, PAIR)


def reversed_tasks(root):
    corpus = task_corpus(root)
    corpus["tasks"] = dict(reversed(corpus["tasks"].items()))
    corpus["tasks"]["entail"]["fields"] = {"text": "text", "label": "label", "pair": "pair"}
    return recipe(root, corpus, PAIR)


def one_task(root):
    corpus = task_corpus(root)
    del corpus["tasks"]["polar"]
    return recipe(root, corpus, PAIR)


def limited(root):
    corpus = task_corpus(root)
    corpus["tasks"]["entail"]["limit"] = 7
    return recipe(root, corpus, PAIR)


REFUSED = {
    "pair": (
        lambda root: tasks_recipe(root, streams={"text": {"field": "text"}}),
        "dump.streams.text.pair: 'pair' in the cache, None given",
    ),
    "template": (
        lambda root: tasks_recipe(
            root, streams={"text": {"field": "text", "template": "chat"}}, tokenizer="llama"
        ),
        "dump.streams.text.pair: 'pair' .*; dump.streams.text.template: 'none' in the cache, "
        "'chat' given",
    ),
    "another stream": (
        lambda root: tasks_recipe(root, streams={**PAIR, "more": {"field": "text"}}),
        "dump.streams.more.field: absent in the cache, 'text' given",
    ),
    "label": (
        lambda root: tasks_recipe(root, label=None),
        "corpus.label: 'label' in the cache, None given",
    ),
    "order of tasks": (
        reversed_tasks,
        r"corpus.tasks: \['polar', 'entail'\] in the cache, \['entail', 'polar'\] given",
    ),
    "fewer tasks": (
        one_task,
        r"corpus.tasks: \['polar', 'entail'\] in the cache, \['entail'\] given",
    ),
    "limit": (limited, "corpus.tasks.entail.limit: None in the cache, 7 given"),
    "fields of tasks": (without_pair, "another corpus: digest: .* in the cache, .* given"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_another_recipe_is_refused(change, root, tmp_path):
    make, message = REFUSED[change]
    dump(tasks_recipe(root), tmp_path / "cache")
    before = tree(tmp_path / "cache")
    with pytest.raises(IdentityError, match=message) as error:
        dump(make(root), tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert tree(tmp_path / "cache") == before


def test_another_label_text_is_refused(root, tmp_path):
    dump(tasks_recipe(root), tmp_path / "cache")
    changed = [(text, "2" if n == 8 else label) for n, (text, label) in enumerate(POLAR)]
    write_tsv(tmp_path / "polar.tsv", ("text", "label"), changed)
    corpus = task_corpus(root)
    corpus["tasks"]["polar"]["path"] = str(tmp_path / "polar.tsv")
    with pytest.raises(IdentityError, match="another corpus: digest"):
        dump(recipe(root, corpus, PAIR), tmp_path / "cache")


def chat_file(root, tmp_path, *values):
    lines = [json.dumps({"messages": value}) for value in values]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "llama").symlink_to(root / "llama")
    return chat_recipe(tmp_path)


def two_chat_tasks(root, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"messages": "hello"}\n')
    chat = {"format": "jsonl", "fields": {"chat": "messages"}}
    corpus = {
        "tasks": {
            "good": {**chat, "path": str(root / "chat.jsonl")},
            "bad": {**chat, "path": str(tmp_path / "x.jsonl")},
        }
    }
    return recipe(root, corpus, {"text": {"field": "chat", "template": "chat"}}, "llama")


FAULTS = {
    "no chat template": (
        lambda root, tmp: chat_recipe(root, "gpt2"),
        ModelError,
        "gpt2: its tokenizer has no chat template",
    ),
    "trained tokenizer": (
        lambda root, tmp: chat_recipe(root).model_copy(
            update={
                "dump": parse_recipe(
                    {
                        "name": "x",
                        "dump": {
                            "tokenizers": {"own": {"kind": "sentencepiece", "fields": ["chat"]}},
                            "streams": {
                                "text": {"field": "chat", "tokenizer": "own", "template": "chat"}
                            },
                        },
                    }
                ).dump
            }
        ),
        ModelError,
        "dump.streams.text: tokenizer 'own' is trained on the corpus and has no chat template",
    ),
    "pair field": (
        lambda root, tmp: tasks_recipe(root, streams={"text": {"field": "text", "pair": "x"}}),
        RecipeError,
        r"dump.streams.text.pair is 'x'; corpus.fields has \['label', 'pair', 'text'\]",
    ),
    "not messages": (
        lambda root, tmp: chat_file(root, tmp, CHATS[0], "hello"),
        CorpusError,
        r"^row 1 \(from 0\), field 'chat': no messages: it is not the JSON of messages",
    ),
    "not messages of a task": (
        two_chat_tasks,
        CorpusError,
        r"^row 0 \(from 0\) of task 'bad', field 'chat': no messages",
    ),
    "no tokens for a task": (
        lambda root, tmp: tasks_recipe(root, streams={"b": {"field": "pair"}}, tokenizer="gpt2"),
        CorpusError,
        "task 'polar' has no field 'pair', so stream 'b' would have no tokens there",
    ),
    "too long": (
        lambda root, tmp: recipe(root, task_corpus(root), PAIR, max_tokens=16, too_long="error"),
        CorpusError,
        r"^row 2 \(from 0\) of task 'entail': stream 'text' has \d+ tokens, at most 16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_clear_line(fault, root, tmp_path):
    make, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message) as error:
        dump(make(root, tmp_path), tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.parametrize("other", [{"pair": "pair"}, {"target": True}])
def test_a_chat_template_stands_alone(other, root):
    with pytest.raises(RecipeError, match="leave out pair and target"):
        chat_recipe(root, **other)
