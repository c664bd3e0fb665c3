"""Made-up corpora for masking, and its results laid out flat."""

from types import SimpleNamespace

import numpy as np

from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import join_ids
from kdcache.recipe.signals import MasksSignal
from kdcache.text.mask_choice import Scheme
from kdcache.text.masking import MaskVocabulary, draw_masks, scheme_of

SCHEMES = ["bert", "whole_word", "span", "segment", "word"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)


def vocabulary(whole: int = 200, pieces: int = 100, unnamed: int = 3) -> MaskVocabulary:
    """WordPiece: special ids 0 to 4, then whole words, then pieces, then ids without a name."""
    tokens = [*SPECIAL, *(f"w{i}" for i in range(whole)), *(f"##p{i}" for i in range(pieces))]
    return MaskVocabulary.of([*tokens, *[""] * unnamed], list(range(5)), MASK, "the tokenizer")


WORDS, WORDPIECE = vocabulary(pieces=0), vocabulary()


def scheme(name: str, **section) -> Scheme:
    return scheme_of(MasksSignal(kind="masks", scheme=name, **section))


def corpus(lengths, voc: MaskVocabulary = WORDPIECE, seed: int = 0, frame: bool = True):
    """Made-up samples of so many tokens that can be masked, between [CLS] and [SEP]."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    offsets = offsets_of(lengths + 2 * frame)
    ids = rng.choice(voc.random_ids, int(offsets[-1]))
    if frame:
        ids[offsets[:-1]], ids[offsets[1:] - 1] = CLS, SEP
    sample_ids = rng.integers(0, 256, (len(lengths), 16)).astype(np.uint8)
    rows = np.arange(len(lengths)) + 7
    return SimpleNamespace(stream=Ragged(offsets, {"id": ids}), sample_ids=sample_ids, rows=rows)


def draw(data, how: Scheme, voc: MaskVocabulary = WORDPIECE, replicas: int = 1, seed: int = 1):
    """Masks of a corpus, flat: sample, replica, position, own id and id of every masked token."""
    columns = draw_masks(data.stream, data.sample_ids, data.rows, voc, how, replicas, seed)
    counts = columns["replicas"].fields["num_masked"].astype(int)
    pair = np.repeat(np.arange(len(counts)), counts)
    position = columns["masked"].fields["position"].astype(int)
    sample = pair // replicas
    return SimpleNamespace(
        counts=counts.reshape(-1, replicas),
        sample=sample,
        replica=pair % replicas,
        position=position,
        own=data.stream.fields["id"][data.stream.offsets[sample] + position],
        id=join_ids(columns["masked"].fields),
        columns=columns,
    )


def flags(data, out, replica: int = 0) -> np.ndarray:
    """Which tokens of the corpus are masked."""
    flat = np.zeros(int(data.stream.offsets[-1]), dtype=bool)
    mine = out.replica == replica
    flat[data.stream.offsets[out.sample[mine]] + out.position[mine]] = True
    return flat
