"""WordPiece and word-level tokenizers trained on a corpus, as BERT's tokenizer class reads them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BytesIO

from kdcache.dump.tokenize import Tokenizer
from kdcache.errors import ModelError
from kdcache.recipe import WordPieceTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: How SentencePiece writes that a piece begins a word.
_BEGINS = "\u2581"


def train_wordpiece(sentences: Iterable[str], section: WordPieceTokenizer, name: str) -> Tokenizer:
    """Train pieces and wrap them as BERT's tokenizer: [PAD] 0, [UNK] 1, [CLS], [SEP], [MASK] 4.

    Pieces are those of SentencePiece's unigram trainer over words, which gives the same ones every
    time; a text is then cut by BERT's rule, the longest piece first. Every letter of the corpus is
    a piece, so that [UNK] stands for letters alone that it does not have. With `words` there are
    no pieces, only the most frequent words, and [UNK] stands for any other.

    Args:
        sentences: texts to train on, in order.
        section: size and kind.
        name: the tokenizer's name, for messages.

    Raises:
        ModelError: the corpus cannot give a vocabulary of that size.
    """
    lines = [words for line in sentences if (words := list(words_of(line, section.lower)))]
    room = section.vocab_size - len(SPECIAL)
    if section.words:
        counts = Counter(word for line in lines for word in line)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
    else:
        ranked = _pieces(lines, section, name)
    if not ranked:
        raise ModelError(f"dump.tokenizers.{name}: found no text to train on")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": section.lower,
        "model_max_length": int(1e30),
        **dict(
            zip(
                ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
                SPECIAL,
                strict=True,
            )
        ),
    }
    vocabulary = [*SPECIAL, *ranked[:room]]
    files = {
        "vocab.txt": "".join(piece + "\n" for piece in vocabulary).encode(),
        "tokenizer_config.json": json.dumps(config, indent=1, sort_keys=True).encode(),
    }
    kind = "words" if section.words else "WordPiece"
    return Tokenizer.from_files(files, f"{kind} trained on the corpus ({name})")


def words_of(line: str, lower: bool) -> Iterator[str]:
    """Words as BERT's tokenizer splits a text: by white space, punctuation signs by themselves.

    Args:
        line: a text.
        lower: letters become small, and lose their accents.
    """
    from tokenizers import normalizers, pre_tokenizers

    cleaned = normalizers.BertNormalizer(lowercase=lower).normalize_str(line)
    for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(cleaned):
        yield word


def _pieces(lines: list[list[str]], section: WordPieceTokenizer, name: str) -> list[str]:
    """Letters, within a word and at its start, then pieces, the best first."""
    import sentencepiece

    letters = sorted({letter for line in lines for word in line for letter in word})
    singles = [form for letter in letters for form in (letter, "##" + letter)]
    if not letters:
        return []
    if len(singles) + len(SPECIAL) > section.vocab_size:
        raise ModelError(
            f"dump.tokenizers.{name}.vocab_size is {section.vocab_size}; the corpus has "
            f"{len(letters)} letters, each a piece in two forms: take at least "
            f"{len(singles) + len(SPECIAL)}"
        )
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(line) for line in lines),
            model_writer=model,
            vocab_size=section.vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "no text to train on"
        raise ModelError(f"dump.tokenizers.{name}: SentencePiece: {reason}") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    found = [processor.id_to_piece(n) for n in range(processor.get_piece_size())]
    plain = [piece for n, piece in enumerate(found) if not processor.is_control(n)]
    forms = [
        piece[1:] if piece.startswith(_BEGINS) else "##" + piece
        for piece in plain
        if piece not in ("<unk>", _BEGINS)
    ]
    return list(dict.fromkeys([*singles, *forms]))
