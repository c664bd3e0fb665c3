"""Labels of a cache, and what transformers itself says at the same tokens, one text at a time."""

# N labels of a sample, V vocabulary, D drawn ids of a label

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

from kdcache.formats import keyed
from kdcache.formats.cache import open_cache
from kdcache.formats.codes import ENTROPY_ID, code_log_probs, exact_log_probs
from kdcache.formats.schema import join_ids
from tests.dump.zoo import CAUSAL, ENCODER_DECODERS

#: Float noise of a log-prob between two forwards of other shapes.
NOISE = 5e-5
#: Every number of a distribution; a few of them drawn; the largest, with all tails.
SIGNALS = {
    "whole": {"codec": {"name": "full", "values": "float32"}},
    "soft": {"codec": {"name": "threshold", "c": "1/8"}},
    "top": {"codec": {"name": "topk", "k": 9, "values": "float16"}},
}


def logits_signals(at: str, **keys) -> dict:
    """The signals above for one kind of position."""
    return {name: {"kind": "logits", "at": at, **keys, **s} for name, s in SIGNALS.items()}


@dataclass(frozen=True)
class Masking:
    """One masking of a sample, as it is stored.

    Attributes:
        truth: the sample's tokens.
        reading: the same with what stands at the masked positions.
        positions: which ones are masked.
    """

    truth: list[int]
    reading: list[int]
    positions: list[int]

    @property
    def segment(self) -> list[int]:
        """The masked tokens one after another."""
        return [self.truth[position] for position in self.positions]


class Model:
    """A language model run by transformers, one text at a time and without padding."""

    def __init__(self, architecture: str, directory):
        head = "Seq2SeqLM" if architecture in ENCODER_DECODERS else "MaskedLM"
        head = "CausalLM" if architecture in CAUSAL else head
        self.model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(directory).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def log_probs(self, **inputs) -> np.ndarray:
        """[T, V] float64 of one text; arguments are lists of numbers."""
        tensors = {name: torch.tensor([values]) for name, values in inputs.items()}
        with torch.no_grad():
            logits = self.model(**tensors).logits[0]
        return torch.log_softmax(logits.double(), -1).numpy()

    def next_tokens(self, ids: list[int], positions: list[int]) -> np.ndarray:
        """[N, V] of a causal model's next token, from the tokens before each position alone."""
        rows = [self.log_probs(input_ids=ids[:position])[-1] for position in positions]
        return np.array(rows).reshape(len(rows), self.model.config.vocab_size)

    def written(self, source: list[int], target: list[int]) -> np.ndarray:
        """[N, V] of a decoder that writes some tokens behind its own start token."""
        if not target:
            return np.zeros((0, self.model.config.vocab_size))
        before = [self.model.config.decoder_start_token_id, *target[:-1]]
        return self.log_probs(input_ids=source, decoder_input_ids=before)

    def in_place(self, masking: Masking) -> np.ndarray:
        """[N, V] of a decoder that writes a segment at its own positions, token after token.

        What stands elsewhere is hidden from it, so that can be any token: it is the text itself.
        """
        found = [np.zeros((0, self.model.config.vocab_size))]
        for number, position in enumerate(masking.positions):
            before = list(masking.truth[: position + 1])
            written = [self.model.config.decoder_start_token_id, *masking.segment]
            for place, token in zip(masking.positions[: number + 1], written, strict=False):
                before[place] = token
            seen = [int(place in masking.positions) for place in range(position + 1)]
            read = {"decoder_input_ids": before, "decoder_attention_mask": seen}
            found.append(self.log_probs(input_ids=masking.reading, **read)[-1:])
        return np.concatenate(found)


def streams_of(path, name: str) -> dict[int, list[int]]:
    """Corpus row to the tokens of a stream."""
    cache, found = open_cache(path), {}
    for number in range(cache.num_shards):
        samples = cache.samples(number)
        column = samples.streams[name]
        pieces = np.split(join_ids(column.fields), column.offsets[1:-1])
        found |= dict(zip(samples.row.tolist(), map(np.ndarray.tolist, pieces), strict=True))
    return found


def maskings_of(path, name: str) -> dict[int, list[Masking]]:
    """Corpus row to its maskings, put together token by token."""
    cache = open_cache(path)
    truth, found = streams_of(path, cache.signal(name).stream), {}
    for row, columns in columns_of(path, name).items():
        entries = zip(columns["masked"]["position"], join_ids(columns["masked"]), strict=True)
        found[row] = []
        for count in columns["replicas"]["num_masked"]:
            here = [next(entries) for _ in range(count)]
            reading = list(truth[row])
            for position, token in here:
                reading[position] = int(token)
            found[row].append(Masking(truth[row], reading, [int(p) for p, _ in here]))
        assert next(entries, None) is None
    return found


