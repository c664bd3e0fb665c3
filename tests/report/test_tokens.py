"""Readable tokens: byte-level vocabularies against the tokenizers library's own decoder."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import decoders, pre_tokenizers

from kdcache.report.sample_text import sample_text
from kdcache.report.signal_text import ranges
from kdcache.report.text import one_line
from kdcache.report.tokens import names_of, readable

TEXTS = ["Grüße an alle", " naïve Ärger", "\n数据 流", "tab\there", "plain"]


def byte_level(text: str) -> str:
    """A text as one token of a byte-level vocabulary."""
    parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in parts)


def test_bytes_become_letters_and_spaces_stay_visible() -> None:
    tokens = [byte_level(text) for text in TEXTS]
    shown = readable([*tokens, "Ġthe"])
    for token, text in zip(shown, TEXTS, strict=False):
        assert token.replace("Ġ", " ").replace("Ċ", "\n") == text
    assert shown[0] == "GrüßeĠanĠalle"
    decoder = decoders.ByteLevel()
    for letter in map(chr, range(256)):  # every byte, through the library's own table
        token = byte_level(letter)
        assert decoder.decode([token]) == letter
        assert readable([token, "Ġ"])[0].replace("Ġ", " ").replace("Ċ", "\n") == letter


def test_what_is_no_whole_text_stays() -> None:
    half = byte_level("ü")[:1]
    kept = [half, "<|endoftext|>", "<数据>"]
    assert readable([*kept, "Ġ"])[:3] == kept


def test_other_vocabularies_stay_as_they_are() -> None:
    tokens = ["▁the", "Ã¼", "##ing", "é"]
    assert readable(tokens) == tokens


def test_ids_beyond_the_vocabulary_are_numbers() -> None:
    assert names_of(["a", "b"], np.array([1, 0, 7])) == ["b", "a", "<7>"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([1, 2], "1, 2"),
        ([0, 1, 2, 3], "0-3"),
        ([0, 2, 3, 4, 6, 12], "0, 2-4, 6, 12"),
    ],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_one_line_escapes_what_could_move_a_cursor() -> None:
    assert one_line("a\nb\tc\x1b[31m é") == "a\\nb\\tc\\x1b[31m é"
    assert one_line("a" * 5, 3) == "aaa ... 2 more characters"


def test_long_samples_are_cut() -> None:
    label = {"target": "a\n", "target_probability": 0.5, "entropy_nats": 1.0, "position": 1}
    label |= {"num_exact": 9, "exact": [("x", 0.1)] * 9}
    words = ["w"] * 100
    masked = [{"position": 99, "token": "w", "shown": "m"}]
    sample = {
        "row": 1,
        "task": None,
        "fields": {"text": "long " * 100},
        "tokens": {"text": words},
        "extras": {"text": {"segment": [0] * 50 + [1] * 50}},
        "labels": {
            "full": [label] * 20,
            "beams": [{"log_prob_nats": -1.0, "score": -1.0, "tokens": words}] * 9,
            "masks": [masked] * 9,
            "classes": [[(f"label{n}", 0.1) for n in range(10)]],
            "none": [],
        },
    }
    kinds = {"full": "logits", "beams": "beams", "masks": "masks", "classes": "classes"}
    kinds["none"] = "logits"
    signals = {
        name: {"kind": kind, "at": "positions", "stream": "text"} for name, kind in kinds.items()
    }
    text = sample_text(sample, signals)
    for line in (
        "more characters",
        "a\\n ",
        "x 0.100 x 0.100 x 0.100 x 0.100 +5",
        "... 8 more labels",
        "... 5 more hypotheses",
        "... 5 more maskings",
        "label3 0.100 +6",
        "none: no labels here",
        "text tokens  w w",
        " | w",
    ):
        assert line in text, line
    assert max(map(len, text.split("\n"))) < 400
