"""Tiny teachers of three families, a made-up corpus, and what the dump's tests share."""

from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from kdcache.dump.tokenize import train_sentencepiece
from kdcache.formats.cache import open_cache
from kdcache.formats.stores.store import STATUS
from kdcache.recipe import SentencePieceTokenizer

FAMILIES = ["marian", "t5", "bart"]
CODECS = {
    "threshold": {"name": "threshold", "c": "1/8"},
    "topk": {"name": "topk", "k": 4, "values": "float32"},
    "nucleus": {"name": "nucleus", "p": 0.7, "k_max": 6, "values": "float16"},
    "sampled": {"name": "sampled", "n": 20},
    "full": {"name": "full", "values": "float32"},
}
THRESHOLD = CODECS["threshold"]
NOUNS = ["cat", "dog", "bird", "fish", "horse", "mouse", "crow"]
VERBS = ["sees", "hears", "likes", "hunts"]


def make_lines(count: int) -> tuple[list[str], list[str]]:
    """Source and target lines of different lengths, each row its own."""
    src, tgt = [], []
    for i in range(count):
        a, b, v = NOUNS[i % 7], NOUNS[(i // 7) % 7], VERBS[i % 4]
        more = [NOUNS[(i + j) % 7] for j in range(i % 5)]
        src.append(" ".join(["the", a, v, "the", b, *more]))
        tgt.append(" ".join(["ein", b, "wird", "von", a, v, *more[: i % 3]]))
    return src, tgt


def word_tokenizer(words: list[str], bart: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends (for BART also begins) as its family does."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    special = ["<s>", "<pad>", "</s>", "<unk>"] if bart else ["<pad>", "</s>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*special, *words])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>" if bart else "$A </s>",
        special_tokens=[(name, vocab[name]) for name in special if name in ("<s>", "</s>")],
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if bart:
        names["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)


def save(model, tokenizer, directory: Path) -> None:
    """Save with sharper weights than the default, so that distributions are not flat."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn(1, model.config.vocab_size))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_marian(directory: Path, lines: list[str]) -> None:
    tokenizer = train_sentencepiece(lines, SentencePieceTokenizer(vocab_size=36), "test")
    directory.mkdir()
    for name, data in tokenizer.files().items():
        (directory / name).write_bytes(data)
    torch.manual_seed(1)
    config = MarianConfig(
        vocab_size=tokenizer.vocab_size,
        decoder_vocab_size=tokenizer.vocab_size,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
        decoder_start_token_id=0,
        forced_eos_token_id=3,
    )
    model = MarianMTModel(config)
    with torch.no_grad():
        model.final_logits_bias.copy_(torch.randn(1, tokenizer.vocab_size))
    model.save_pretrained(directory)


def make_t5(directory: Path, lines: list[str]) -> None:
    words = sorted({word for line in lines for word in line.split()})
    tokenizer = word_tokenizer(words, bart=False)
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=len(tokenizer) + 5,  # more output rows than the tokenizer has ids
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    save(T5ForConditionalGeneration(config), tokenizer, directory)


def make_bart(directory: Path, lines: list[str]) -> None:
    words = sorted({word for line in lines for word in line.split()})
    tokenizer = word_tokenizer(words, bart=True)
    torch.manual_seed(3)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=48,
    )
    save(BartForConditionalGeneration(config), tokenizer, directory)


def tree(root: Path) -> dict[str, bytes]:
    """Every file of a cache; how far the dump is, is no part of it."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.parent.name != STATUS
    }


def rows_of(path) -> list[int]:
    cache = open_cache(path)
    return [int(r) for shard in range(cache.num_shards) for r in cache.samples(shard).row]


def changed_corpus(world, root, change):
    src, tgt = change(list(world.src), list(world.tgt))
    for name, lines in (("s", src), ("t", tgt)):
        (root / name).write_text("".join(line + "\n" for line in lines))
    return {"fields": {"src": str(root / "s"), "tgt": str(root / "t")}}


def teacher_at(path):
    return {"teacher": {"path": str(path), "device": "cpu"}}


class Killed(BaseException):
    """Stands for the end of the process."""
