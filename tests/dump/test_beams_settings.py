"""What is forced, what is ruled out, what is refused, and what is said about it."""

import json
import logging
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcache.dump.runner import dump
from kdcache.dump.teachers.model import LanguageTeacher
from kdcache.errors import ModelError, RecipeError
from kdcache.formats.cache import open_cache
from tests.dump.beams_oracle import (
    alike,
    encode,
    forced_sum,
    generated,
    hypotheses,
    load,
    recipe,
    with_settings,
)

BEAMS = {"kind": "beams", "num_beams": 3, "num_hypotheses": 2, "max_length": 7}
TEXTS = 6


def dumped(world, directory, signal, out, causal=False, **more):
    given = {"beams": {**BEAMS, **({"stream": "src"} if causal else {}), **signal}}
    dump(recipe(world, directory, given, causal, **more), out)
    return open_cache(out)


def check(cache, model, directory, world, **settings):
    """Every hypothesis is transformers', and its log-prob is that of all its tokens."""
    for ids, found in zip(encode(directory, world.src[:TEXTS]), hypotheses(cache), strict=True):
        tokens, _ = generated(model, ids, 7, num_beams=3, num_return_sequences=2, **settings)
        sums = [forced_sum(model, ids, some) for some in tokens]
        expected = [(t, s, s / len(t)) for t, s in zip(tokens, sums, strict=True)]
        expected.sort(key=lambda hypothesis: -hypothesis[2])
        assert alike(expected, found)
        np.testing.assert_allclose(
            [some[1:] for some in found], [some[1:] for some in expected], atol=1e-4
        )


def test_a_forced_language(world, zoo, tmp_path):
    """mBART: the language is the first token that the decoder predicts, and is stored."""
    directory = with_settings(zoo("mbart"), tmp_path, forced_eos_token_id=None)
    cache = dumped(world, directory, {"forced_bos": "de_DE"}, tmp_path / "cache")
    model = load(directory)
    german = encode(directory, [""])[0]
    tokens = cache.tokens("teacher")
    language = tokens.index("de_DE")
    assert cache.signals["beams"].decoding["forced_bos_token_id"] == language
    assert language not in german
    check(cache, model, directory, world, forced_bos_token_id=language)
    for found in hypotheses(cache):
        assert all(some[0][0] == language for some in found)
    free = dumped(world, directory, {}, tmp_path / "free")
    assert any(some[0][0] != language for found in hypotheses(free) for some in found)


def test_a_forced_token_of_a_causal_model(world, zoo, tmp_path):
    cache = dumped(world, zoo("gpt2"), {"forced_bos": "c"}, tmp_path / "cache", causal=True)
    token = cache.tokens("teacher").index("c")
    model = load(zoo("gpt2"))
    for ids, found in zip(encode(zoo("gpt2"), world.src[:TEXTS]), hypotheses(cache), strict=True):
        assert all(some[0][0] == token for some in found)
        (alone,), _ = generated(model, [*ids, token], 6, num_beams=3)
        assert alone in [some[0][1:] for some in found]


def test_what_the_checkpoint_rules_out(world, zoo, tmp_path):
    """Ids that are never written stay so; how to search is the recipe's alone."""
    start, end, rules = 0, 3, {"forced_eos_token_id": 3, "bad_words_ids": [[0]]}

    def written(name):
        """Hypotheses under the rules so far."""
        (tmp_path / name).mkdir()
        directory = with_settings(zoo("marian"), tmp_path / name, **rules, num_beams=6)
        cache = dumped(world, directory, {}, tmp_path / name / "cache")
        check(cache, load(directory), directory, world)
        assert cache.signals["beams"].decoding["decoder_start_token_id"] == start
        return [some[0] for found in hypotheses(cache) for some in found]

    # What is ruled out next is what was written most.
    often = Counter(token for tokens in written("a") for token in tokens[:-1]).most_common(1)[0][0]
    rules["suppress_tokens"] = [often]
    first = Counter(tokens[0] for tokens in written("b")).most_common(1)[0][0]
    rules["begin_suppress_tokens"] = [first]
    pairs = Counter(pair for tokens in written("c") for pair in pairwise(tokens[:-1]))
    pair = pairs.most_common(1)[0][0]
    rules["bad_words_ids"] = [[start], list(pair)]
    for tokens in written("d"):
        assert not {start, often} & set(tokens)
        assert tokens[0] != first
        assert pair not in pairwise(tokens)
        assert tokens[-1] == end  # forced where the model did not end
        assert end not in tokens[:-1]


