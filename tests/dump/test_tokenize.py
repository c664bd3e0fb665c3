import json

import pytest
from transformers import AutoTokenizer

from kdcache.dump.tokenize import Tokenizer, train_sentencepiece
from kdcache.errors import ModelError
from kdcache.recipe import SentencePieceTokenizer
from tests.dump.world import FAMILIES

SECTION = SentencePieceTokenizer(vocab_size=30)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_tokenizers_own(world, family):
    tokenizer = Tokenizer.load(str(world.root / family))
    backend = AutoTokenizer.from_pretrained(world.root / family)
    assert tokenizer.encode(world.src, False) == backend(world.src)["input_ids"]
    assert tokenizer.encode(world.tgt, True) == backend(text_target=world.tgt)["input_ids"]
    assert tokenizer.encode([], True) == []
    ragged = tokenizer.encode_ragged(world.tgt, True)
    flat = [i for ids in tokenizer.encode(world.tgt, True) for i in ids]
    assert ragged.fields["id"].tolist() == flat
    assert tokenizer.vocab_size == len(backend)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_make_the_same_tokenizer(world, family, tmp_path):
    tokenizer = Tokenizer.load(str(world.root / family))
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    again = Tokenizer.load(str(tmp_path))
    assert again.digest == tokenizer.digest
    assert again.files() == tokenizer.files()
    assert again.encode(world.src, False) == tokenizer.encode(world.src, False)
    tokens = json.loads(tokenizer.files()["tokens.json"])
    assert len(tokens) == tokenizer.vocab_size
    assert tokens[tokenizer.special_ids["eos_id"]] == "</s>"


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_again_keeps_the_digest(world, family, tmp_path):
    AutoTokenizer.from_pretrained(world.root / family).save_pretrained(tmp_path)
    again, first = Tokenizer.load(str(tmp_path)), Tokenizer.load(str(world.root / family))
    assert again.digest == first.digest


def test_sentencepiece_is_deterministic_and_numbered_for_marian(world):
    first = train_sentencepiece(iter(world.src), SECTION, "spm")
    second = train_sentencepiece(iter([*world.src, "", "  "]), SECTION, "spm")
    assert first.files() == second.files()
    assert first.digest == second.digest
    other = train_sentencepiece(iter(world.tgt), SECTION, "spm")
    assert first.digest != other.digest
    assert first.special_ids == {"pad_id": 0, "unk_id": 1, "eos_id": 3, "bos_id": None}
    assert first.tokens()[:4] == ["<pad>", "<unk>", "<s>", "</s>"]
    assert first.vocab_size == 30
    assert first.max_length is None
    assert all(ids[-1] == 3 and 1 not in ids for ids in first.encode(world.src, False))


def test_bpe(world):
    section = SentencePieceTokenizer(vocab_size=50, model_type="bpe")
    assert train_sentencepiece(world.src, section, "spm").vocab_size == 50


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [
        (["a b c"] * 9, 4000, "spm: SentencePiece cannot train 4000 pieces: .*too high"),
        ([], 50, "spm: SentencePiece cannot train 50 pieces: no text"),
    ],
)
def test_sentencepiece_faults(lines, size, message):
    with pytest.raises(ModelError, match=message) as error:
        train_sentencepiece(lines, SentencePieceTokenizer(vocab_size=size), "spm")
    assert "\n" not in str(error.value)


def test_directories_without_a_tokenizer(world, tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ModelError, match=str(path)) as error:
            Tokenizer.load(str(path))
        assert "\n" not in str(error.value)
