"""The masking schemes: which tokens each of them chooses, and what comes to stand there.

What is random is a hash; what has an order (words until a budget is spent) goes word after word
for all samples at once, so the number of steps is the number of words of the longest sample.
"""

# A (sample, replica) pairs, N tokens that can be masked, W words, E masked tokens, L span length

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kdcache.formats.keyed import mix64, position_hash, text_key
from kdcache.formats.ragged import offsets_of


@dataclass(frozen=True)
class Scheme:
    """How samples are masked.

    Attributes:
        name: bert, whole_word, span, segment or word.
        probability: share of tokens that are chosen, of words for `word`.
        mask_share: share of the chosen that become the mask token.
        random_share: share that become a random token; the others keep their own.
        span_p: parameter of the geometric span length.
        span_max: longest span, in words.
    """

    name: str
    probability: float
    mask_share: float
    random_share: float
    span_p: float
    span_max: int

    def parameters(self) -> dict[str, float]:
        """The figures that the scheme uses, by name."""
        shares = () if self.name == "word" else ("mask_share", "random_share")
        spans = ("span_p", "span_max") if self.name == "span" else ()
        return {name: float(getattr(self, name)) for name in ("probability", *shares, *spans)}


@dataclass(frozen=True)
class Tokens:
    """The tokens that can be masked, one pair of sample and replica after another.

    Attributes:
        keys: [A] uint64 key of each pair.
        pair: [N] int64 which pair a token is of, ascending.
        position: [N] int64 where it is in its sample, ascending within a pair.
        begins_word: [N] bool.
        begins_text: [N] bool, it is the first of its sample or follows a special token.
    """

    keys: np.ndarray
    pair: np.ndarray
    position: np.ndarray
    begins_word: np.ndarray
    begins_text: np.ndarray

    @cached_property
    def counts(self) -> np.ndarray:
        """[A] int64 tokens of each pair."""
        return np.bincount(self.pair, minlength=len(self.keys))

    @cached_property
    def first(self) -> np.ndarray:
        """[A] int64 index of the first token of each pair."""
        return offsets_of(self.counts)[:-1]

    def hashes(self, purpose: str, pair: np.ndarray, position: np.ndarray) -> np.ndarray:
        """[*] uint64 hash of some positions of some pairs, another for every purpose."""
        keys = mix64(self.keys ^ np.uint64(text_key(purpose)))
        return position_hash(keys[pair], position)

    def uniforms(self, purpose: str, pair: np.ndarray, position: np.ndarray) -> np.ndarray:
        """[*] float64 in [0, 1) from the 53 upper bits of `hashes`."""
        hashes = self.hashes(purpose, pair, position)
        return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def budgets(self, probability: float) -> np.ndarray:
        """[A] int64 tokens that may be masked: round(p n), at least 1 where there is one."""
        wanted = np.rint(self.counts * probability).astype(np.int64)
        return np.clip(wanted, np.minimum(self.counts, 1), self.counts)

    def replaced(
        self,
        own: np.ndarray,
        chosen: np.ndarray,
        unit: np.ndarray,
        mask_id: int,
        random_ids: np.ndarray,
        scheme: Scheme,
    ) -> np.ndarray:
        """What stands where a token was chosen.

        Args:
            own: [E] int64 ids that stood there.
            chosen: [E] int64 tokens.
            unit: [E] int64 position that the choice of mask, random or own belongs to.
            mask_id: of the mask token.
            random_ids: ids that a random token is drawn from.
            scheme: its shares.

        Returns:
            [E] int64.
        """
        pair = self.pair[chosen]
        kind = self.uniforms("kind", pair, unit)
        drawn = self.uniforms("random", pair, self.position[chosen])
        place = np.minimum((drawn * len(random_ids)).astype(np.int64), len(random_ids) - 1)
        random = kind < scheme.mask_share + scheme.random_share
        ids = np.where(random, random_ids[place], own) if len(random_ids) else own
        return np.where(kind < scheme.mask_share, mask_id, ids)


