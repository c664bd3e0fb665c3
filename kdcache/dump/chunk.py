"""Chunks: consecutive samples in memory, on their way from the corpus to a shard."""

# M samples of a chunk, R rows of a batch

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from kdcache.dump.tokenize import Tokenizer
from kdcache.formats.identity import sample_id
from kdcache.formats.ragged import Ragged
from kdcache.recipe import StreamSection
from kdcache.text.corpus import RowBatch


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples in memory.

    Attributes:
        sample_ids: [M, 16] uint8.
        rows: [M] int64 corpus rows.
        fields: name to M texts.
        streams: name to tokens: field "id" int64, and "segment" or "loss" uint8.
        tasks: M names, empty in a corpus without tasks.
    """

    sample_ids: np.ndarray
    rows: np.ndarray
    fields: Mapping[str, list[str]]
    streams: Mapping[str, Ragged]
    tasks: list[str]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def part(self, start: int, stop: int) -> Chunk:
        """Samples [start, stop), sharing memory."""
        streams = {
            name: Ragged(stream.offsets[start : stop + 1], stream.fields)
            for name, stream in self.streams.items()
        }
        fields = {name: texts[start:stop] for name, texts in self.fields.items()}
        return Chunk(
            self.sample_ids[start:stop],
            self.rows[start:stop],
            fields,
            streams,
            self.tasks[start:stop],
        )

    def token_counts(self) -> np.ndarray:
        """[M] int64 tokens of each sample, all streams summed."""
        counts: np.ndarray = np.sum([s.lengths for s in self.streams.values()], axis=0)
        return counts


def sample_ids_of(fields: Mapping[str, list[str]], task: str, label: str | None) -> np.ndarray:
    """Ids of the samples of one task.

    Args:
        fields: name to M raw texts, in the manifest's order.
        task: its name; empty in a corpus without tasks.
        label: the field that holds the gold label; None without one.

    Returns:
        [M, 16] uint8.
    """
    texts = zip(*fields.values(), strict=True)
    golds: Iterable[str] = fields[label] if label else [""] * len(next(iter(fields.values())))
    packed = b"".join(sample_id(row, task, gold) for row, gold in zip(texts, golds, strict=True))
    return np.frombuffer(packed, dtype=np.uint8).reshape(-1, 16)


def encode_stream(section: StreamSection, tokenizer: Tokenizer, batch: RowBatch) -> Ragged:
    """Tokens of one stream of R rows.

    Args:
        section: its field and how it is encoded.
        tokenizer: of the stream.
        batch: the rows.

    Returns:
        R lists: "id" int64, and "segment" or "loss" uint8.

    Raises:
        CorpusError: a row holds no messages, or the chat template refuses them.
    """
    texts = batch.fields[section.field]
    if section.template == "chat":
        return tokenizer.encode_chats(
            texts, lambda row: f"{batch.place(row)}, field {section.field!r}"
        )
    if section.pair is not None:
        return tokenizer.encode_pairs(texts, batch.fields[section.pair], section.target)
    return tokenizer.encode_ragged(texts, section.target)
