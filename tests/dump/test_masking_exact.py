"""Masking token for token: always the same, and that of one sample at a time."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import kdcache.text.masking as masking
from kdcache.errors import FormatError, ModelError
from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.text.mask_choice import Scheme
from kdcache.text.masking import MaskVocabulary
from tests.dump.masking_data import (
    CLS,
    MASK,
    PAD,
    SCHEMES,
    SEP,
    SPECIAL,
    UNK,
    WORDPIECE,
    corpus,
    draw,
    scheme,
    vocabulary,
)
from tests.dump.masking_oracle import Draws, mask_sample

#: Digests of `example`; a change of them changes the masks of every cache that is extended.
GOLDEN = {
    "bert": "752e9c1a5caa1124a05c809a273824e4",
    "whole_word": "2b7f8b874e3cc7285617f28927b4b114",
    "span": "422479899ed5b212f1fdc752585fcd83",
    "segment": "da5ce9cff809f50582616991f3b3e3d8",
    "word": "e5a0f5c5e8a94b34dc187abd8e3a299b",
}


def digest(columns) -> str:
    hasher = xxhash.xxh3_128()
    for name in sorted(columns):
        hasher.update(columns[name].offsets.astype("<i8").tobytes())
        for field, values in sorted(columns[name].fields.items()):
            hasher.update(field.encode() + values.tobytes())
    return hasher.hexdigest()


def example(name: str, replicas: int = 3) -> dict[str, Ragged]:
    data = corpus(np.tile(np.arange(0, 40), 5), seed=8)
    return draw(data, scheme(name), replicas=replicas, seed=11).columns


@pytest.mark.parametrize("name", SCHEMES)
def test_masks_are_the_same_for_ever(name: str) -> None:
    assert digest(example(name)) == GOLDEN[name]


@pytest.mark.parametrize("hash_seed", ["0", "77"])
def test_masks_are_the_same_in_another_process(hash_seed: str) -> None:
    code = (
        "import json; from tests.dump.test_masking_exact import SCHEMES, digest, example\n"
        "print(json.dumps({name: digest(example(name)) for name in SCHEMES}))"
    )
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert json.loads(done.stdout) == {name: digest(example(name)) for name in SCHEMES}


@pytest.mark.parametrize("name", SCHEMES)
def test_masks_do_not_depend_on_the_order_or_the_pieces_of_samples(name, monkeypatch) -> None:
    data = corpus(np.random.default_rng(1).integers(0, 40, 300), seed=3)
    whole = draw(data, scheme(name), replicas=2).columns
    order = np.random.default_rng(2).permutation(300)
    turned = SimpleNamespace(
        stream=data.stream.take(order),
        sample_ids=data.sample_ids[order],
        rows=data.rows[order],
    )
    monkeypatch.setattr(masking, "PIECE_TOKENS", 100)
    permuted = draw(turned, scheme(name), replicas=2).columns
    expected = {column: whole[column].take(order) for column in whole}
    assert digest(permuted) == digest(expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_more_replicas_keep_the_first(name: str) -> None:
    few, many = example(name, replicas=1), example(name, replicas=4)
    counts = many["replicas"].fields["num_masked"].reshape(-1, 4)
    assert counts[:, 0].tolist() == few["replicas"].fields["num_masked"].tolist()
    mine = segment_indices(many["masked"].offsets[:-1], counts[:, 0].astype(int))
    for field, values in many["masked"].fields.items():
        assert values[mine].tolist() == few["masked"].fields[field].tolist()


@st.composite
def small_streams(draw):
    """Some samples of words, pieces and special tokens anywhere."""
    size = st.integers(0, len(SPECIAL) + 10)
    samples = draw(st.lists(st.lists(size, max_size=14), max_size=5))
    offsets = offsets_of(np.array([len(ids) for ids in samples], dtype=np.int64))
    return Ragged(offsets, {"id": np.array([i for ids in samples for i in ids], dtype=np.int64)})


@st.composite
def schemes(draw):
    mask_share = draw(st.floats(0, 1))
    return scheme(
        draw(st.sampled_from(SCHEMES)),
        probability=draw(st.none() | st.floats(0.01, 1)),
        mask_share=mask_share,
        random_share=draw(st.floats(0, 1)) * (1 - mask_share),
        span_p=draw(st.floats(0.05, 1)),
        span_max=draw(st.integers(1, 12)),
    )


def ending_vocabulary() -> MaskVocabulary:
    tokens = [*SPECIAL, *(f"w{i}</w>" for i in range(4)), *(f"p{i}" for i in range(5)), "", "x"]
    return MaskVocabulary.of(tokens, list(range(5)), MASK, "the tokenizer")


@given(small_streams(), schemes(), st.integers(1, 3), st.integers(0, 99), st.booleans())
@settings(max_examples=200, deadline=None)
def test_masks_are_those_of_one_sample_at_a_time(stream, how, replicas, seed, ends) -> None:
    voc = ending_vocabulary() if ends else vocabulary(whole=6, pieces=5, unnamed=0)
    rng = np.random.default_rng(seed)
    data = SimpleNamespace(
        stream=stream,
        sample_ids=rng.integers(0, 256, (len(stream), 16)).astype(np.uint8),
        rows=rng.integers(0, 1000, len(stream)),
    )
    assert_oracle(data, how, voc, replicas, seed)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("probability", [0.15, 0.6])
def test_long_masks_are_those_of_one_sample_at_a_time(name: str, probability: float) -> None:
    data = corpus(np.full(40, 80))
    ids = data.stream.fields["id"]
    ids[np.random.default_rng(1).random(len(ids)) < 0.04] = SEP
    assert_oracle(data, scheme(name, probability=probability), WORDPIECE, 2, 3)


def assert_oracle(data, how: Scheme, voc: MaskVocabulary, replicas: int, seed: int) -> None:
    """Masks are the oracle's: inside the sample, ascending, no special tokens."""
    out = draw(data, how, voc, replicas, seed)
    stream, at = data.stream, 0
    assert len(out.counts) == len(stream)
    for m in range(len(stream)):
        own = stream.fields["id"][stream.offsets[m] : stream.offsets[m + 1]].tolist()
        for replica in range(replicas):
            draws = Draws(seed, data.sample_ids[m], int(data.rows[m]), replica)
            here = slice(at, at + out.counts[m, replica])
            at = here.stop
            position = out.position[here]
            assert list(zip(position.tolist(), out.id[here].tolist(), strict=True)) == mask_sample(
                own, how, draws, voc
            )
            assert (np.diff(position) > 0).all()
            assert all(0 <= p < len(own) and own[p] >= len(SPECIAL) for p in position)
    assert at == len(out.id)
    assert not voc.special[out.id[out.id != MASK]].any()