@dataclass(frozen=True)
class Words:
    """The words of the tokens, and an order for each pair in which they are tried.

    Attributes:
        first: [W] int64 first token of each word.
        size: [W] int64 tokens of each.
        pair: [W] int64 pair of each.
        counts: [A] int64 words of each pair.
        text_end: [W] int64 the word after the last of the same stretch of text.
    """

    first: np.ndarray
    size: np.ndarray
    pair: np.ndarray
    counts: np.ndarray
    text_end: np.ndarray

    @classmethod
    def of(cls, tokens: Tokens) -> Words:
        """Cut the tokens at word beginnings."""
        first = np.flatnonzero(tokens.begins_word)
        size = np.diff(first, append=len(tokens.pair))
        pair = tokens.pair[first]
        text = np.flatnonzero(tokens.begins_text[first])  # word that each stretch begins with
        stretch = np.diff(text, append=len(first))
        text_end = np.repeat(text + stretch, stretch)
        return cls(first, size, pair, np.bincount(pair, minlength=len(tokens.keys)), text_end)

    def order(self, tokens: Tokens) -> np.ndarray:
        """[W] int64 words, pair after pair, each pair's in a random order."""
        hashes = tokens.hashes("order", self.pair, tokens.position[self.first])
        return np.lexsort((hashes, self.pair))

    def to_tokens(self, chosen: np.ndarray) -> np.ndarray:
        """[E] int64 tokens of the chosen words. chosen: [W] bool."""
        return np.flatnonzero(np.repeat(chosen, self.size))


