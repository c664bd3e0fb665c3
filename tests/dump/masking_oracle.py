"""Masking one sample at a time in plain Python, from the same hashes: what masking.py must give."""

from fractions import Fraction

import numpy as np

from kdcache.formats.keyed import position_hash, sample_keys, text_key

WORD = 2**64


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
    return x ^ (x >> 31)


class Draws:
    """Hashes of one sample and replica."""

    def __init__(self, seed: int, sample_id: np.ndarray, row: int, replica: int) -> None:
        self.key = int(sample_keys(seed, "mask", "", sample_id[None], np.array([row]), replica)[0])

    def hash(self, purpose: str, position: int) -> int:
        key = mix(self.key ^ text_key(purpose))
        return int(position_hash(np.array([key], dtype=np.uint64), np.array([position]))[0])

    def uniform(self, purpose: str, position: int) -> float:
        return (self.hash(purpose, position) >> 11) / 2**53


def cut_words(ids, special, begins, ends) -> list[list[list[int]]]:
    """Stretches of text between special tokens, each a list of words, each a list of positions."""
    texts: list[list[list[int]]] = [[]]
    for at, token in enumerate(ids):
        if special[token]:
            texts.append([])
        elif not texts[-1] or begins[token] or ends[ids[at - 1]]:
            texts[-1].append([at])
        else:
            texts[-1][-1].append(at)
    return [text for text in texts if text]


def length_of(u: float, p: float, longest: int) -> int:
    weights = [p * (1 - p) ** i for i in range(longest)]
    done = 0.0
    for i, weight in enumerate(weights):
        done += weight / sum(weights)
        if u < done:
            return i + 1
    return longest


def choose(ids, scheme, draws, special, begins, ends) -> list[int]:
    texts = cut_words(ids, special, begins, ends)
    words = [word for text in texts for word in text]
    regular = [position for word in words for position in word]
    if not regular:
        return []
    exact = Fraction(len(regular) * scheme.probability)  # Python rounds halves to even
    budget = min(max(1, round(exact)), len(regular))
    if scheme.name == "bert":
        return sorted(sorted(regular, key=lambda at: draws.hash("order", at))[:budget])
    if scheme.name == "segment":
        places = len(regular) - budget + 1
        start = int(draws.uniform("segment", 0) * places)
        return regular[start : start + budget]
    if scheme.name == "word":
        taken = [w for w in words if draws.uniform("word", w[0]) < scheme.probability]
        return [position for word in taken for position in word]
    order = sorted(words, key=lambda word: draws.hash("order", word[0]))
    masked: set[int] = set()
    for word in order:
        if word[0] in masked:
            continue
        span = [word]
        if scheme.name == "span":
            length = length_of(draws.uniform("length", word[0]), scheme.span_p, scheme.span_max)
            (text,) = [text for text in texts if word in text]
            span = text[text.index(word) :][:length]
        for part in span:
            if part[0] not in masked and len(masked) + len(part) > budget:
                break
            masked.update(part)
    return sorted(masked or order[0])


def mask_sample(ids, scheme, draws, vocabulary) -> list[tuple[int, int]]:
    """(position, id) of every masked token."""
    special, words = vocabulary.special, vocabulary.words
    chosen = choose(ids, scheme, draws, special, words.begins, words.ends)
    out: list[tuple[int, int]] = []
    begun = 0  # where the run of masked tokens began
    for n, position in enumerate(chosen):
        if scheme.name != "span" or n == 0 or chosen[n - 1] != position - 1:
            begun = position
        kind = draws.uniform("kind", begun)
        token = ids[position]
        if kind < scheme.mask_share:
            token = vocabulary.mask_id
        elif kind < scheme.mask_share + scheme.random_share:
            pool = vocabulary.random_ids
            token = pool[int(draws.uniform("random", position) * len(pool))]
        out.append((position, int(token)))
    return out
