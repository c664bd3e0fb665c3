"""Pairs, special and added tokens, large vocabularies: transformers' own numbers are expected."""

import json

import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from kdcache.dump.tokenize import Tokenizer
from kdcache.text.tokenizers import all_special_ids
from tests.dump.world import make_lines
from tests.dump.zoo import TOKENIZERS

SRC, TGT = make_lines(60)
WORDS = sorted({word for line in [*SRC, *TGT] for word in line.split()})
NAMES = ["bert", "distilbert", "roberta", "modernbert", "gpt2", "llama", "t5", "mbart", "marian"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for name in NAMES:
        lines = [*SRC, *TGT] if name == "marian" else WORDS
        TOKENIZERS[name](lines).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_the_tokenizers_own(name, target, directories):
    texts, pairs = SRC[:12], list(TGT[:12])
    pairs[3], pairs[4], pairs[7] = "", " ", ""
    found = Tokenizer.load(str(directories / name)).encode_pairs(texts, pairs, target)
    backend = AutoTokenizer.from_pretrained(directories / name)
    first, second = ("text_target", "text_pair_target") if target else ("text", "text_pair")
    for row, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        sides = {first: text, second: pair} if pair.strip() else {first: text}
        expected = backend(**sides)
        begin, end = found.offsets[row], found.offsets[row + 1]
        assert found.fields["id"][begin:end].tolist() == expected["input_ids"]
        types = expected.get("token_type_ids", [0] * len(expected["input_ids"]))
        assert found.fields["segment"][begin:end].tolist() == types
    assert found.fields["segment"].dtype == "uint8"
    assert (found.fields["segment"].max() == 1) == (name == "bert")


@pytest.mark.parametrize("pairs", [[], ["a"] * 2, [""] * 2])
def test_pairs_of_one_kind_alone(pairs, directories):
    tokenizer = Tokenizer.load(str(directories / "bert"))
    found = tokenizer.encode_pairs(SRC[: len(pairs)], pairs, False)
    assert len(found) == len(pairs)


@pytest.mark.parametrize("name", NAMES)
def test_special_ids_and_the_mask(name, directories):
    tokenizer = Tokenizer.load(str(directories / name))
    backend = AutoTokenizer.from_pretrained(directories / name)
    assert tokenizer.mask_id == backend.mask_token_id
    flagged = {i for i, token in backend.added_tokens_decoder.items() if token.special}
    assert tokenizer.special_ids_all == flagged | set(backend.all_special_ids)
    assert (tokenizer.mask_id is not None) == (
        name in ("bert", "distilbert", "roberta", "modernbert", "mbart")
    )


@pytest.mark.parametrize("name", NAMES)
def test_added_tokens_count_and_change_the_digest(name, directories, tmp_path):
    before = Tokenizer.load(str(directories / name))
    added = {}
    for kind in ("plain", "special"):
        backend = AutoTokenizer.from_pretrained(directories / name)
        token = AddedToken("<new>", special=kind == "special", normalized=False)
        assert backend.add_tokens([token], special_tokens=kind == "special") == 1
        backend.save_pretrained(tmp_path / kind)
        added[kind] = Tokenizer.load(str(tmp_path / kind))
        again = AutoTokenizer.from_pretrained(tmp_path / kind)
        new = again.convert_tokens_to_ids("<new>")
        assert added[kind].vocab_size == len(again) == before.vocab_size + 1 == new + 1
        text = ["the <new> dog"]
        assert added[kind].encode(text, False) == again(text)["input_ids"]
        assert new in added[kind].encode(text, False)[0]
        assert (new in added[kind].special_ids_all) == (kind == "special")
        assert json.loads(added[kind].files()["tokens.json"])[new] == "<new>"
    assert before.digest not in {tokenizer.digest for tokenizer in added.values()}


def large_tokenizer(num_words: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, ...; the last ones have ids of three bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocab = {"<pad>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(num_words)}}
    backend = Backend(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def test_ids_of_three_bytes_and_tokens_added_behind_them(tmp_path):
    backend = large_tokenizer(70_000)
    backend.add_tokens(["<left>", "<right>"])
    backend.add_special_tokens({"mask_token": "<mask>"})
    backend.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.vocab_size == len(backend) == 70_005
    assert tokenizer.mask_id == 70_004
    assert tokenizer.special_ids_all == {0, 1, 70_004}
    found = tokenizer.encode_ragged(["w0 w65534 <left> w69999 <mask> nothing"], False)
    assert found.fields["id"].tolist() == [2, 65_536, 70_002, 70_001, 70_004, 1]


def test_a_word_with_a_role_is_special():
    backend = large_tokenizer(10)
    backend.pad_token = "w3"
    assert all_special_ids(backend) == {0, 1, 5}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_chat_template_travels_with_the_files(name, tmp_path):
    (tmp_path / "copy").mkdir()
    TOKENIZERS[name](WORDS).save_pretrained(tmp_path / "saved")
    tokenizer = Tokenizer.load(str(tmp_path / "saved"))
    for file, data in tokenizer.files().items():
        (tmp_path / "copy" / file).write_bytes(data)
    again = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert again.chat_template == AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template
    text = '[{"role": "user", "content": "the dog"}]'
    assert (
        tokenizer.chat.encode(text)[0] == (again.apply_chat_template(json.loads(text))["input_ids"])
    )
