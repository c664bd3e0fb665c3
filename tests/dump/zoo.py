"""Tiny random models of many architectures, each with a tokenizer of its family's kind."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertTokenizer,
    DistilBertTokenizer,
    GPT2Tokenizer,
    MBart50Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5EncoderModel,
)

from tests.dump.world import word_tokenizer

#: Architecture to the heads that it can have.
ENCODER_DECODERS = ("marian", "t5", "bart", "mbart")
CAUSAL = ("gpt2", "llama", "qwen2", "qwen3", "gemma2")
MASKED = ("bert", "roberta", "modernbert", "distilbert")
ARCHITECTURES = (*ENCODER_DECODERS, *CAUSAL, *MASKED)
CLASSIFIERS = ("bart", "t5", *CAUSAL, *MASKED)
ENCODERS = ("t5", "bart", "llama", *MASKED)
#: Those whose tokenizer has a chat template with an assistant's mask.
CHAT = ("llama", "qwen2", "qwen3")
LABELS = {0: "no", 1: "maybe", 2: "yes"}
#: Output rows beyond the tokenizer's ids, as Qwen's and T5's have them.
EXTRA_ROWS = {"t5": 5, "qwen2": 7, "qwen3": 7}
#: Factor of the output projection; T5 scales its logits down.
SHARPER = {"t5": 6.0, "bart": 1.0, "bert": 1.0}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make(architecture: str, head: str, directory: Path, lines: list[str]) -> None:
    """Save a model and its tokenizer.

    Args:
        architecture: one of `ARCHITECTURES`.
        head: "lm", "classifier" (three labels), "regressor" or "encoder".
        directory: made, must not be there.
        lines: what the tokenizer's words come from.
    """
    words = sorted({word for line in lines for word in line.split()})
    tokenizer = TOKENIZERS[architecture](lines if architecture == "marian" else words)
    tokenizer.save_pretrained(directory)
    vocab_size = len(tokenizer) + EXTRA_ROWS.get(architecture, 0)
    config = AutoConfig.for_model(
        architecture, vocab_size=vocab_size, **SIZES[architecture], **_special(tokenizer)
    )
    if architecture in ENCODER_DECODERS:
        config.decoder_start_token_id = config.pad_token_id
        if architecture in ("bart", "mbart"):
            config.decoder_start_token_id = config.eos_token_id
    if head == "classifier":
        config.id2label = dict(LABELS)
        config.label2id = {name: number for number, name in LABELS.items()}
    elif head == "regressor":
        config.id2label, config.label2id = {0: "score"}, {"score": 0}
    torch.manual_seed(1)
    model = _auto(architecture, head).from_config(config)
    sharpen(model)
    if head == "lm":
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(SHARPER.get(architecture, 1.5))
    model.save_pretrained(directory)


def sharpen(model: torch.nn.Module, seed: int = 7) -> None:
    """Give every weight a size that matters, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.35)
            else:
                parameter.add_(noise * 0.2)
        bias = getattr(model, "final_logits_bias", None)
        if bias is not None:
            bias.copy_(torch.randn(bias.shape, generator=generator))


def _auto(architecture: str, head: str):
    """The class that makes a model of a config."""
    if head == "encoder":
        return _Made(T5EncoderModel) if architecture == "t5" else AutoModel
    if head in ("classifier", "regressor"):
        return AutoModelForSequenceClassification
    if architecture in ENCODER_DECODERS:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if architecture in CAUSAL else AutoModelForMaskedLM


class _Made:
    """A class that is no auto class, made from a config in the same way."""

    def __init__(self, cls):
        self.from_config = cls


def _special(tokenizer) -> dict[str, int | None]:
    """Special ids of a config."""
    names = ("pad", "bos", "eos", "cls", "sep")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    return {name: number for name, number in ids.items() if number is not None}


def marian_tokenizer(lines: list[str]):
    """SentencePiece, as Marian has it."""
    from kdcache.dump.tokenize import train_sentencepiece
    from kdcache.recipe import SentencePieceTokenizer

    section = SentencePieceTokenizer(vocab_size=36)
    return train_sentencepiece(lines, section, "test")._backend


