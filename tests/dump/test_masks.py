"""The masks signal through a dump, against masking called directly."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from kdcache.dump.runner import dump
from kdcache.errors import IdentityError, ModelError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.masks import masked_stream, masked_tokens
from kdcache.formats.ragged import Ragged, concat, offsets_of
from kdcache.recipe import parse_recipe
from kdcache.recipe.signals import MasksSignal
from kdcache.text.masking import MaskVocabulary, draw_masks, scheme_of
from tests.dump.world import tree

SCHEMES = ["bert", "whole_word", "span", "segment", "word"]


@pytest.fixture
def recipe_of(world, zoo):
    """Recipes over `src` with masks signals and no teacher; `zoo` architecture's tokenizer."""

    def make(signals: dict, architecture: str = "bert", seed: int = 1, **dump):
        path = str(zoo(architecture)) if architecture != "marian" else str(world.root / "marian")
        return parse_recipe(
            {
                "name": "masks",
                "corpus": {"fields": {"src": str(world.root / "src")}},
                "dump": {
                    "shard_tokens": 200,
                    "batch_tokens": 60,
                    "seed": seed,
                    "tokenizers": {"plm": {"kind": "pretrained", "path": path}},
                    "streams": {"text": {"field": "src", "tokenizer": "plm"}},
                    "signals": {
                        name: {"kind": "masks", "stream": "text", **signal}
                        for name, signal in signals.items()
                    },
                    **dump,
                },
            }
        )

    return make


def columns_of(cache, name: str) -> dict[str, Ragged]:
    """A signal's columns over all shards."""
    parts = [
        columns
        for shard in range(cache.num_shards)
        for _, _, columns in cache.signal_shard(name, shard).parts
    ]
    return {column: concat([part[column] for part in parts]) for column in parts[0]}