def labels_of(path, at: str, model: Model, types=None) -> tuple[dict, dict]:
    """Where the labels of a cache should be, and what transformers says there.

    Args:
        path: the cache: streams `src` and `tgt`, a signal `masks` over `src`.
        at: as in a recipe.
        model: that is asked.
        types: corpus row to the token types of `src`; None without.

    Returns:
        Corpus row to, for each replica, the pairs (position, token) that are labelled, positions
        of a segment counted within it; and corpus row to [N, V] log-probs of all of them.
    """
    places, said = {}, {}
    for row, ids in streams_of(path, "tgt" if at == "targets" else "src").items():
        if at == "targets":
            places[row] = [list(enumerate(ids))]
            said[row] = model.written(streams_of(path, "src")[row], ids)
        elif at == "positions":
            places[row] = [list(enumerate(ids))[1:]]
            said[row] = model.next_tokens(ids, list(range(1, len(ids))))
    if at == "masked":
        for row, every in maskings_of(path, "masks").items():
            places[row] = [[(p, m.truth[p]) for p in m.positions] for m in every]
            more = {} if types is None else {"token_type_ids": types(row)}
            rows = [model.log_probs(input_ids=m.reading, **more)[m.positions] for m in every]
            said[row] = np.concatenate(rows)
    elif at == "segment":
        for row, every in maskings_of(path, "masks").items():
            places[row] = [list(enumerate(m.segment)) for m in every]
            said[row] = np.concatenate([model.written(m.reading, m.segment) for m in every])
    elif at == "segment_in_place":
        for row, every in maskings_of(path, "masks").items():
            places[row] = [[(p, m.truth[p]) for p in m.positions] for m in every]
            said[row] = np.concatenate([model.in_place(m) for m in every])
    return places, said


def columns_of(path, name: str) -> dict[int, dict[str, dict[str, np.ndarray]]]:
    """Corpus row to column to the fields of its records."""
    cache, found = open_cache(path), {}
    for number in range(cache.num_shards):
        samples = cache.samples(number)
        for start, stop, columns in cache.signal_shard(name, number).parts:
            for m in range(stop - start):
                found[int(samples.row[start - samples.start + m])] = {
                    column: {
                        field: values[ragged.offsets[m] : ragged.offsets[m + 1]]
                        for field, values in ragged.fields.items()
                    }
                    for column, ragged in columns.items()
                }
    return found


def label_hashes(path, name: str, purpose: str, places: dict[int, list[list[int]]]) -> dict:
    """Corpus row to the [N] uint64 hashes of its labels.

    Args:
        path: the cache.
        name: of the signal.
        purpose: "draw" or "round".
        places: corpus row to, for each replica, the labelled tokens' positions.
    """
    cache, found = open_cache(path), {}
    for number in range(cache.num_shards):
        samples = cache.samples(number)
        for m, row in enumerate(samples.row.tolist()):
            here = samples.sample_id[m : m + 1], samples.row[m : m + 1]
            hashes = [np.zeros(0, np.uint64)]
            for replica, positions in enumerate(places[row]):
                key = keyed.sample_keys(cache.signal(name).seed, purpose, name, *here, replica)
                where = np.array(positions, dtype=np.int64)
                hashes.append(keyed.position_hash(np.repeat(key, len(where)), where))
            found[row] = np.concatenate(hashes)
    return found


def assert_labels(path, name: str, places: dict, expected: dict[int, np.ndarray]) -> int:
    """Every stored number of a signal against [N, V] log-probs of each row.

    Args:
        path: the cache.
        name: of the signal.
        places: corpus row to, for each replica, the pairs (position, token) that are labelled; a
            segment's positions count within it.
        expected: corpus row to the log-probs at its labels.

    Returns:
        Number of labels.
    """
    record = open_cache(path).signal(name)
    positions = {row: [[p for p, _ in one] for one in every] for row, every in places.items()}
    draw, rounding = (label_hashes(path, name, p, positions) for p in ("draw", "round"))
    columns = columns_of(path, name)
    assert columns.keys() == places.keys() == expected.keys()
    total = 0
    for row, fields in columns.items():
        gold = [token for one in places[row] for _, token in one]
        assert len(fields["tokens"]["gold"]) == len(gold) == len(expected[row])
        assert expected[row].shape[1] == record.vocab_size
        _assert_sample(record, fields, gold, expected[row], draw[row], rounding[row])
        total += len(gold)
    return total