@pytest.mark.parametrize("name", SCHEMES)
def test_samples_without_a_token_to_mask_have_no_masks(name: str) -> None:
    ids = np.array([CLS, SEP, CLS, UNK, SEP, 9, PAD])
    stream = Ragged(np.array([0, 0, 2, 5, 7]), {"id": ids})
    data = SimpleNamespace(stream=stream, sample_ids=np.zeros((4, 16), np.uint8), rows=np.arange(4))
    out = draw(data, scheme(name, probability=1.0), replicas=2)
    assert out.counts.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    assert out.position.tolist() == [0, 0]
    assert out.columns["masked"].offsets.tolist() == [0, 0, 0, 0, 2]


@pytest.mark.parametrize("name", ["bert", "whole_word", "span", "segment"])
def test_one_token_samples_are_masked_whole(name: str) -> None:
    out = draw(corpus(np.ones(50, dtype=int)), scheme(name, probability=0.01))
    assert out.counts.tolist() == [[1]] * 50


def test_a_word_longer_than_the_budget_is_masked_whole_where_there_is_no_other() -> None:
    ids = np.array([CLS, 9, 205, 206, 207, 10, 208, 209, SEP])  # words of 4 and 3 pieces
    stream = Ragged(np.array([0, 9]), {"id": ids})
    for name in ("whole_word", "span"):
        found = set()
        for row in range(40):
            data = SimpleNamespace(
                stream=stream, sample_ids=np.zeros((1, 16), np.uint8), rows=np.array([row])
            )
            found.add(tuple(draw(data, scheme(name)).position.tolist()))
        assert found == {(1, 2, 3, 4), (5, 6, 7)}


def test_figures_of_the_papers_are_the_defaults() -> None:
    shares = {name: scheme(name) for name in SCHEMES}
    assert {name: how.probability for name, how in shares.items()} == {
        "bert": 0.15,
        "whole_word": 0.15,
        "span": 0.15,
        "segment": 0.5,
        "word": 0.1,
    }
    assert {(how.mask_share, how.random_share) for how in shares.values()} == {(0.8, 0.1), (1, 0)}
    assert (shares["word"].mask_share, shares["segment"].mask_share) == (1, 0.8)
    assert (shares["span"].span_p, shares["span"].span_max) == (0.2, 10)


def test_no_random_token_is_needed_where_none_is_drawn() -> None:
    tokens = [*SPECIAL, ""]
    voc = MaskVocabulary.of(tokens, list(range(5)), MASK, "the tokenizer")
    data = SimpleNamespace(
        stream=Ragged(np.array([0, 2]), {"id": np.array([5, 5])}),
        sample_ids=np.zeros((1, 16), np.uint8),
        rows=np.zeros(1, np.int64),
    )
    how = scheme("bert", probability=1.0, mask_share=0.0, random_share=1.0)
    assert draw(data, how, voc).id.tolist() == [5, 5]


def test_a_tokenizer_without_a_mask_token_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="has no mask token; masks need one: use") as error:
        MaskVocabulary.of(["a"], [], None, "signals.masks: tokenizer 'plm'")
    assert str(error.value).startswith("signals.masks: tokenizer 'plm' has")
    assert "\n" not in str(error.value)


def test_a_sample_too_long_for_its_fields_is_refused() -> None:
    data = corpus([65_537], frame=False)
    with pytest.raises(FormatError, match="at most 65535 can be stored"):
        draw(data, scheme("word", probability=1.0))