@pytest.mark.parametrize("architecture", ["t5", "gpt2"])
def test_nothing_else_of_the_checkpoint_leaks_in(architecture, world, zoo, tmp_path, caplog):
    causal = architecture == "gpt2"
    leaks = {
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 3.0,
        "min_length": 6,
        "do_sample": True,
        "top_k": 3,
        "temperature": 7.0,
        "num_beams": 5,
        "early_stopping": True,
        "length_penalty": 5.0,
    }
    directory = with_settings(zoo(architecture), tmp_path, **leaks)
    with caplog.at_level(logging.WARNING):
        cache = dumped(world, directory, {}, tmp_path / "cache", causal=causal)
    plain = dumped(world, zoo(architecture), {}, tmp_path / "plain", causal=causal)
    assert list(hypotheses(cache)) == list(hypotheses(plain))
    ignored = {name: leaks[name] for name in list(leaks)[:3]}
    assert cache.signals["beams"].decoding["ignored"] == ignored
    assert plain.signals["beams"].decoding["ignored"] == {}
    (said,) = [r.getMessage() for r in caplog.records if "generation config" in r.getMessage()]
    assert "no_repeat_ngram_size" in said


def test_every_setting_is_recorded(world, zoo, tmp_path):
    cache = dumped(world, zoo("bart"), {}, tmp_path / "cache")
    model = load(zoo("bart"))
    assert cache.signals["beams"].decoding == {
        "mode": "beam",
        "num_beams": 3,
        "num_hypotheses": 2,
        "max_length": 7,
        "max_positions": 64,
        "length_penalty": 1.0,
        "early_stopping": False,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": [model.config.eos_token_id],
        "pad_token_id": model.config.pad_token_id,
        "decoder_start_token_id": model.config.decoder_start_token_id,
        "forced_bos_token_id": None,
        "forced_eos_token_id": [model.config.eos_token_id],
        "bad_words_ids": [],
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "ignored": {},
    }


