import numpy as np
import pytest

from kdcache.dump.runner import dump
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from tests.dump.beams_oracle import (
    alike,
    encode,
    forced_sum,
    generated,
    hypotheses,
    limit_of,
    load,
    often_ending,
    recipe,
)
from tests.dump.zoo import CAUSAL, ENCODER_DECODERS

ARCHITECTURES = [*ENCODER_DECODERS, *CAUSAL]
TEXTS = 6
SIGNALS = {
    "greedy": {"mode": "greedy"},
    "one": {"num_beams": 1, "max_length": 6},
    "sum": {"num_beams": 4, "num_hypotheses": 4, "length_penalty": 0.0, "max_length": 12},
    "mean": {"num_beams": 3, "num_hypotheses": 2},
    "early": {
        "num_beams": 4,
        "num_hypotheses": 3,
        "length_penalty": 2.0,
        "early_stopping": True,
    },
    "short": {"num_beams": 2, "num_hypotheses": 2, "max_length": 3},
}


@pytest.fixture(scope="module")
def teacher(world, zoo, tmp_path_factory):
    """Directory of a model that ends some hypotheses itself."""
    root, known = tmp_path_factory.mktemp("ending"), {}

    def directory(architecture):
        if architecture not in known:
            out = root / f"{architecture}-ending"
            known[architecture] = often_ending(zoo(architecture), out, world.src[:TEXTS])
        return known[architecture]

    return directory


def signals(causal):
    where = {"stream": "src"} if causal else {}
    return {name: {"kind": "beams", **where, **given} for name, given in SIGNALS.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hypotheses_are_those_of_transformers(architecture, world, teacher, tmp_path):
    directory, causal = teacher(architecture), architecture in CAUSAL
    given = recipe(world, directory, signals(causal), causal)
    dump(given, tmp_path / "cache")
    cache, model = open_cache(tmp_path / "cache"), load(directory)
    assert cache.num_shards > 1
    assert verify_cache(tmp_path / "cache").faults == []
    ended, processed = [], model.generation_config.forced_eos_token_id is not None
    for name, given in SIGNALS.items():
        penalty = given.get("length_penalty", 1.0)
        settings = {"num_beams": 1 if name == "greedy" else given["num_beams"]}
        if settings["num_beams"] > 1:
            settings["num_return_sequences"] = given["num_hypotheses"]
            settings["length_penalty"] = penalty
            settings["early_stopping"] = given.get("early_stopping", False)
        sources = encode(directory, world.src[:TEXTS])
        for ids, found in zip(sources, hypotheses(cache, name), strict=True):
            limit = limit_of(model, ids, given.get("max_length"))
            tokens, scores = generated(model, ids, limit, **settings)
            sums = [forced_sum(model, ids, some) for some in tokens]
            expected = [
                (some, total, total / len(some) ** penalty)
                for some, total in zip(tokens, sums, strict=True)
            ]
            if scores is not None and not processed:
                # Only where nothing was forced is it transformers' own score.
                np.testing.assert_allclose(scores, [score for *_, score in found], atol=1e-4)
                assert alike(expected, found)
            expected.sort(key=lambda hypothesis: -hypothesis[2])
            assert alike(expected, found)
            np.testing.assert_allclose(
                [hypothesis[1:] for hypothesis in found],
                [hypothesis[1:] for hypothesis in expected],
                atol=2e-4,
            )
            assert max(len(some) for some, *_ in found) <= limit
            ended += [len(some) < limit for some, *_ in found]
    assert 0.05 < np.mean(ended) < 0.999  # or the test saw but one way to end


@pytest.mark.parametrize("architecture", ["marian", "t5", "mbart", "gpt2", "gemma2"])
def test_hypotheses_do_not_depend_on_the_batch(architecture, world, teacher, tmp_path):
    directory, causal = teacher(architecture), architecture in CAUSAL
    given = {name: signals(causal)[name] for name in ("mean", "early")}
    drawn = {"mode": "sample", "num_hypotheses": 2, "top_p": 0.9}
    given["drawn"] = {**given["mean"], "num_beams": 1, **drawn}
    for tokens in (1, 4000):
        dump(
            recipe(world, directory, given, causal, batch_tokens=tokens, shard_tokens=10**6),
            tmp_path / str(tokens),
        )
    alone, together = (open_cache(tmp_path / name) for name in ("1", "4000"))
    for name in given:
        pairs = list(zip(hypotheses(alone, name), hypotheses(together, name), strict=True))
        assert all(alike(one, other) for one, other in pairs)
        same = [a[0] == b[0] for one, other in pairs for a, b in zip(one, other, strict=True)]
        assert np.mean(same) > 0.95
        for one, other in pairs:
            sums = [[hypothesis[1] for hypothesis in some] for some in (one, other)]
            np.testing.assert_allclose(*sums, atol=1e-3)