def _assert_sample(record, fields, gold, log_probs, draw, rounding) -> None:
    """One sample's labels; the hashes are [N]."""
    codec, tokens = record.codec, fields["tokens"]
    probs, (count, size) = np.exp(log_probs), log_probs.shape
    gold_nats = log_probs[np.arange(count), gold]
    _assert_between(tokens["gold"], *(_gold_code(gold_nats + d) for d in (NOISE, -NOISE)))
    terms = np.where(probs > 0, probs * np.where(probs > 0, log_probs, 0), 0)
    steps = -terms.sum(-1) / np.log(size) * 255
    uniform = _uniform(rounding, np.full(count, ENTROPY_ID))
    _assert_between(
        tokens["entropy"], *(np.floor((steps + d * 255).clip(0) + uniform) for d in (-NOISE, NOISE))
    )
    kept = np.zeros((count, size), dtype=bool)
    if codec.name == "full":
        kept[:] = True
    else:
        at = np.repeat(np.arange(count), tokens["num_exact"])
        kept[at, join_ids(fields["exact"])] = True
    assert kept.sum() == len(fields["exact"]["code"])  # none twice
    _assert_codes(codec, fields["exact"]["code"], log_probs[kept], _entries(rounding, kept))
    if codec.name == "topk":
        assert (kept.sum(-1) == min(codec.k, size)).all()
        least = np.where(kept, log_probs, np.inf).min(-1, initial=np.inf)
        assert (np.where(kept, -np.inf, log_probs).max(-1, initial=-np.inf) <= least + NOISE).all()
    if codec.has_tail:
        for knot, temperature in enumerate(record.temperatures):
            rest = np.where(kept, 0, np.exp(log_probs / temperature)).sum(-1)
            with np.errstate(divide="ignore"):
                nats = np.log(rest)
            np.testing.assert_allclose(tokens[f"tail_{knot}"], nats, rtol=2**-10, atol=10 * NOISE)
    if codec.name == "threshold":
        assert not (kept & (log_probs < np.log(codec.c) - NOISE)).any()
        assert not (~kept & (log_probs > np.log(codec.c) + NOISE)).any()
        drawn = np.split(join_ids(fields["drawn"]), np.cumsum(tokens["num_drawn"])[:-1])
        for n in range(count):
            mass = np.where(kept[n], 0, probs[n]) / codec.c
            assert_drawn(drawn[n], mass, int(draw[n] >> np.uint64(24)) / 2**40)


def assert_drawn(ids: np.ndarray, mass: np.ndarray, start: float) -> None:
    """[D] systematic draws: the running sum first reaches k - start at the k-th of them.

    Args:
        ids: ascending.
        mass: [V] probabilities over c, 0 for exact entries.
        start: in [0, 1).
    """
    ends = np.cumsum(mass)
    noise = NOISE * ends[-1]
    turns = np.arange(1, len(ids) + 1) - start
    assert (np.diff(ids) > 0).all()
    assert (ends[ids] >= turns - noise).all()
    assert ((ends - mass)[ids] <= turns + noise).all()
    assert np.floor(ends[-1] + start - noise) <= len(ids) <= np.floor(ends[-1] + start + noise)


def _assert_codes(codec, codes, log_probs, uniform) -> None:
    """[E] codes of exact entries."""
    if codec.values == "uint8":
        bounds = (_rounded(log_probs + d, uniform, codec.range_nats) for d in (NOISE, -NOISE))
        _assert_between(codes, *bounds)
    else:
        rtol = {"float32": 0, "float16": 2**-11}[codec.values]
        found = exact_log_probs(codec, codes)
        np.testing.assert_allclose(found, log_probs, rtol=rtol, atol=NOISE)


def _rounded(log_probs, uniform, range_nats) -> np.ndarray:
    """uint8 codes as docs/format.md has them: up or down, so that the probability is right."""
    table = np.exp(code_log_probs(range_nats))  # [256], descending
    probs = np.exp(log_probs)
    low = np.searchsorted(-table, -probs, side="right").clip(1, 255)  # the next that is smaller
    share = (probs - table[low]) / (table[low - 1] - table[low])
    return np.where(uniform < share, low - 1, low)


def _gold_code(log_probs) -> np.ndarray:
    return np.rint(255 * np.sqrt((-log_probs / 25).clip(0, 1)))


def _uniform(rounding, ids) -> np.ndarray:
    """Numbers in [0, 1) that round entries up or down."""
    hashed = keyed.mix64(rounding ^ keyed.mix64(ids.astype(np.uint64)))
    return (hashed >> np.uint64(40)).astype(np.float64) / 2**24


def _entries(rounding, kept) -> np.ndarray:
    """[E] uniform number of every kept entry, label after label."""
    labels, ids = kept.nonzero()
    return _uniform(rounding[labels], ids)


def _assert_between(found, low, high) -> None:
    assert (low <= found).all(), (low, found)
    assert (found <= high).all(), (found, high)
