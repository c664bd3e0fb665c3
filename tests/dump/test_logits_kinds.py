"""Every stored number of soft labels, at every kind of position, against transformers itself."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from kdcache import cli
from kdcache.dump.runner import dump
from kdcache.dump.signals import logits as logits_module
from kdcache.formats import plan
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.recipe import parse_recipe
from tests.dump.descriptions import SRC, TGT, corpus_at
from tests.dump.logits_oracle import (
    SIGNALS,
    Model,
    assert_labels,
    columns_of,
    labels_of,
    logits_signals,
    maskings_of,
    streams_of,
)
from tests.dump.zoo import CAUSAL, CHAT, MASKED

REPLICAS = 2
MASKS = {
    "bert": {"scheme": "bert", "probability": 0.4},
    "span": {"scheme": "span", "probability": 0.4, "span_p": 0.5},
    "segment": {"scheme": "segment"},
}
AUDITED = ("gpt2", "bert", "bart")


@pytest.fixture
def dumped(tmp_path, monkeypatch):
    """Caches of two shards or more, in parts and pieces, sound by their own account."""

    def make(directory, signals, streams=None, corpus=None, shard_tokens=70):
        size = json.loads((directory / "config.json").read_text())["vocab_size"]
        monkeypatch.setattr(plan.plan_parts, "__defaults__", (80 * size,))  # some 20 labels
        monkeypatch.setattr(logits_module, "PIECE_ENTRIES_CPU", 5 * size)
        section = {
            "teacher": {"path": str(directory), "device": "cpu"},
            "streams": streams or {"src": {"field": "src"}},
            "shard_tokens": shard_tokens,
            "batch_tokens": 50,
            "signals": {name: {"stream": "src", **signal} for name, signal in signals.items()},
        }
        tree = {"name": "t", "corpus": corpus or corpus_at(tmp_path), "dump": section}
        path = tmp_path / "cache"
        dump(parse_recipe(tree), path)
        assert verify_cache(path).faults == []
        cache = open_cache(path)
        parts = [len(cache.signal_shard("whole", n).parts) for n in range(cache.num_shards)]
        assert max(parts) > 1 < len(parts)
        return path

    return make


def assert_audited(path, capsys) -> None:
    """The commands' own verdicts, over all samples."""
    assert cli.main(["verify", str(path)]) == 0
    assert cli.main(["audit", str(path), "--fraction", "1"]) == 0
    assert capsys.readouterr().err.count("\n") == 0


def assert_every(path, places, said) -> int:
    """All three signals; the number of labels."""
    (total,) = {assert_labels(path, name, places, said) for name in SIGNALS}
    return total


@pytest.mark.parametrize("architecture", CAUSAL)
def test_every_token_of_a_document_but_the_first(architecture, zoo, dumped, capsys):
    path = dumped(zoo(architecture), logits_signals("positions"))
    model = Model(architecture, zoo(architecture))
    encoded = dict(enumerate(model.tokenizer(SRC)["input_ids"]))
    texts = streams_of(path, "src")
    assert texts == {row: ids for row, ids in encoded.items() if ids}
    total = assert_every(path, *labels_of(path, "positions", model))
    assert total == sum(map(len, texts.values())) - len(texts)
    (single,) = [row for row, ids in texts.items() if len(ids) == 1]
    assert len(columns_of(path, "whole")[single]["tokens"]["gold"]) == 0
    if architecture in AUDITED:
        assert_audited(path, capsys)


CHATS = [
    [("user", SRC[0]), ("assistant", SRC[1])],
    [("system", SRC[2]), ("user", SRC[3]), ("assistant", SRC[4]), ("user", "x")],
    [("user", "the cat")],
    [("user", "dog"), ("assistant", "")],
    [("assistant", "cat"), ("user", "the dog sees"), ("assistant", "日本 🙂")],
    [("user", "x"), ("assistant", SRC[5]), ("user", SRC[6]), ("assistant", SRC[7])],
]
#: Nothing stands before an answer, so a conversation may begin with a token that has a loss.
BARE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def chat_corpus(root):
    """Conversations in a JSONL file, as messages and as a corpus section."""
    chats = [[{"role": role, "content": text} for role, text in turns] for turns in CHATS]
    (root / "c.jsonl").write_text("".join(json.dumps({"talk": chat}) + "\n" for chat in chats))
    return chats, {"format": "jsonl", "path": str(root / "c.jsonl"), "fields": {"chat": "talk"}}


@pytest.mark.parametrize("template", ["own", "bare"])
@pytest.mark.parametrize("architecture", CHAT)
def test_what_the_assistant_wrote(architecture, template, zoo, dumped, tmp_path):
    directory = zoo(architecture)
    model = Model(architecture, directory)
    if template == "bare":
        directory = tmp_path / "bare"
        model.tokenizer.chat_template = BARE
        model.model.save_pretrained(directory)
        model.tokenizer.save_pretrained(directory)
    chats, corpus = chat_corpus(tmp_path)
    streams = {"src": {"field": "chat", "template": "chat"}}
    path = dumped(directory, logits_signals("positions"), streams, corpus, 130)
    texts, labelled, first = streams_of(path, "src"), {}, 0
    for row, chat in enumerate(chats):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        encoded = tokenizer.apply_chat_template(chat, **options)
        assert texts[row] == encoded["input_ids"]
        mask = encoded["assistant_masks"]
        labelled[row] = [j for j, wrote in enumerate(mask) if wrote and j > 0]
        first += mask[0]
    assert first == (template == "bare")
    places = {row: [[(j, texts[row][j]) for j in where]] for row, where in labelled.items()}
    said = {row: model.next_tokens(texts[row], where) for row, where in labelled.items()}
    assert 0 < assert_every(path, places, said) < 0.8 * sum(map(len, texts.values()))
    assert not labelled[2]


