"""Tokenizers: text to token ids, and what identifies the way there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kdcache.errors import ModelError
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.models import load_tokenizer, model_directory
from kdcache.recipe import SentencePieceTokenizer

#: Files of a tokenizer directory beside those its class names.
COMMON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
#: Encoded on both sides for the digest, so that lower-casing, prefixes and the like count.
PROBE = ["Hello, World! 12.5% Ärger, naïve", "  two  spaces\tand <unk> ", ""]
#: Above this a tokenizer's model_max_length stands for "no limit".
NO_LIMIT = 1_000_000


class Tokenizer:
    """A transformers tokenizer, the files it came from, and its digest.

    Attributes:
        path: where it came from, for messages.
        digest: over vocabulary, special ids, vocabulary files and what a probe text becomes;
            the version of any library is not in it.
        vocab_size: one more than the largest id.
        max_length: longest text it should encode, in tokens; None for no limit.
    """

    def __init__(self, backend: Any, directory: Path, path: str) -> None:
        self._backend = backend
        self.path = path
        vocab = backend.get_vocab()
        self.vocab_size = max(len(backend), max(vocab.values()) + 1)
        self.special_ids: dict[str, int | None] = {
            "pad_id": backend.pad_token_id,
            "eos_id": backend.eos_token_id,
            "bos_id": backend.bos_token_id,
            "unk_id": backend.unk_token_id,
        }
        length = backend.model_max_length
        self.max_length = int(length) if length < NO_LIMIT else None
        self._files = _directory_files(backend, directory)
        self.digest = self._digest(vocab)

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
        if not texts:
            return []
        side = {"text_target": texts} if target else {"text": texts}
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        encoded = self._backend(**side, **options, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def encode_ragged(self, texts: list[str], target: bool) -> Ragged:
        """`encode` as one flat int64 array "id" and its offsets."""
        encoded = self.encode(texts, target)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        flat = np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=int(lengths.sum()))
        return Ragged(offsets_of(lengths), {"id": flat})

    def tokens(self) -> list[str]:
        """Token string of every id; ids that name nothing are empty."""
        names = self._backend.convert_ids_to_tokens(list(range(self.vocab_size)))
        return [name or "" for name in names]

    def files(self) -> dict[str, bytes]:
        """Name to bytes: a transformers tokenizer directory, and tokens.json (id to token)."""
        tokens = json.dumps(self.tokens(), ensure_ascii=False, indent=0) + "\n"
        return {**self._files, "tokens.json": tokens.encode("utf-8", "replace")}

    def _digest(self, vocab: dict[str, int]) -> str:
        """Canonical digest; JSON files enter by content, so re-saving does not change it."""
        parts: dict[str, Any] = {
            "vocab": vocab,
            "special": self.special_ids,
            "probe": [self.encode(PROBE, target) for target in (False, True)],
        }
        hasher = xxhash.xxh3_128(json.dumps(parts, sort_keys=True).encode())
        vocabulary = {*self._backend.vocab_files_names.values(), "tokenizer.json"}
        for name in sorted(vocabulary - {"tokenizer_config.json"}):
            if name not in self._files:
                continue
            data = self._files[name]
            if name.endswith(".json"):
                data = json.dumps(json.loads(data), sort_keys=True).encode()
            hasher.update(b"%d:%s%d:" % (len(name), name.encode(), len(data)))
            hasher.update(data)
        return hasher.hexdigest()


def _directory_files(backend: Any, directory: Path) -> dict[str, bytes]:
    """The files that make the directory loadable again, as they are."""
    names = {*backend.vocab_files_names.values(), *COMMON_FILES}
    files = {name: directory / name for name in sorted(names)}
    found = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    config = json.loads(found.get("tokenizer_config.json", b"{}"))
    if "tokenizer_class" not in config and (directory / "config.json").is_file():
        # Without a class of its own AutoTokenizer goes by the model's type.
        found["config.json"] = (directory / "config.json").read_bytes()
    return found


def train_sentencepiece(
    sentences: Iterable[str], section: SentencePieceTokenizer, name: str
) -> Tokenizer:
    """Train SentencePiece and wrap it as a Marian tokenizer: pad 0, unk 1, bos 2, eos 3.

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
