"""What transformers itself says of one text, and what a cache says of it."""

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from kdcache.formats.cache import open_cache
from kdcache.recipe import parse_recipe
from tests.dump.world import make_lines
from tests.dump.zoo import CAUSAL, ENCODER_DECODERS

#: Lines of every length, one letter, and nothing: a single token wherever an end is added.
SRC, TGT = ([*lines[::7], "a", ""] for lines in make_lines(60))
#: Rounding of a stored number, as a share of it.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
NOISE = 2e-5


def corpus_at(folder) -> dict:
    """The corpus section of SRC and TGT, written into a folder."""
    for name, lines in (("s", SRC), ("t", TGT)):
        (folder / name).write_text("".join(line + "\n" for line in lines))
    return {"fields": {"src": str(folder / "s"), "tgt": str(folder / "t")}, "empty": "keep"}


def recipe_of(folder, directory, signals: dict, **dump):
    """A recipe of SRC and TGT."""
    teacher = {"path": str(directory), "device": "cpu"}
    section = {"teacher": teacher, "signals": signals, **dump}
    return parse_recipe({"name": "test", "corpus": corpus_at(folder), "dump": section})


def sides(architecture: str) -> list[str]:
    """The sides that an architecture's language model has."""
    if architecture in ENCODER_DECODERS:
        return ["encoder", "decoder"]
    return ["decoder"] if architecture in CAUSAL else ["encoder"]


def streams(architecture: str, side: str) -> dict[str, str]:
    """The part of a signal's section that says what is read."""
    if side == "decoder" and architecture in ENCODER_DECODERS:
        return {"side": side, "stream": "tgt", "source": "src"}
    return {"side": side, "stream": "src"}


class Oracle:
    """A model run by transformers, one text at a time and without padding."""

    def __init__(self, architecture: str, directory):
        self.seq2seq = architecture in ENCODER_DECODERS
        auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForMaskedLM
        auto = AutoModelForSeq2SeqLM if self.seq2seq else auto
        self.model = auto.from_pretrained(directory, attn_implementation="eager").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self._known: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}

    @property
    def half(self) -> int:
        """More than half of the tokens of both sides: a shard size that gives two shards."""
        return sum(len(self.tokenizer(line)["input_ids"]) for line in [*SRC, *TGT]) * 3 // 5

    def describe(self, row: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Side to hidden states [T, n + 1, D] and attention [T, T, n, H]."""
        if row not in self._known:
            ids = self.tokenizer(SRC[row], return_tensors="pt")["input_ids"]
            inputs = {"input_ids": ids}
            if self.seq2seq:
                target = self.tokenizer(text_target=TGT[row], return_tensors="pt")
                inputs["labels"] = target["input_ids"]
            with torch.no_grad():
                out = self.model(**inputs, output_hidden_states=True, output_attentions=True)
            prefixes = ["encoder", "decoder"] if self.seq2seq else ["encoder"]
            self._known[row] = {side: _arrays(out, side, self.seq2seq) for side in prefixes}
            if not self.seq2seq:
                self._known[row]["decoder"] = self._known[row]["encoder"]
        return self._known[row]


def _arrays(out, side: str, seq2seq: bool) -> tuple[np.ndarray, np.ndarray]:
    prefix = f"{side}_" if seq2seq else ""
    hidden = torch.stack(out[f"{prefix}hidden_states"], dim=2)[0]  # [T, n + 1, D]
    attention = torch.stack(out[f"{prefix}attentions"], dim=1)[0]  # [n, H, T, T]
    return hidden.numpy(), attention.permute(2, 3, 0, 1).numpy()


def stored(path, name: str) -> dict[int, np.ndarray]:
    """Corpus row to [rows, L, W] decoded values of a dense signal."""
    cache = open_cache(path)
    layers = range(len(cache.signal(name).layers))
    found = {}
    for number in range(cache.num_shards):
        samples, shard = cache.samples(number), cache.dense_shard(name, number)
        for m, row in enumerate(samples.row):
            at = samples.start + m
            found[int(row)] = np.stack([shard.decode(at, at + 1, layer) for layer in layers], 1)
    return found


def assert_stored(found: np.ndarray, expected: np.ndarray, values: str) -> None:
    """[rows, L, W] decoded values against those that were to be stored."""
    assert found.shape == expected.shape
    if values == "int8":
        step = np.abs(expected).max(-1, keepdims=True) / 127
        assert (np.abs(found - expected) <= step * 0.501 + NOISE).all()
    else:
        np.testing.assert_allclose(found, expected, rtol=ROUNDING[values] * 1.01, atol=NOISE)


def masked_inputs(path, stream: str, masks: str) -> dict[int, list[list[int]]]:
    """Corpus row to the ids that a model reads for each replica, put together one by one."""
    cache = open_cache(path)
    found: dict[int, list[list[int]]] = {}
    for number in range(cache.num_shards):
        samples = cache.samples(number)
        tokens = samples.streams[stream]
        for start, stop, columns in cache.signal_shard(masks, number).parts:
            replicas, masked = columns["replicas"], columns["masked"]
            entry = 0
            for m in range(stop - start):
                at = start - samples.start + m
                ids = tokens.fields["id"][tokens.offsets[at] : tokens.offsets[at + 1]].tolist()
                readings = found[int(samples.row[at])] = []
                for r in range(replicas.offsets[m], replicas.offsets[m + 1]):
                    reading = list(ids)
                    for _ in range(replicas.fields["num_masked"][r]):
                        reading[masked.fields["position"][entry]] = int(masked.fields["id"][entry])
                        entry += 1
                    readings.append(reading)
    return found
