"""Tokenizers: text to token ids, and what identifies the way there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import CorpusError, ModelError
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.models.loading import load_tokenizer, model_directory
from kdcache.recipe import SentencePieceTokenizer
from kdcache.text.chat import ChatTemplate
from kdcache.text.tokenizers import (
    all_special_ids,
    directory_files,
    encode_pairs,
    encode_texts,
    special_ids,
    token_strings,
    tokenizer_digest,
    vocab_size,
)

#: Above this a tokenizer's model_max_length stands for "no limit".
NO_LIMIT = 1_000_000
#: The mask token of a tokenizer that is trained with one.
MASK = "<mask>"


class Tokenizer:
    """A transformers tokenizer, the files it came from, and its digest.

    Attributes:
        path: where it came from, for messages.
        digest: over vocabulary, special ids, vocabulary files and what a probe text becomes;
            the version of any library is not in it.
        vocab_size: one more than the largest id, added tokens included.
        special_ids: ids of the tokens with a role, under the names of `TokenizerRecord`.
        mask_id: of the mask token; None where there is none.
        special_ids_all: ids of all special tokens, with a role or only flagged so.
        max_length: longest text it should encode, in tokens; None for no limit.
    """

    def __init__(self, backend: Any, directory: Path, path: str) -> None:
        self._backend = backend
        self.path = path
        self.vocab_size = vocab_size(backend)
        self.special_ids = special_ids(backend)
        self.mask_id: int | None = backend.mask_token_id
        self.special_ids_all = all_special_ids(backend)
        length = backend.model_max_length
        self.max_length = int(length) if length < NO_LIMIT else None
        self._files = directory_files(backend, directory)
        self.digest = tokenizer_digest(backend, self._files)

    @classmethod
    def load(cls, path: str, revision: str | None = None) -> Tokenizer:
        """Load from a transformers directory or a hub id.

        Raises:
            ModelError: there is no tokenizer that transformers can load without running code
                of the repository.
        """
        directory, _ = model_directory(path, revision)
        return cls(load_tokenizer(directory), directory, path)

    @classmethod
    def from_files(cls, files: dict[str, bytes], path: str) -> Tokenizer:
        """Load from the bytes of a tokenizer directory."""
        with tempfile.TemporaryDirectory(prefix="kdcache-") as directory:
            for name, data in files.items():
                (Path(directory) / name).write_bytes(data)
            tokenizer = cls.load(directory)
        tokenizer.path = path
        return tokenizer

    def encode(self, texts: list[str], target: bool) -> list[list[int]]:
        """Token ids of some texts, special tokens as the tokenizer adds them, never truncated.

        Args:
            texts: M texts.
            target: encode as labels (a tokenizer with two sides then uses its target side).
        """
        return encode_texts(self._backend, texts, target)

    def encode_ragged(self, texts: list[str], target: bool) -> Ragged:
        """`encode` as one flat int64 array "id" and its offsets."""
        return _ragged(self.encode(texts, target))

    def encode_pairs(self, texts: list[str], pairs: list[str], target: bool) -> Ragged:
        """Pairs of texts as "id" int64 and "segment" uint8, the tokenizer's own token types.

        Args:
            texts: M texts.
            pairs: M texts; one that is empty or white space leaves its partner alone.
            target: encode as labels.
        """
        ids, segments = encode_pairs(self._backend, texts, pairs, target)
        return _ragged(ids, segment=segments)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text that spells out its special tokens itself; none are added."""
        ids: list[int] = self._backend(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        text: str = self._backend.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    @cached_property
    def chat(self) -> ChatTemplate:
        """Its chat template.

        Raises:
            ModelError: it has none that can be used.
        """
        return ChatTemplate(self._backend, self.path)

    def encode_chats(self, texts: list[str], place: Callable[[int], str]) -> Ragged:
        """Conversations as "id" int64 and "loss" uint8, 1 for what the assistant wrote.

        Args:
            texts: M texts of messages, see `kdcache.text.messages`; an empty one has no tokens.
            place: says for a message where one of them stands.

        Raises:
            ModelError: there is no chat template that can be used.
            CorpusError: a conversation cannot be encoded; says which.
        """
        encoded = []
        for row, text in enumerate(texts):
            try:
                encoded.append(self.chat.encode(text))
            except CorpusError as error:
                raise CorpusError(f"{place(row)}: {error}") from None
        return _ragged([ids for ids, _ in encoded], loss=[mask for _, mask in encoded])

    def tokens(self) -> list[str]:
        """Token string of every id; ids that name nothing are empty."""
        return token_strings(self._backend)

    def files(self) -> dict[str, bytes]:
        """Name to bytes: a transformers tokenizer directory, and tokens.json (id to token)."""
        tokens = json.dumps(self.tokens(), ensure_ascii=False, indent=0) + "\n"
        return {**self._files, "tokens.json": tokens.encode("utf-8", "replace")}


def _ragged(ids: list[list[int]], **beside: list[list[int]]) -> Ragged:
    """Lists of ids as one flat int64 array and its offsets; what stands beside them uint8."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    total = int(lengths.sum())
    fields = {"id": np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=total)}
    for name, values in beside.items():
        fields[name] = np.fromiter(chain.from_iterable(values), dtype=np.uint8, count=total)
    return Ragged(offsets_of(lengths), fields)


def train_sentencepiece(
    sentences: Iterable[str], section: SentencePieceTokenizer, name: str
) -> Tokenizer:
    """Train SentencePiece and wrap it as a Marian tokenizer: pad 0, unk 1, bos 2, eos 3, mask 4.

    The same sentences give the same bytes: training reads an iterator, on one thread.

    Args:
        sentences: texts to train on, in order.
        section: size, kind and coverage.
        name: the tokenizer's name, for messages.

    Raises:
        ModelError: the corpus cannot give a vocabulary of that size.
    """
    import sentencepiece

    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(sentences),
            model_writer=model,
            vocab_size=section.vocab_size,
            model_type=section.model_type,
            character_coverage=section.character_coverage,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="<pad>",
            control_symbols=[MASK] if section.mask else [],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "no text to train on"
        raise ModelError(
            f"dump.tokenizers.{name}: SentencePiece cannot train {section.vocab_size} pieces: "
            f"{reason}"
        ) from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    config = {
        "tokenizer_class": "MarianTokenizer",
        "model_max_length": int(1e30),
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "eos_token": "</s>",
        **({"mask_token": MASK} if section.mask else {}),
    }
    files = {
        "source.spm": model.getvalue(),
        "target.spm": model.getvalue(),
        "vocab.json": json.dumps(pieces, ensure_ascii=False, indent=0).encode(),
        "tokenizer_config.json": json.dumps(config, indent=1, sort_keys=True).encode(),
    }
    return Tokenizer.from_files(files, f"SentencePiece trained on the corpus ({name})")


def _training_lines(sentences: Iterable[str]) -> Iterator[str]:
    """Leave out what the trainer would stumble over: lines without text, NUL letters."""
    return (line.replace("\0", " ") for line in sentences if line and not line.isspace())
