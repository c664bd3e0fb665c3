"""Masking: which tokens of a sample are masked, and what stands in their place.

Every decision is a keyed hash of seed, sample, corpus row, replica and position, so the same
masks come out in every process, batch and order, and whatever the signal is called.

What holds for all schemes, also where the papers are silent:

* Special tokens are never masked, never drawn as a random token, and not counted in any share;
  the unknown token is one of them, as in transformers' own collator. They end words and spans.
* A budget is round(p * n) of a sample's n other tokens, halves to even, and at least 1: what
  BERT's released code does, except that it counts [CLS] and [SEP] in n. There is no upper bound
  beside it (the code's `max_predictions_per_seq`). A sample of one such token is masked whole;
  one of special tokens alone has no masks.
* A random token is uniform over the ids that are not special and name a token. It may be the
  token itself.
* Positions stay: a word of three pieces becomes three mask tokens.

Source: BERT (Devlin et al. 2019) with its released code for whole words; SpanBERT (Joshi et al.
2020), section 3.1; MASS (Song et al. 2019), section 4.1; MKD (Liu et al. 2019), section 6.2.
"""

# V vocabulary, M samples, R replicas, A (sample, replica) pairs, N tokens that can be masked,
# W words, E masked tokens

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdcache.errors import ModelError
from kdcache.formats.keyed import sample_keys
from kdcache.formats.masks import masks_columns
from kdcache.formats.ragged import Ragged, segment_indices
from kdcache.formats.schema import join_ids
from kdcache.formats.words import WordMarks, word_marks
from kdcache.recipe.signals import MasksSignal
from kdcache.text.mask_choice import Scheme, Tokens, choose

#: Share of tokens (of words for `word`) where the recipe names none.
PROBABILITY = {"bert": 0.15, "whole_word": 0.15, "span": 0.15, "segment": 0.5, "word": 0.1}

#: Tokens, times replicas, that are masked at a time; it bounds memory and changes nothing else.
PIECE_TOKENS = 1 << 20


@dataclass(frozen=True)
class MaskVocabulary:
    """What masking needs to know of a tokenizer.

    Attributes:
        mask_id: what a masked token becomes.
        special: [V] bool, ids that are never masked and never drawn.
        words: where words begin.
        random_ids: [*] int64 ids that a random token is drawn from.
    """

    mask_id: int
    special: np.ndarray
    words: WordMarks
    random_ids: np.ndarray

    @classmethod
    def of(
        cls, tokens: list[str], special_ids: list[int], mask_id: int | None, where: str
    ) -> MaskVocabulary:
        """From what a cache says of a tokenizer.

        Args:
            tokens: V token strings, empty for ids that name nothing.
            special_ids: ids of the special tokens; the mask token's may be left out.
            mask_id: the mask token's id.
            where: what needs it, for the message.

        Raises:
            ModelError: there is no mask token.
        """
        if mask_id is None:
            raise no_mask_token(where)
        special = np.zeros(len(tokens), dtype=bool)
        special[[*special_ids, mask_id]] = True
        named = np.fromiter(map(bool, tokens), dtype=bool, count=len(tokens))
        return cls(mask_id, special, word_marks(tokens), np.flatnonzero(named & ~special))


def no_mask_token(where: str) -> ModelError:
    """What is said of a tokenizer that cannot mask. where: what needs it, and which it is."""
    return ModelError(
        f"{where} has no mask token; masks need one: use the tokenizer of a masked model (BERT, "
        "RoBERTa, BART), train one with `mask: true`, or leave the signal out"
    )


def scheme_of(section: MasksSignal) -> Scheme:
    """The scheme of a recipe's signal, the paper's figures where it names none.

    For `word` every chosen word is masked, as MKD does; the recipe's shares are not used.
    """
    word = section.scheme == "word"
    return Scheme(
        name=section.scheme,
        probability=PROBABILITY[section.scheme]
        if section.probability is None
        else section.probability,
        mask_share=1.0 if word else section.mask_share,
        random_share=0.0 if word else section.random_share,
        span_p=section.span_p,
        span_max=section.span_max,
    )


def draw_masks(
    stream: Ragged,
    sample_ids: np.ndarray,
    rows: np.ndarray,
    vocabulary: MaskVocabulary,
    scheme: Scheme,
    replicas: int,
    seed: int,
) -> dict[str, Ragged]:
    """The masks of some samples.

    Args:
        stream: M samples of tokens, stored (`id` and `id_high`) or joined (`id`).
        sample_ids: [M, 16] uint8.
        rows: [M] int64 corpus rows.
        vocabulary: of the stream's tokenizer, V ids.
        scheme: how they are masked.
        replicas: R, maskings of every sample.
        seed: of the recipe.

    Returns:
        The columns of a masks signal, see `kdcache.formats.masks`.

    Raises:
        FormatError: a sample is too long for what is stored.
    """
    counts, positions, ids = [], [], []
    ends = np.cumsum(stream.lengths * replicas)
    begin = 0
    while begin < len(rows):
        done = int(ends[begin - 1]) if begin else 0
        stop = int(np.searchsorted(ends, done + PIECE_TOKENS, side="right"))
        piece = slice(begin, max(stop, begin + 1))
        begin = piece.stop
        pairs = np.repeat(np.arange(piece.start, piece.stop), replicas)  # [A]
        keys = np.stack(
            [
                sample_keys(seed, "mask", "", sample_ids[piece], rows[piece], replica)
                for replica in range(replicas)
            ],
            axis=1,
        )  # [M, R]
        drawn = _draw(stream.take(pairs), keys.reshape(-1), vocabulary, scheme)
        counts.append(drawn[0].reshape(-1, replicas))
        positions.append(drawn[1])
        ids.append(drawn[2])
    if not counts:
        none = np.zeros(0, dtype=np.int64)
        counts, positions, ids = [none.reshape(0, replicas)], [none], [none]
    return masks_columns(
        np.concatenate(counts),
        np.concatenate(positions),
        np.concatenate(ids),
        len(vocabulary.special),
    )


def _draw(
    stream: Ragged, keys: np.ndarray, vocabulary: MaskVocabulary, scheme: Scheme
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masked tokens of each pair [A], and their positions and ids [E]."""
    every = join_ids(stream.fields).astype(np.int64)
    lengths = stream.lengths
    place = segment_indices(np.zeros(len(lengths), dtype=np.int64), lengths)
    pair = np.repeat(np.arange(len(lengths)), lengths)
    after = np.ones(len(every), dtype=bool)  # follows a special token, or is the first
    after[1:] = vocabulary.special[every[:-1]] | (pair[1:] != pair[:-1])
    begins = after | vocabulary.words.begins[every]
    begins[1:] |= vocabulary.words.ends[every[:-1]]
    kept = np.flatnonzero(~vocabulary.special[every])
    tokens = Tokens(
        keys=keys,
        pair=pair[kept],
        position=place[kept],
        begins_word=begins[kept],
        begins_text=after[kept],
    )
    chosen, unit = choose(tokens, scheme)
    own = every[kept][chosen]
    ids = tokens.replaced(own, chosen, unit, vocabulary.mask_id, vocabulary.random_ids, scheme)
    counts = np.bincount(tokens.pair[chosen], minlength=len(keys))
    return counts, tokens.position[chosen], ids