def choose(tokens: Tokens, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that a scheme chooses.

    Returns:
        [E] int64 tokens, ascending, and for each the position [E] that decides, with its pair,
        whether a mask, a random token or its own comes to stand there: the token's own, and
        for `span` that of the first token of its run.
    """
    by_name = {
        "bert": choose_tokens,
        "whole_word": choose_words,
        "span": choose_spans,
        "segment": choose_segment,
        "word": choose_each_word,
    }
    chosen = by_name[scheme.name](tokens, scheme)
    if scheme.name != "span":
        return chosen, tokens.position[chosen]
    pair, position = tokens.pair[chosen], tokens.position[chosen]
    goes_on = np.zeros(len(chosen), dtype=bool)
    goes_on[1:] = (pair[1:] == pair[:-1]) & (position[1:] == position[:-1] + 1)
    begun = np.maximum.accumulate(np.where(goes_on, 0, np.arange(len(chosen))))
    return chosen, position[begun]


def choose_tokens(tokens: Tokens, scheme: Scheme) -> np.ndarray:
    """BERT: as many tokens as the budget says, every set of them equally probable.

    Mask, random or own is decided token by token.
    """
    order = np.lexsort((tokens.hashes("order", tokens.pair, tokens.position), tokens.pair))
    rank = np.arange(len(order)) - tokens.first[tokens.pair]  # pairs keep their places
    chosen = order[rank < tokens.budgets(scheme.probability)[tokens.pair]]
    return np.sort(chosen)


def choose_words(tokens: Tokens, scheme: Scheme) -> np.ndarray:
    """Whole words in a random order; one that exceeds what is left of the budget is left out.

    So does BERT's released code, and like it this decides mask, random or own token by token.
    Where no word fits at all the first in the order is taken, whole: the code takes none, which
    its long texts never see.
    """
    words = Words.of(tokens)
    return words.to_tokens(_spend(tokens, words, np.ones_like(words.size), scheme))


def choose_spans(tokens: Tokens, scheme: Scheme) -> np.ndarray:
    """SpanBERT: spans of words, their lengths geometric, until the budget is spent.

    A span begins at a word that is not masked yet, all such words equally probable, and goes on
    over so many words; those that were masked before count in its length. It ends early with
    its stretch of text, and before a word that exceeds what is left of the budget: spans are of
    whole words, as the paper says, and the budget holds (the released code cuts the last word).
    A word to begin with that does not fit is left out, and where none fits at all the first in
    the order is taken. Mask, random or own is decided for each run of masked tokens, so spans
    that touch are one, as in the released code.
    """
    words = Words.of(tokens)
    drawn = tokens.uniforms("length", words.pair, tokens.position[words.first])
    lengths = span_lengths(drawn, scheme.span_p, scheme.span_max)
    return words.to_tokens(_spend(tokens, words, lengths, scheme))


def span_lengths(drawn: np.ndarray, p: float, longest: int) -> np.ndarray:
    """Geometric lengths in words, those above the longest drawn again.

    P(L) = p (1 - p)^(L - 1) / (1 - (1 - p)^longest): with p = 0.2 and 10 words the mean is the
    paper's 3.8 (lengths cut to 10 would have 4.5).

    Args:
        drawn: [*] float64 uniform in [0, 1).
        p: parameter.
        longest: most words.

    Returns:
        [*] int64 in [1, longest].
    """
    # Products and sums one by one: no power function, whose last bit depends on the machine.
    weights = np.multiply.accumulate(np.concatenate([[1.0], np.full(longest - 1, 1 - p)]))
    sums = np.add.accumulate(weights)
    return 1 + np.searchsorted(sums[:-1] / sums[-1], drawn, side="right").astype(np.int64)


def _spend(tokens: Tokens, words: Words, lengths: np.ndarray, scheme: Scheme) -> np.ndarray:
    """[W] bool: words of spans that begin at each word in turn, while the budget lasts."""
    order, offsets = words.order(tokens), offsets_of(words.counts)
    left = tokens.budgets(scheme.probability)  # [A]
    chosen = np.zeros(len(order) + 1, dtype=bool)  # one more for words beyond the end
    size = np.append(words.size, 0)
    steps = np.arange(int(lengths.max(initial=1)))  # [L]
    active = np.flatnonzero(left)
    for rank in range(int(words.counts.max(initial=0))):
        active = active[(left[active] > 0) & (words.counts[active] > rank)]
        if not len(active):
            break
        begin = order[offsets[active] + rank]
        free = ~chosen[begin]
        begin, of = begin[free], active[free]
        span = begin[:, None] + steps  # [A, L] words
        inside = (steps < lengths[begin, None]) & (span < words.text_end[begin, None])
        span = np.where(inside, span, len(order))
        cost = np.where(chosen[span], 0, size[span])
        spent = np.cumsum(cost, axis=1)
        fits = inside & (spent <= left[of, None])
        chosen[span[fits]] = True
        left[of] -= np.where(fits, cost, 0).sum(axis=1)
    chosen = chosen[:-1]
    none = np.bincount(words.pair[chosen], minlength=len(left)) == 0
    chosen[order[offsets[:-1][none & (words.counts > 0)]]] = True
    return chosen


def choose_segment(tokens: Tokens, scheme: Scheme) -> np.ndarray:
    """MASS: one segment of so much of the sample, every place equally probable.

    round(p n) tokens, at least 1. Mask, random or own is decided token by token, 80/10/10 in
    the paper. Its released code begins a fifth of the segments at the first token and a fifth
    at the last place; the paper says random, and uniform is what is done here. Special tokens
    inside a segment (of a pair of texts) are stepped over.
    """
    length = tokens.budgets(scheme.probability)  # [A]
    zero = np.zeros(len(length), dtype=np.int64)
    drawn = tokens.uniforms("segment", np.arange(len(length)), zero)
    places = tokens.counts - length + 1
    start = tokens.first + np.minimum((drawn * places).astype(np.int64), places - 1)
    index = np.arange(len(tokens.pair))
    inside = (index >= start[tokens.pair]) & (index < (start + length)[tokens.pair])
    return np.flatnonzero(inside)


def choose_each_word(tokens: Tokens, scheme: Scheme) -> np.ndarray:
    """MKD: every word by itself with the probability, so a sample may have none.

    All its pieces become mask tokens; nothing is replaced at random or kept.
    """
    words = Words.of(tokens)
    drawn = tokens.uniforms("word", words.pair, tokens.position[words.first])
    return words.to_tokens(drawn < scheme.probability)
