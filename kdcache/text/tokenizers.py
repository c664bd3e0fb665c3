"""What identifies a transformers tokenizer: its ids, its files, and what it makes of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

#: Files of a tokenizer directory beside those its class names.
COMMON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
#: By name and by ending, files that a tokenizer is read from where it has no COMMON_FILES.
VOCABULARY_FILES = ("vocab.json", "vocab.txt", "merges.txt")
VOCABULARY_ENDINGS = (".model", ".spm", ".tiktoken")
#: Encoded on both sides for the digest, so that lower-casing, prefixes and the like count.
PROBE = ["Hello, World! 12.5% Ärger, naïve", "  two  spaces\tand <unk> ", ""]


def has_tokenizer(directory: Path) -> bool:
    """Whether a transformers directory holds any file of a tokenizer.

    Where there is none transformers does not always say so: for several model types it makes an
    empty tokenizer up.
    """
    return directory.is_dir() and any(
        file.name in (*COMMON_FILES, *VOCABULARY_FILES) or file.suffix in VOCABULARY_ENDINGS
        for file in directory.iterdir()
    )


def vocab_size(backend: Any) -> int:
    """One more than the largest id of a transformers tokenizer, added tokens included."""
    return max(len(backend), max(backend.get_vocab().values(), default=-1) + 1)


def special_ids(backend: Any) -> dict[str, int | None]:
    """Ids of the tokens with a role, under the names of `TokenizerRecord`."""
    return {
        "pad_id": backend.pad_token_id,
        "eos_id": backend.eos_token_id,
        "bos_id": backend.bos_token_id,
        "unk_id": backend.unk_token_id,
    }


def all_special_ids(backend: Any) -> set[int]:
    """Ids of all special tokens: those with a role, and those that are only flagged so."""
    flagged = {i for i, token in backend.added_tokens_decoder.items() if token.special}
    return flagged | set(backend.all_special_ids)


def token_strings(backend: Any) -> list[str]:
    """Token string of every id; ids that name nothing are empty."""
    names = backend.convert_ids_to_tokens(list(range(vocab_size(backend))))
    return [name or "" for name in names]


def encode_texts(backend: Any, texts: list[str], target: bool) -> list[list[int]]:
    """Token ids of some texts, special tokens as the tokenizer adds them, never truncated.

    Args:
        backend: of transformers.
        texts: M texts.
        target: encode as labels (a tokenizer with two sides then uses its target side).
    """
    if not texts:
        return []
    side = {"text_target": texts} if target else {"text": texts}
    options = {"return_attention_mask": False, "return_token_type_ids": False}
    ids: list[list[int]] = backend(**side, **options, verbose=False)["input_ids"]
    return ids


def encode_pairs(
    backend: Any, texts: list[str], pairs: list[str], target: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of some pairs of texts, special tokens as the tokenizer adds them, never truncated.

    Args:
        backend: of transformers.
        texts: M texts.
        pairs: M texts; one that is empty or white space leaves its partner alone.
        target: encode as labels.

    Returns:
        M lists of token ids, and M lists of token types: the tokenizer's own, 0 where it gives
        none.
    """
    ids: list[list[int]] = [[]] * len(texts)
    segments: list[list[int]] = [[]] * len(texts)
    both = [bool(pair) and not pair.isspace() for pair in pairs]
    names = ("text_target", "text_pair_target") if target else ("text", "text_pair")
    for paired in (True, False):
        rows = [row for row, has_pair in enumerate(both) if has_pair == paired]
        if not rows:
            continue
        sides = {
            name: [side[row] for row in rows]
            for name, side in zip(names, (texts, pairs), strict=True)
        }
        if not paired:
            del sides[names[1]]
        encoded = backend(**sides, return_attention_mask=False, verbose=False)
        types = encoded.get("token_type_ids") or [
            [0] * len(found) for found in encoded["input_ids"]
        ]
        for row, found, kinds in zip(rows, encoded["input_ids"], types, strict=True):
            ids[row], segments[row] = found, kinds
    return ids, segments


def directory_files(backend: Any, directory: Path) -> dict[str, bytes]:
    """Name to bytes of the files that make a tokenizer's directory loadable again."""
    names = {*backend.vocab_files_names.values(), *COMMON_FILES, "chat_template.jinja"}
    files = {name: directory / name for name in sorted(names)}
    found = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    config = json.loads(found.get("tokenizer_config.json", b"{}"))
    if "tokenizer_class" not in config and (directory / "config.json").is_file():
        # Without a class of its own AutoTokenizer goes by the model's type.
        found["config.json"] = (directory / "config.json").read_bytes()
    return found


def tokenizer_digest(backend: Any, files: dict[str, bytes]) -> str:
    """32 hex digits over vocabulary, special ids, vocabulary files and what a probe becomes.

    The version of no library is in it, and JSON files enter by content, so that saving a
    tokenizer again does not change it.

    Args:
        backend: of transformers.
        files: its `directory_files`.
    """
    parts: dict[str, Any] = {
        "vocab": backend.get_vocab(),
        "special": special_ids(backend),
        "probe": [encode_texts(backend, PROBE, target) for target in (False, True)],
    }
    hasher = xxhash.xxh3_128(json.dumps(parts, sort_keys=True).encode())
    vocabulary = {*backend.vocab_files_names.values(), "tokenizer.json"}
    for name in sorted(vocabulary - {"tokenizer_config.json"}):
        if name not in files:
            continue
        data = files[name]
        if name.endswith(".json"):
            data = json.dumps(json.loads(data), sort_keys=True).encode()
        hasher.update(b"%d:%s%d:" % (len(name), name.encode(), len(data)))
        hasher.update(data)
    return hasher.hexdigest()
