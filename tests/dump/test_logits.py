import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from kdcache.dump.runner import dump
from kdcache.dump.signals import logits
from kdcache.formats import plan
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codes import entropy_nats, exact_log_probs, gold_log_probs
from kdcache.formats.schema import join_ids
from tests.dump.world import CODECS, FAMILIES


def positions(cache, name="logits"):
    """Per sample: corpus row, target ids and, per column, the fields of its positions."""
    for shard in range(cache.num_shards):
        samples = cache.samples(shard)
        target = samples.streams["tgt"]
        for start, stop, columns in cache.signal_shard(name, shard).parts:
            for m in range(stop - start):
                at = start - samples.start + m
                begin, end = target.offsets[at : at + 2]
                fields = {
                    column: {
                        field: values[ragged.offsets[m] : ragged.offsets[m + 1]]
                        for field, values in ragged.fields.items()
                    }
                    for column, ragged in columns.items()
                }
                yield samples.row[at], join_ids(target.fields)[begin:end], fields


def brute_force(directory, src: str, tgt: str) -> np.ndarray:
    """[T, V] float64 log-probs of one sample by a plain forward."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor([tokenizer(src)["input_ids"]]),
            labels=torch.tensor([tokenizer(text_target=tgt)["input_ids"]]),
        ).logits[0]
    return torch.log_softmax(found.double(), -1).numpy()


@pytest.fixture(scope="session")
def oracle(world):
    """Family to row to log-probs, each computed once and sample by sample."""
    known: dict[tuple[str, int], np.ndarray] = {}

    def ask(family: str, row: int) -> np.ndarray:
        if (family, row) not in known:
            known[family, row] = brute_force(world.root / family, world.src[row], world.tgt[row])
        return known[family, row]

    return ask


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_those_of_a_forward_per_sample(
    family, codec, make_recipe, oracle, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan.plan_parts, "__defaults__", (5000,))  # several parts a shard
    recipe = make_recipe(family, CODECS[codec])
    summary = dump(recipe, tmp_path / "cache")
    report = verify_cache(tmp_path / "cache")
    assert report.faults == []
    cache = open_cache(tmp_path / "cache")
    record = cache.signals["logits"]
    rows = []
    for row, gold, columns in positions(cache):
        rows.append(row)
        if row % 6 == 1:
            check_sample(record, oracle(family, int(row)), gold, columns)
    assert rows == list(range(60))
    assert summary["shards"] == cache.num_shards > 1
    assert max(len(cache.signal_shard("logits", s).parts) for s in range(cache.num_shards)) > 1
    assert summary["tokens"]["tgt"] == summary["signals"]["logits"]["labels"]
    assert summary["bytes"] == sum(p.stat().st_size for p in tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize("codec", ["threshold", "sampled"])
def test_draws_do_not_depend_on_pieces(codec, make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe("marian", CODECS[codec])
    dump(recipe, tmp_path / "whole")
    monkeypatch.setattr(logits, "PIECE_ENTRIES_CPU", 1)  # every position is a piece
    dump(recipe, tmp_path / "pieces")
    whole, pieces = (
        [columns["drawn"]["id"].tolist() for _, _, columns in positions(open_cache(path))]
        for path in (tmp_path / "whole", tmp_path / "pieces")
    )
    same = [one == other for one, other in zip(whole, pieces, strict=True)]
    # A matrix product of another shape may move a probability across a step, hardly ever.
    assert np.mean(same) > 0.9


def check_sample(record, log_probs, gold, columns) -> None:
    """All columns of one sample against [T, V] log-probs."""
    probs, (length, vocab_size) = np.exp(log_probs), log_probs.shape
    tokens, codec = columns["tokens"], record.codec
    assert vocab_size == record.vocab_size
    gold_nats = log_probs[np.arange(length), gold]
    np.testing.assert_allclose(gold_log_probs(tokens["gold"]), gold_nats, atol=0.3)
    entropy = -(probs * log_probs).sum(-1)
    found = entropy_nats(tokens["entropy"], vocab_size)
    np.testing.assert_allclose(found, entropy, atol=np.log(vocab_size) / 255 + 1e-4)
    if codec.has_exact:
        num_exact = tokens.get("num_exact", np.full(length, vocab_size))
        ids = (
            np.tile(np.arange(vocab_size), length)
            if codec.name == "full"
            else join_ids(columns["exact"])
        )
        values = exact_log_probs(codec, columns["exact"]["code"])
        atol = {"uint8": 0.05, "float16": 0.01, "float32": 1e-4}[codec.values]
        head = np.zeros((length, vocab_size), dtype=bool)
        at = np.repeat(np.arange(length), num_exact)
        head[at, ids] = True
        np.testing.assert_allclose(values, log_probs[at, ids], atol=atol)
        np.testing.assert_array_equal(head, expected_head(codec, probs))
        if codec.has_tail:
            for knot, temperature in enumerate(record.temperatures):
                outside = np.where(head, 0, np.exp(log_probs / temperature)).sum(-1)
                np.testing.assert_allclose(
                    np.exp(tokens[f"tail_{knot}"].astype(float)), outside, rtol=0.01, atol=1e-4
                )
    if codec.name == "threshold":
        mass = np.where(probs >= codec.c, 0, probs).sum(-1) / codec.c
        assert (np.abs(tokens["num_drawn"] - mass) < 1).all()
    if codec.name == "sampled":
        at = np.repeat(np.arange(length), tokens["num_drawn"])
        counts = np.bincount(at, columns["drawn"]["code"], minlength=length)
        assert (counts == codec.n).all()


def expected_head(codec, probs) -> np.ndarray:
    """[T, V] bool, what the codec should keep exactly."""
    if codec.name == "threshold":
        return probs >= codec.c
    rank = np.argsort(np.argsort(-probs, axis=-1), axis=-1)
    if codec.name == "full":
        return rank >= 0
    if codec.name == "topk":
        return rank < codec.k
    before = np.cumsum(-np.sort(-probs, axis=-1), axis=-1) - -np.sort(-probs, axis=-1)
    return (rank < codec.k_max) & (np.take_along_axis(before, rank, -1) < codec.p)
