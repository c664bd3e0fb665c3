import pytest

from kdcache.formats.words import word_marks


def begins(vocabulary: list[str], text: list[str]) -> list[str]:
    """Tokens of a text that begin a word, the first taken as it is."""
    marks = word_marks(vocabulary)
    ids = [vocabulary.index(token) for token in text]
    return [
        text[i]
        for i in range(len(ids))
        if marks.begins[ids[i]] or (i > 0 and marks.ends[ids[i - 1]])
    ]


@pytest.mark.parametrize(
    ("text", "expected", "more"),
    [
        (["un", "##happ", "##y", "cat", "."], ["un", "cat", "."], ["##", "[CLS]", "▁", "Ġa"]),
        (["▁un", "happy", "▁cat", ".", "▁", "7"], ["▁un", "▁cat", "▁"], ["##", "Ġx", "a</w>"]),
        (["Un", "happy", "Ġcat", ".", "Ċ", "7"], ["Ġcat", "Ċ"], ["##", "##a", "▁", ""]),
        (["un", "happy</w>", "cat</w>", ".</w>"], ["cat</w>", ".</w>"], ["<s>", "##a", "@@"]),
        (["un@@", "happy", "cat", "."], ["cat", "."], ["@@", "▁", "Ġ", "##"][:1]),
        (["unhappy", "cat", "."], ["unhappy", "cat", "."], ["##", "@@", ""]),
    ],
    ids=["WordPiece", "SentencePiece", "byte-level BPE", "BPE with </w>", "BPE with @@", "words"],
)
def test_words_begin_where_the_marks_say(text, expected, more) -> None:
    assert begins([*text, *more], text) == expected


def test_an_empty_vocabulary_has_no_marks() -> None:
    marks = word_marks([])
    assert len(marks.begins) == len(marks.ends) == 0
