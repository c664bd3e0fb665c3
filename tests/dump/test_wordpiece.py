"""Tokenizers of BERT's kind that are trained on the corpus."""

from collections import Counter

import pytest

from kdcache.dump.wordpiece import SPECIAL, train_wordpiece
from kdcache.errors import ModelError
from kdcache.recipe import WordPieceTokenizer
from tests.train.conftest import make_lines

LINES = [*make_lines(60)[0], "Naïve, isn't it?"]


def trained(**keys):
    return train_wordpiece(LINES, WordPieceTokenizer(kind="wordpiece", **keys), "pieces")


def longest_first(word, known):
    """BERT's rule by hand."""
    found, start = [], 0
    while start < len(word):
        for stop in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:stop]
            if piece in known:
                found.append(piece)
                break
        else:
            return ["[UNK]"]
        start = stop
    return found


def test_pieces_cover_the_corpus_and_are_the_same_every_time():
    made, again = trained(vocab_size=90), trained(vocab_size=90)
    assert made.digest == again.digest
    tokens = made.tokens()
    assert tuple(tokens[:5]) == SPECIAL
    assert len(tokens) == len(set(tokens)) == made.vocab_size <= 90
    for text in ("the horses hunt", "naive it isnt"):
        (ids,) = made.encode([text], False)
        pieces = [piece for word in text.split() for piece in longest_first(word, set(tokens))]
        assert [tokens[n] for n in ids] == ["[CLS]", *pieces, "[SEP]"]
        assert "[UNK]" not in pieces
    (ids,) = made.encode(["Naïve [MASK] 東"], False)
    assert [tokens[n] for n in ids][-3:] == ["[MASK]", "[UNK]", "[SEP]"]
    assert made.mask_id == 4
    pair = made.encode_pairs(["the cat", "crow"], ["a dog", ""], False)
    first = pair.fields["segment"][: pair.offsets[1]]
    assert (first.min(), first.max()) == (0, 1)
    assert not pair.fields["segment"][pair.offsets[1] :].any()


def test_words_are_the_most_frequent():
    made = trained(vocab_size=12, words=True, lower=False)
    counts = Counter(word for line in LINES for word in line.split())
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:7]
    assert made.tokens() == [*SPECIAL, *kept]
    (ids,) = made.encode(["the quick mouse"], False)
    assert [made.tokens()[n] for n in ids][2] == "[UNK]"


def test_too_small_a_vocabulary_is_refused_in_a_line():
    with pytest.raises(
        ModelError, match=r"vocab_size is 20; the corpus has .* take at least"
    ) as found:
        trained(vocab_size=20)
    assert "\n" not in str(found.value)
    with pytest.raises(ModelError, match="found no text"):
        train_wordpiece(["", " "], WordPieceTokenizer(kind="wordpiece"), "pieces")