def assert_same(a: dict[str, Ragged], b: dict[str, Ragged]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].offsets.tolist() == b[name].offsets.tolist()
        for field, values in a[name].fields.items():
            assert values.dtype == b[name].fields[field].dtype
            assert values.tolist() == b[name].fields[field].tolist()


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_a_dump_has_the_masks_of_masking(architecture, world, zoo, recipe_of, tmp_path) -> None:
    signals = {scheme: {"scheme": scheme, "replicas": 2} for scheme in SCHEMES}
    dump(recipe_of(signals, architecture), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.num_shards > 2
    tokenizer = AutoTokenizer.from_pretrained(zoo(architecture))
    ids = tokenizer(world.src)["input_ids"]
    lengths = np.array([len(sample) for sample in ids])
    stream = Ragged(offsets_of(lengths), {"id": np.concatenate(ids)})
    size = len(tokenizer)
    vocabulary = MaskVocabulary.of(
        tokenizer.convert_ids_to_tokens(range(size)),
        tokenizer.all_special_ids,
        tokenizer.mask_token_id,
        "",
    )
    shards = [cache.samples(shard) for shard in range(cache.num_shards)]
    sample_ids = np.concatenate([shard.sample_id for shard in shards])
    rows = np.concatenate([shard.row for shard in shards])
    for scheme in SCHEMES:
        how = scheme_of(MasksSignal(kind="masks", scheme=scheme))
        expected = draw_masks(stream, sample_ids, rows, vocabulary, how, 2, 1)
        found = columns_of(cache, scheme)
        assert_same(found, expected)
        record = cache.signal(scheme)
        assert (record.scheme, record.replicas) == (scheme, 2)
        assert (record.mask_id, record.vocab_size) == (tokenizer.mask_token_id, size)
        assert record.teacher is None
        commits = [cache.commit_record(scheme, shard) for shard in range(cache.num_shards)]
        assert sum(commit.tokens for commit in commits) == 2 * len(world.src)
        assert sum(commit.entries["masked"] for commit in commits) == len(
            found["masked"].fields["position"]
        )


def test_words_of_a_dump_are_the_tokenizers_own(world, zoo, recipe_of, tmp_path) -> None:
    dump(recipe_of({"masks": {"scheme": "word", "probability": 0.4}}), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    masks = columns_of(cache, "masks")
    tokenizer = AutoTokenizer.from_pretrained(zoo("bert"))
    encoded = tokenizer(world.src)
    sample = np.arange(len(world.src))
    positions = masked_tokens(masks, sample, np.zeros_like(sample))
    words_of_two = 0
    for m in sample.tolist():
        begin, end = positions.offsets[m : m + 2]
        masked = set(positions.fields["position"][begin:end].tolist())
        words = encoded.word_ids(m)
        for word in {word for word in words if word is not None}:
            pieces = {i for i, of in enumerate(words) if of == word}
            assert pieces <= masked or not pieces & masked
            words_of_two += len(pieces) > 1 and pieces <= masked
    assert words_of_two > 5
    stream = concat([cache.samples(n).streams["text"] for n in range(cache.num_shards)])
    text = masked_stream(stream, masks, sample, np.zeros_like(sample)).fields["id"]
    assert (text == tokenizer.mask_token_id).sum() == len(positions.fields["id"])


def test_masks_do_not_depend_on_name_shards_or_batches(recipe_of, tmp_path) -> None:
    span = {"scheme": "span", "replicas": 3}
    dump(recipe_of({"one": span, "two": span}), tmp_path / "a")
    dump(recipe_of({"one": span}, shard_tokens=90, batch_tokens=7), tmp_path / "b")
    dump(recipe_of({"one": span}, seed=2), tmp_path / "c")
    a, b, c = (open_cache(tmp_path / name) for name in "abc")
    assert a.num_shards < b.num_shards
    assert_same(columns_of(a, "one"), columns_of(a, "two"))
    assert_same(columns_of(a, "one"), columns_of(b, "one"))
    with pytest.raises(AssertionError):
        assert_same(columns_of(a, "one"), columns_of(c, "one"))


def test_masks_added_later_leave_the_old_bytes_and_are_the_same(recipe_of, tmp_path) -> None:
    bert, word = {"bert": {"scheme": "bert"}}, {"word": {"scheme": "word", "replicas": 4}}
    dump(recipe_of(bert), tmp_path / "later")
    before = tree(tmp_path / "later")
    dump(recipe_of(word), tmp_path / "later")
    after = tree(tmp_path / "later")
    assert {name: after[name] for name in before} == before
    dump(recipe_of({**bert, **word}), tmp_path / "at_once")
    assert tree(tmp_path / "at_once") == after
    with pytest.raises(IdentityError, match="probability"):
        dump(
            recipe_of({"word": {"scheme": "word", "replicas": 4, "probability": 0.2}}),
            tmp_path / "later",
        )


@pytest.mark.parametrize("trained", [False, True], ids=["pretrained", "trained"])
def test_a_tokenizer_without_a_mask_token_is_refused(trained, world, recipe_of, tmp_path) -> None:
    more = {}
    if trained:
        more["tokenizers"] = {"plm": {"kind": "sentencepiece", "vocab_size": 36, "fields": ["src"]}}
    with pytest.raises(ModelError) as error:
        dump(recipe_of({"masks": {}}, "marian", **more), tmp_path / "cache")
    where = "trained on the corpus" if trained else str(world.root / "marian")
    assert str(error.value) == (
        f"signals.masks: the tokenizer 'plm' ({where}) of stream 'text' has no mask token; masks "
        "need one: use the tokenizer of a masked model (BERT, RoBERTa, BART), train one with "
        "`mask: true`, or leave the signal out"
    )
    assert not (tmp_path / "cache").exists()


def test_a_dump_of_masks_verifies(recipe_of, tmp_path) -> None:
    signals = {scheme: {"scheme": scheme, "replicas": 2} for scheme in SCHEMES}
    dump(recipe_of(signals), tmp_path / "cache")
    assert verify_cache(tmp_path / "cache").faults == []
