"""Logits of hypotheses, from the beams signal of the same cache."""

import json

import numpy as np
import pytest

from kdcache import cli
from kdcache.dump.runner import dump
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codes import exact_log_probs
from tests.dump.beams_oracle import encode, forced, hypotheses, load, recipe, with_settings
from tests.dump.zoo import ENCODER_DECODERS

FULL = {"name": "full", "values": "float32"}
BEAMS = {"kind": "beams", "num_beams": 4, "num_hypotheses": 3, "max_length": 6}


def labels(cache, name):
    """Per sample: [N, V] log-probs of its labels, one after another."""
    record = cache.signals[name]
    for shard in range(cache.num_shards):
        for start, stop, columns in cache.signal_shard(name, shard).parts:
            tokens, codes = columns["tokens"], columns["exact"].fields["code"]
            values = exact_log_probs(record.codec, codes).reshape(-1, record.vocab_size)
            for m in range(stop - start):
                yield values[tokens.offsets[m] : tokens.offsets[m + 1]]


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_every_hypothesis_is_labelled(architecture, world, zoo, tmp_path):
    directory = zoo(architecture)
    if architecture in ("mbart", "bart"):  # hypotheses without an end token too
        directory = with_settings(directory, tmp_path, forced_eos_token_id=None)
    logits = {"kind": "logits", "hypotheses": "beams", "codec": FULL}
    # The first name comes before its input's, and must be made after it.
    signals = {
        "all_of_them": {**logits, "hypothesis": "all"},
        "beams": BEAMS,
        "second": {**logits, "hypothesis": 1},
    }
    dump(recipe(world, directory, signals), tmp_path / "cache")
    assert verify_cache(tmp_path / "cache").faults == []
    cache, model = open_cache(tmp_path / "cache"), load(directory)
    sources = encode(directory, world.src[:6])
    ended = []
    for ids, found, every, second in zip(
        sources,
        hypotheses(cache),
        labels(cache, "all_of_them"),
        labels(cache, "second"),
        strict=True,
    ):
        expected = [forced(model, ids, tokens).numpy() for tokens, *_ in found]
        np.testing.assert_allclose(every, np.concatenate(expected), atol=1e-4)
        np.testing.assert_allclose(second, expected[1], atol=1e-4)
        gold = [
            rows[np.arange(len(rows)), some[0]] for rows, some in zip(expected, found, strict=True)
        ]
        sums = [float(values.sum()) for values in gold]
        np.testing.assert_allclose([some[1] for some in found], sums, atol=1e-4)
        ends = model.generation_config.eos_token_id
        ended += [tokens[-1] == ends for tokens, *_ in found]
    if architecture in ("mbart", "bart"):
        assert not all(ended)
    digests = [cache.commit_record("beams", n).digest for n in range(cache.num_shards)]
    for shard, digest in enumerate(digests):
        assert cache.commit_record("second", shard).inputs == {"beams": digest}


def test_inspect_shows_beams(world, zoo, tmp_path, capsys):
    dump(recipe(world, zoo("t5"), {"beams": BEAMS}), tmp_path / "cache")
    assert cli.main(["inspect", str(tmp_path / "cache")]) == 0
    assert "beams" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "cache"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "beams" in json.dumps(shown["signals"])
