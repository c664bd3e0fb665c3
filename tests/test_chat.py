import json
import re

import pytest

from kdcache.errors import CorpusError, ModelError
from kdcache.text.chat import ChatTemplate
from tests.dump.world import make_lines
from tests.dump.zoo import CHAT_TEMPLATE, TOKENIZERS

LINES = make_lines(20)[0]
WORDS = sorted({word for line in LINES for word in line.split()})
CHATS = {
    "one turn": [("user", LINES[0]), ("assistant", LINES[1])],
    "three turns": [(role, LINES[i]) for i, role in enumerate(["user", "assistant"] * 3)],
    "a system": [("system", LINES[2]), ("user", LINES[3]), ("assistant", LINES[4])],
    "no assistant": [("user", LINES[5])],
    "ends with the user": [("user", "dog"), ("assistant", "cat"), ("user", "x")],
    "nothing said": [("user", "dog"), ("assistant", "")],
    "white space": [("user", " dog \n"), ("assistant", "  \n cat  "), ("user", "\t")],
    "not in the alphabet": [("user", "Ärger"), ("assistant", "日本 🙂 été")],
}
#: Without a mark of what is generated, and the same text with one around each answer.
PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)


def tokenizer(name: str, template: str | None):
    backend = TOKENIZERS[name](WORDS)
    backend.chat_template = template
    return backend


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def encode(backend, chat: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    return ChatTemplate(backend, "model").encode(json.dumps(chat))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("template", [MARKED, CHAT_TEMPLATE])
def test_a_template_that_marks_what_is_generated(chat, name, template):
    backend, turns = tokenizer(name, template), messages(CHATS[chat])
    expected = backend.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encode(backend, turns)
    assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])
    assert any(mask) == any(turn["role"] == "assistant" for turn in turns)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_template_without_marks_gives_what_its_marked_twin_gives(chat, name):
    turns = messages(CHATS[chat])
    expected = tokenizer(name, MARKED).apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    backend = tokenizer(name, PLAIN)
    ids, mask = encode(backend, turns)
    assert ids == expected["input_ids"] == backend.apply_chat_template(turns)["input_ids"]
    assert mask == expected["assistant_masks"]


def test_words_that_join_over_the_prompt_are_the_assistants():
    # The prompt ends inside the first token of the answer: byte pairs know " dog", not "dog".
    joined = PLAIN.replace("assistant\\n' }}{% endif", "assistant ' }}{% endif").replace(
        "message['role'] + '\\n'", "message['role'] + ' '"
    )
    backend = tokenizer("gpt2", joined)
    ids, mask = encode(backend, messages([("user", "cat"), ("assistant", "dog")]))
    written = [t for t, m in zip(backend.convert_ids_to_tokens(ids), mask, strict=True) if m]
    assert written[0] == "Ġdo"


def test_no_messages_no_tokens():
    template = ChatTemplate(tokenizer("qwen2", PLAIN), "model")
    assert template.encode("") == template.encode(" \n") == ([], [])


@pytest.mark.parametrize("form", ["%Y", "%d %b %Y", "%Y-%m-%d", "%B %-d, %Y (%A) %H:%M"])
def test_the_date_stands_still(form):
    dated = f"\n {{{{ strftime_now('{form}') }}}} is {{{{ messages[0]['content'] }}}}"
    fixed = {
        "%Y": "2024",
        "%d %b %Y": "26 Jul 2024",
        "%Y-%m-%d": "2024-07-26",
        "%B %-d, %Y (%A) %H:%M": "July 26, 2024 (Friday) 00:00",
    }[form]
    turns = messages([("user", "the dog")])
    expected = tokenizer("qwen2", f"\n {fixed} is {{{{ messages[0]['content'] }}}}")
    assert (
        encode(tokenizer("qwen2", dated), turns)[0]
        == (expected.apply_chat_template(turns)["input_ids"])
    )
    today = tokenizer("qwen2", dated).apply_chat_template(turns)["input_ids"]
    assert today != encode(tokenizer("qwen2", dated), turns)[0]


def test_a_template_of_several_is_the_default():
    backend = tokenizer("qwen2", {"default": PLAIN, "tool_use": "{{ 'tools' }}"})
    turns = messages(CHATS["one turn"])
    assert encode(backend, turns) == encode(tokenizer("qwen2", PLAIN), turns)


STRICT = (
    "{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}{% endif %}{% endfor %}" + PLAIN
)
#: Says the last answer otherwise than those before it, as reasoning models' templates do.
LAST = "('<think>' if loop.last and message['role'] == 'assistant' else '')"
FORGETFUL = PLAIN.replace("{{ message['content']", f"{{{{ {LAST} + message['content']")
FAULTS = {
    "text": (PLAIN, "Hello", "no messages: it is not the JSON of messages"),
    "no role": (PLAIN, '[{"content": "x"}]', r"no messages: message 0 \(from 0\) has no 'role'"),
    "empty": (PLAIN, "[]", "no messages: it holds no message"),
    "role": (
        STRICT,
        json.dumps(messages([("critic", "x")])),
        "the chat template refuses the messages: Unknown role: critic",
    ),
    "role, marked": (
        STRICT + "{% generation %}{% endgeneration %}",
        json.dumps(messages([("critic", "x")])),
        "the chat template refuses the messages: Unknown role: critic",
    ),
    "no JSON": (
        "{{ messages[0]['tools'][0] }}",
        json.dumps(messages([("user", "x")])),
        "the chat template refuses the messages: .*tools",
    ),
    "no template": (
        "{% for x in messages %}",
        json.dumps(messages([("user", "x")])),
        "the chat template refuses the messages: Unexpected end of template",
    ),
    "assistant first": (
        PLAIN,
        json.dumps(messages([("assistant", "x"), ("user", "x")])),
        "the assistant speaks first",
    ),
    "no prefixes": (
        FORGETFUL,
        json.dumps(messages(CHATS["three turns"])),
        r"writes message 1 \(from 0\) otherwise .* use a template with a {% generation %} block",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_clear_line(fault):
    template, text, expected = FAULTS[fault]
    with pytest.raises(CorpusError, match=expected) as error:
        ChatTemplate(tokenizer("qwen2", template), "model").encode(text)
    assert "\n" not in str(error.value)


def test_a_forgetful_template_serves_where_it_need_not_remember():
    ids, mask = encode(tokenizer("qwen2", FORGETFUL), messages(CHATS["one turn"]))
    assert 0 < sum(mask) < len(ids)


def test_tokenizers_that_cannot():
    with pytest.raises(ModelError, match="model: its tokenizer has no chat template") as error:
        ChatTemplate(tokenizer("gpt2", None), "model")
    assert "\n" not in str(error.value)
    slow = TOKENIZERS["marian"]([*make_lines(60)[0], *make_lines(60)[1]])
    slow.chat_template = PLAIN
    with pytest.raises(ModelError, match="expected a fast one") as error:
        ChatTemplate(slow, "model")
    assert "\n" not in str(error.value)
    assert re.search("marian", type(slow).__name__, re.IGNORECASE)