def bart_tokenizer(words: list[str]):
    """Whole words between a begin and an end, and a mask token."""
    tokenizer = word_tokenizer(words, bart=True)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def mbart_tokenizer(words: list[str]):
    """Whole words, a language code before the text and an end after it."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -9.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    return MBart50Tokenizer(vocab=pieces, src_lang="en_XX", tgt_lang="de_DE")


def bert_pieces(words: list[str]) -> dict[str, int]:
    """WordPiece vocabulary in which every second longer word is two pieces."""
    pieces: list[str] = []
    for number, word in enumerate(words):
        cut = number % 2 and len(word) > 3
        pieces += [word[:2], f"##{word[2:]}"] if cut else [word]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return {piece: i for i, piece in enumerate(dict.fromkeys([*special, *pieces]))}


def byte_pairs(words: list[str], special: list[str]) -> tuple[dict[str, int], list[tuple]]:
    """Byte-level BPE: the special tokens, 256 bytes, and merges of a word from its front.

    Of every second word only the first two letters, so that a word may be several tokens.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    merges: list[tuple[str, str]] = []
    for number, word in enumerate(words):
        for end in range(len(word) if number % 2 == 0 else min(2, len(word))):
            merge = (f"Ġ{word[:end]}", word[end])
            if merge not in merges:
                merges.append(merge)
    tokens = [*special, *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def roberta_tokenizer(words: list[str]):
    """RoBERTa's ids: <s> 0, <pad> 1, </s> 2, <unk> 3."""
    vocab, merges = byte_pairs(words, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return RobertaTokenizer(vocab=vocab, merges=merges)


def modernbert_tokenizer(words: list[str]):
    """Byte-level BPE between [CLS] and [SEP], without token types."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    names = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"}
    tokenizer = _byte_level(words, [*names.values(), "[MASK]"])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token=AddedToken("[MASK]", lstrip=True),
        model_input_names=["input_ids", "attention_mask"],
        **{f"{key}_token": name for key, name in names.items()},
    )


def llama_tokenizer(words: list[str]):
    """Llama 3's kind: a begin token, no end, no padding, a chat template."""
    from tokenizers.processors import TemplateProcessing

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(words, special)
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", 0)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        extra_special_tokens=special[2:],
        chat_template="{{ bos_token }}" + CHAT_TEMPLATE,
    )


def qwen_tokenizer(words: list[str]):
    """Qwen's kind: no begin token, padding apart from the end, a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab, merges = byte_pairs(words, special)
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:2],
        chat_template=CHAT_TEMPLATE,
    )


def gpt2_tokenizer(words: list[str]):
    """GPT-2's kind: one special token that nothing adds, and no padding."""
    vocab, merges = byte_pairs(words, ["<|endoftext|>"])
    return GPT2Tokenizer(vocab=vocab, merges=merges)


def gemma_tokenizer(words: list[str]):
    """Whole words after a begin token, with padding."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(words, bart=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def _byte_level(words: list[str], special: list[str]):
    """A backend of byte pairs."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    vocab, merges = byte_pairs(words, special)
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = Decoder()
    return tokenizer


TOKENIZERS = {
    "marian": marian_tokenizer,
    "t5": lambda words: word_tokenizer(words, bart=False),
    "bart": bart_tokenizer,
    "mbart": mbart_tokenizer,
    "gpt2": gpt2_tokenizer,
    "llama": llama_tokenizer,
    "qwen2": qwen_tokenizer,
    "qwen3": qwen_tokenizer,
    "gemma2": gemma_tokenizer,
    "bert": lambda words: BertTokenizer(vocab=bert_pieces(words)),
    "roberta": roberta_tokenizer,
    "modernbert": modernbert_tokenizer,
    "distilbert": lambda words: DistilBertTokenizer(vocab=bert_pieces(words)),
}

_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
_LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
}
_BERT = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
#: What a config has beside its vocabulary and its special ids.
SIZES = {
    "marian": _BART,
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "bart": _BART,
    "mbart": _BART,
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "llama": _LLAMA,
    "qwen2": {key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "qwen3": _LLAMA,
    "gemma2": {
        **_LLAMA,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
    },
    "bert": {**_BERT, "type_vocab_size": 2},
    "roberta": {**_BERT, "type_vocab_size": 1},
    "modernbert": {**_BERT, "local_attention": 8, "global_attn_every_n_layers": 2},
    "distilbert": {
        "dim": 24,
        "hidden_dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "max_position_embeddings": 64,
    },
}