def short_model(zoo, root, positions):
    """A GPT-2 of few positions."""
    directory = with_settings(zoo("gpt2"), root)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"n_positions": positions}))
    weights = load_file(directory / "model.safetensors")
    table = weights["transformer.wpe.weight"][:positions].clone()
    save_file(
        weights | {"transformer.wpe.weight": table},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


@pytest.mark.parametrize("max_length", [None, 9])
def test_long_prompts_leave_less_room(max_length, world, zoo, tmp_path):
    lengths = [len(ids) for ids in encode(zoo("gpt2"), world.src[:TEXTS])]
    positions = max(lengths) + 2
    assert len(set(lengths)) > 2
    directory = short_model(zoo, tmp_path, positions)
    signal = {"max_length": max_length}
    cache = dumped(world, directory, signal, tmp_path / "cache", True, shard_tokens=10**6)
    model = load(directory)
    for ids, found in zip(encode(directory, world.src[:TEXTS]), hypotheses(cache), strict=True):
        limit = min(max_length or 2 * len(ids) + 10, positions - len(ids))
        assert all(len(some[0]) == limit for some in found)
        tokens, _ = generated(model, ids, limit, num_beams=3, num_return_sequences=2)
        assert sorted(tokens) == sorted(some[0] for some in found)


def test_a_prompt_that_leaves_no_room(world, zoo, tmp_path):
    lengths = [len(ids) for ids in encode(zoo("gpt2"), world.src[:TEXTS])]
    directory = short_model(zoo, tmp_path, max(lengths))
    row = lengths.index(max(lengths))
    with pytest.raises(
        ModelError,
        match=rf"signal 'beams', corpus row {row}: its prompt has {max(lengths)} tokens and .* "
        rf"takes {max(lengths)}, which leaves none to write; dump with a smaller dump.max_tokens",
    ):
        dumped(world, directory, {}, tmp_path / "cache", causal=True)


@pytest.mark.parametrize("mode", ["beam", "greedy", "sample"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(mode, value, world, zoo, tmp_path):
    """One line with the row and the place; the token is read in one row alone."""
    directory = with_settings(zoo("gpt2"), tmp_path)
    sources = encode(directory, world.src[:TEXTS])
    (token,) = set(sources[4]) - {token for n, ids in enumerate(sources) if n != 4 for token in ids}
    weights = load_file(directory / "model.safetensors")
    table = weights["transformer.wte.weight"]
    table[token] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    # The head is tied: ruled out, the token of every other row is a number again.
    head = {"lm_head.weight": zoo_head(zoo)}
    save_file(weights | head, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    signal = {"mode": mode, "num_hypotheses": 1}
    with pytest.raises(
        ModelError,
        match=r"^signal 'beams', corpus rows 0 to 5: corpus row 4, token 0 of a hypothesis: the "
        r"teacher's logits have a NaN, a \+inf or .*; try dump.teacher.dtype float32$",
    ) as caught:
        dumped(world, directory, signal, tmp_path / "cache", True, shard_tokens=10**6)
    assert "\n" not in str(caught.value)
    assert open_cache(tmp_path / "cache").committed("beams") == set()


def test_a_hypothesis_that_cannot_be_read(world, zoo, tmp_path, monkeypatch):
    real = LanguageTeacher.logits_in_pieces

    def spoilt(teacher, batch, at, entries):
        yield from (piece * torch.nan for piece in real(teacher, batch, at, entries))

    monkeypatch.setattr(LanguageTeacher, "logits_in_pieces", spoilt)
    with pytest.raises(ModelError, match=r"corpus row \d, reading a hypothesis: the teacher"):
        dumped(world, zoo("t5"), {}, tmp_path / "cache")


def zoo_head(zoo):
    weights = load_file(zoo("gpt2") / "model.safetensors")
    return weights["transformer.wte.weight"].clone()


def test_refusals(world, zoo, tmp_path):
    with pytest.raises(
        RecipeError, match=r"signals.beams.forced_bos is 'xx_XX', which is no token of the teacher"
    ):
        dumped(world, zoo("mbart"), {"forced_bos": "xx_XX"}, tmp_path / "a")
    with pytest.raises(
        ModelError,
        match=r"signals.beams: hypotheses come from a teacher of kind encoder_decoder or "
        "causal_lm, .*bert-lm is of kind masked_lm",
    ):
        dumped(world, zoo("bert"), {}, tmp_path / "a", causal=True)
    with pytest.raises(ModelError, match="is of kind classifier"):
        dumped(world, zoo("gpt2", "classifier"), {}, tmp_path / "a", causal=True)
    assert not (tmp_path / "a" / "kdcache.json").exists()
    for wrong, what in (
        ({"mode": "greedy"}, "mode greedy has one hypothesis"),
        ({"num_hypotheses": 4}, "num_hypotheses 4 is more than num_beams 3"),
        ({"temperature": 0.5}, "temperature, top_k and top_p go with mode sample alone"),
        ({"mode": "sample", "early_stopping": True}, "early_stopping goes with mode beam alone"),
        ({"max_length": 65536}, "less than or equal to 65535"),
    ):
        with pytest.raises(RecipeError, match=what):
            recipe(world, zoo("t5"), {"beams": BEAMS | wrong})


def test_fewer_hypotheses_than_asked_for(world, zoo, tmp_path):
    """A beam wider than all there is to find: transformers fills it up, kdcache does not."""
    directory = with_settings(zoo("bart"), tmp_path, forced_bos_token_id=None)
    signal = {"max_length": 1, "num_beams": 5, "num_hypotheses": 5}
    cache = dumped(world, directory, signal, tmp_path / "cache")
    end = cache.signals["beams"].decoding["forced_eos_token_id"]
    model = load(directory)
    for ids, found in zip(encode(directory, world.src[:TEXTS]), hypotheses(cache), strict=True):
        assert [some[0] for some in found] == [end]
        filled, _ = generated(model, ids, 1, num_beams=5, num_return_sequences=5)
        assert len(filled) == 5


def test_a_decoder_without_a_start(world, zoo, tmp_path):
    settings = {"decoder_start_token_id": None, "bos_token_id": None}
    directory = with_settings(zoo("t5"), tmp_path, **settings)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ModelError, match="has no decoder_start_token_id; add the id that its"):
        dumped(world, directory, {}, tmp_path / "cache")


def test_one_token_sources(world, zoo, tmp_path):
    (tmp_path / "src").write_text("c\nthe cat sees\nd\n")
    for architecture in ("t5", "gpt2"):
        causal = architecture == "gpt2"
        given = recipe(world, zoo(architecture), {"beams": BEAMS | {"stream": "src"}}, True)
        corpus = given.corpus.model_copy(update={"fields": {"src": str(tmp_path / "src")}})
        out = tmp_path / architecture
        dump(given.model_copy(update={"corpus": corpus}), out)
        model = load(zoo(architecture))
        sources = encode(zoo(architecture), ["c", "the cat sees", "d"])
        assert not causal or len(sources[0]) == 1
        for ids, found in zip(sources, hypotheses(open_cache(out)), strict=True):
            tokens, _ = generated(model, ids, 7, num_beams=3, num_return_sequences=2)
            assert sorted(tokens) == sorted(some[0] for some in found)
    assert torch.get_num_threads() == 1
