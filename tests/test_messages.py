import json

import pytest

from kdcache.text.messages import canonical, parse

CHAT = [
    {"role": "user", "content": "Wie geht's? \u2028 \u00e4"},
    {"role": "assistant", "content": ""},
]


def test_one_conversation_has_one_text() -> None:
    shuffled = [{"content": m["content"], "role": m["role"]} for m in CHAT]
    text = canonical(CHAT)
    assert text == canonical(shuffled)
    assert text.startswith('[{"content":"Wie geht\'s? \u2028 \u00e4","role":"user"},')
    assert parse(text) == CHAT == json.loads(text)
    assert parse(json.dumps(CHAT, indent=2)) == CHAT


def test_what_a_template_reads_beside_them_is_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "n": [1, 2.5]}]}
    assert parse(canonical([call])) == [call]


def test_no_message_is_no_text() -> None:
    assert canonical([]) == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hi", "expected a list of messages, found text"),
        ({"role": "user"}, "expected a list of messages, found an object"),
        (["hi"], r"message 0 \(from 0\) is text, expected an object"),
        ([CHAT[0], 3], r"message 1 \(from 0\) is a number, expected an object"),
        ([{"content": "x"}], r"message 0 \(from 0\) has no 'role'; it has \['content'\]"),
        ([{"role": "user"}], r"message 0 \(from 0\) has no 'content'; it has \['role'\]"),
        ([{"role": None, "content": ""}], "'role' of message 0 .* should be text, found null"),
        ([{"role": "u", "content": [1]}], "'content' of message 0 .* text, found a list"),
        ([{"role": "u", "content": True}], "'content' of message 0 .* text, found a boolean"),
        ([{"role": "u", "content": "", "x": float("nan")}], "not JSON compliant"),
    ],
)
def test_what_is_no_message(value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        canonical(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", "it is not the JSON of messages"),
        ("[" * 100_000, "it is not the JSON of messages"),
        ("[]", "it holds no message"),
        ("7", "expected a list of messages, found a number"),
        ('["a"]', "is text, expected an object"),
    ],
)
def test_texts_that_hold_no_messages(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse(text)
