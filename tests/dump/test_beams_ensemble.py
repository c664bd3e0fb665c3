"""Beams of several models that speak as one."""

from itertools import product

import numpy as np
import pytest
import torch

from kdcache.dump.runner import dump
from kdcache.dump.signals.processors import Follower
from kdcache.errors import ModelError
from kdcache.formats.cache import open_cache
from tests.dump.beams_oracle import (
    encode,
    forced,
    hypotheses,
    load,
    recipe,
    with_settings,
)
from tests.dump.zoo import CAUSAL, sharpen

TEXTS = 4


def sibling(directory, root, seed=3, **settings):
    """The same model with other weights."""
    out = with_settings(directory, root, **settings)
    model = load(directory)
    sharpen(model, seed)
    model.save_pretrained(root / "weights")
    (root / "weights" / "model.safetensors").replace(out / "model.safetensors")
    return out


def mean(models, ids, tokens):
    """[T, V] float64 logarithms of the models' mean probability."""
    log_probs = torch.stack([forced(model, ids, tokens) for model in models])
    return torch.logsumexp(log_probs, dim=0) - np.log(len(models))


def everything(models, ids, allowed, end, limit):
    """Every hypothesis over a few tokens with its log-prob, the best first."""
    found = {}
    for tokens in product(allowed, repeat=limit):
        cut = tokens.index(end) + 1 if end in tokens else limit
        found[tokens[:cut]] = None
    for tokens in found:
        log_probs = mean(models, ids, list(tokens))
        found[tokens] = float(log_probs[np.arange(len(tokens)), list(tokens)].sum())
    return sorted(found.items(), key=lambda pair: -pair[1])


@pytest.mark.parametrize("architecture", ["t5", "mbart", "gpt2"])
def test_a_wide_beam_finds_the_best_of_all(architecture, world, zoo, tmp_path):
    """Brute force over all that five tokens can say under the mean of probabilities."""
    end, allowed = 2, [2, 8, 11, 13, 17]
    model = load(zoo(architecture))
    suppressed = [t for t in range(model.config.vocab_size) if t not in allowed]
    settings = {
        "suppress_tokens": suppressed,
        "eos_token_id": end,
        "forced_eos_token_id": None,
    }
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    paths = [
        with_settings(zoo(architecture), tmp_path / "one", **settings),
        sibling(zoo(architecture), tmp_path / "two", **settings),
    ]
    signal = {"kind": "beams", "num_beams": 64, "num_hypotheses": 6, "max_length": 3}
    signal |= {"length_penalty": 0.0}
    causal = architecture in CAUSAL
    signal |= {"stream": "src"} if causal else {}
    given = recipe(world, paths, {"beams": signal}, causal, 3, batch_tokens=10**5)
    dump(given, tmp_path / "cache")
    models = [load(path) for path in paths]
    single = False
    for ids, found in zip(
        encode(paths[0], world.src[:3]), hypotheses(open_cache(tmp_path / "cache")), strict=True
    ):
        best = everything(models, ids, allowed, end, 3)[:6]
        assert [tuple(some[0]) for some in found] == [tokens for tokens, _ in best]
        np.testing.assert_allclose([some[1] for some in found], [v for _, v in best], atol=1e-4)
        alone = everything(models[:1], ids, allowed, end, 3)[:6]
        single |= [tokens for tokens, _ in alone] != [tokens for tokens, _ in best]
    assert single  # the second member has its say


@pytest.mark.parametrize("architecture", ["marian", "t5", "gpt2", "llama", "gemma2"])
def test_a_member_follows_reordered_rows(architecture, world, zoo):
    """Logits from its cache are those of a plain forward over the whole row."""
    directory, causal = zoo(architecture), architecture in CAUSAL
    model = load(directory)
    sources = encode(directory, [world.src[0], world.src[4], world.src[9]])
    width = max(map(len, sources))
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.bool)
    for row, tokens in enumerate(sources):
        at = slice(width - len(tokens), width) if causal else slice(0, len(tokens))
        ids[row, at], mask[row, at] = torch.tensor(tokens), True
    start = None if causal else model.generation_config.decoder_start_token_id
    follower = Follower(model, ids, mask, start)
    # The first member of an ensemble may begin with another token than this one.
    rows = ids if causal else torch.full((3, 1), 5)
    rows = rows.repeat_interleave(2, dim=0)  # two beams each
    generator, prompt = torch.Generator().manual_seed(1), rows.shape[1]
    with torch.no_grad():
        for _ in range(6):
            found = torch.log_softmax(follower(rows), dim=-1)
            for row, tokens in enumerate(rows[:, prompt:].tolist()):
                expected = forced(model, sources[row // 2], [*tokens, 0])[-1]
                torch.testing.assert_close(found[row].double(), expected, atol=1e-5, rtol=1e-4)
            parents = torch.randint(0, 2, (3, 2), generator=generator)
            parents = (parents + 2 * torch.arange(3)[:, None]).flatten()
            new = torch.randint(0, model.config.vocab_size, (6, 1), generator=generator)
            rows = torch.cat([rows[parents], new], dim=1)


@pytest.mark.parametrize("mode", ["beam", "greedy", "sample"])
@pytest.mark.parametrize("architecture", ["marian", "gpt2"])
def test_a_model_twice_is_that_model(architecture, mode, world, zoo, tmp_path):
    signal = {"kind": "beams", "mode": mode, "num_beams": 3, "max_length": 6}
    causal = architecture in CAUSAL
    signal |= {"stream": "src"} if causal else {}
    twice = with_settings(zoo(architecture), tmp_path)
    found = []
    for name, paths in (("one", zoo(architecture)), ("two", [zoo(architecture), twice])):
        dump(recipe(world, paths, {"beams": signal}, causal, TEXTS), tmp_path / name)
        found.append(list(hypotheses(open_cache(tmp_path / name))))
    for one, two in zip(*found, strict=True):
        assert [some[0] for some in one] == [some[0] for some in two]
        np.testing.assert_allclose(one[0][1:], two[0][1:], atol=1e-5)


def test_averaged_parameters_are_one_model(world, zoo, tmp_path):
    paths = [zoo("t5"), sibling(zoo("t5"), tmp_path)]
    signal = {"kind": "beams", "num_beams": 3, "max_length": 6}
    given = recipe(world, paths, {"beams": signal}, False, TEXTS)
    teacher = given.dump.teacher.model_copy(update={"average": "parameters"})
    section = given.dump.model_copy(update={"teacher": teacher})
    dump(given.model_copy(update={"dump": section}), tmp_path / "cache")
    one, other = (load(path) for path in paths)
    with torch.no_grad():
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            mine.copy_((mine + theirs) / 2)
    one.save_pretrained(tmp_path / "mean")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mean" / name).write_bytes((zoo("t5") / name).read_bytes())
    dump(recipe(world, tmp_path / "mean", {"beams": signal}, False, TEXTS), tmp_path / "single")
    both = [list(hypotheses(open_cache(tmp_path / name))) for name in ("cache", "single")]
    assert both[0] == both[1]


def test_members_that_end_differently(world, zoo, tmp_path):
    other = sibling(zoo("t5"), tmp_path, eos_token_id=4)
    signal = {"kind": "beams", "num_beams": 3}
    with pytest.raises(ModelError, match="an ensemble's members must generate alike") as caught:
        dump(recipe(world, [zoo("t5"), other], {"beams": signal}), tmp_path / "cache")
    assert "\n" not in str(caught.value)