def assert_masks_matter(path) -> None:
    """Replicas differ; masked, replaced and kept tokens are all among them."""
    every = [one for replicas in maskings_of(path, "masks").values() for one in replicas]
    mask_id = open_cache(path).signal("masks").mask_id
    stands = [(m.truth[p], m.reading[p]) for m in every for p in m.positions]
    kinds = {"masked" if to == mask_id else "kept" if to == of else "other" for of, to in stands}
    assert kinds == {"masked", "kept", "other"}
    differ = [a.reading != b.reading for a, b in zip(every[::2], every[1::2], strict=True)]
    assert sum(differ) > len(differ) / 2
    assert min(len(m.positions) for m in every) == 0
    assert any(np.diff(m.positions).max(initial=0) > 1 for m in every)


@pytest.mark.parametrize("scheme", ["bert", "span"])
@pytest.mark.parametrize("architecture", MASKED)
def test_masked_tokens(architecture, scheme, zoo, dumped, capsys):
    masks = {"kind": "masks", "replicas": REPLICAS, **MASKS[scheme]}
    signals = {"masks": masks, **logits_signals("masked", masks="masks")}
    path = dumped(zoo(architecture), signals)
    places, said = labels_of(path, "masked", Model(architecture, zoo(architecture)))
    assert sorted(places) == list(range(len(SRC)))
    assert assert_every(path, places, said) > 30
    if scheme == "bert":
        assert_masks_matter(path)
        if architecture in AUDITED:
            assert_audited(path, capsys)


def test_masked_tokens_of_a_pair(zoo, dumped):
    masks = {"kind": "masks", "replicas": REPLICAS, **MASKS["bert"]}
    signals = {"masks": masks, **logits_signals("masked", masks="masks")}
    streams = {"src": {"field": "src", "pair": "tgt"}}
    path = dumped(zoo("bert"), signals, streams)
    model = Model("bert", zoo("bert"))

    def types(row):
        pair = [TGT[row]] if TGT[row] else []
        return model.tokenizer(SRC[row], *pair)["token_type_ids"]

    places, said = labels_of(path, "masked", model, types)
    assert assert_every(path, places, said) > 30
    assert np.abs(labels_of(path, "masked", model)[1][0] - said[0]).max() > 0.1


@pytest.mark.parametrize("scheme", ["segment", "span"])
@pytest.mark.parametrize(
    ("architecture", "at"),
    [
        ("bart", "segment"),
        ("mbart", "segment"),
        ("bart", "segment_in_place"),
        ("mbart", "segment_in_place"),
    ],
)
def test_a_masked_segment(architecture, at, scheme, zoo, dumped, capsys):
    masks = {"kind": "masks", "replicas": REPLICAS, **MASKS[scheme]}
    signals = {"masks": masks, **logits_signals(at, masks="masks")}
    path = dumped(zoo(architecture), signals)
    places, said = labels_of(path, at, Model(architecture, zoo(architecture)))
    assert assert_every(path, places, said) > 30
    if scheme == "segment":
        every = [one for e in maskings_of(path, "masks").values() for one in e]
        assert all(np.diff(m.positions).max(initial=1) == 1 for m in every)
        assert min(len(m.segment) for m in every) == 0
        if architecture in AUDITED:
            assert_audited(path, capsys)


@pytest.mark.parametrize("line", ["the dog sees the cat", None], ids=["one has", "none has"])
@pytest.mark.parametrize("at", ["positions", "masked", "segment"])
def test_texts_without_labels(at, line, zoo, tmp_path, capsys):
    """Shards, or a whole cache, of one-token documents or of texts that nothing can mask."""
    architecture, nothing = {"positions": ("gpt2", "a"), "masked": ("bert", "")}.get(
        at, ("bart", "")
    )
    lines = [nothing, nothing, nothing if line is None else line, nothing]
    (tmp_path / "src").write_text("".join(line + "\n" for line in lines))
    signals = {} if at == "positions" else {"masks": {"kind": "masks", "replicas": REPLICAS}}
    signals |= logits_signals(at, **({"masks": "masks"} if signals else {}))
    section = {
        "teacher": {"path": str(zoo(architecture)), "device": "cpu"},
        "streams": {"src": {"field": "src"}},
        "shard_tokens": 2,
        "signals": {name: {"stream": "src", **signal} for name, signal in signals.items()},
    }
    corpus = {"fields": {"src": str(tmp_path / "src")}, "empty": "keep"}
    path = tmp_path / "cache"
    dump(parse_recipe({"name": "t", "corpus": corpus, "dump": section}), path)
    cache = open_cache(path)
    counts = [cache.commit_record("whole", n).tokens for n in range(cache.num_shards)]
    assert len(counts) > 1
    assert sum(map(bool, counts)) == (line is not None)
    model = Model(architecture, zoo(architecture))
    assert assert_every(path, *labels_of(path, at, model)) == sum(counts)
    assert_audited(path, capsys)
    assert cli.main(["inspect", str(path)]) == 0
