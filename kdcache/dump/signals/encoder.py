"""What every kind of signal answers to the loop that makes it."""

# F items, M samples, B rows of a batch

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from kdcache.dump.signals.items import Items
from kdcache.dump.teacher import Teacher
from kdcache.dump.tokenize import Tokenizer
from kdcache.dump.versions import library_versions
from kdcache.formats.cache import Cache
from kdcache.formats.manifest import PartRecord
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import ragged_batch, signal_schema
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import SignalRecord
from kdcache.formats.writer import CacheWriter
from kdcache.recipe import DumpSection, Signal, signal_streams

#: Columns of some items, each as many samples long, ready to be put into the order of the shard.
Columns = dict[str, Ragged]


@dataclass(frozen=True)
class Request:
    """What a recipe asks for: one signal, and who speaks.

    Attributes:
        section: the recipe's.
        name: of the signal.
        teacher: of the signal, loaded; None where it needs none.
        tokenizers: by name, those that exist before the corpus is read; for `check` alone.
    """

    section: DumpSection
    name: str
    teacher: Teacher | None
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)

    @property
    def signal(self) -> Signal:
        """The signal's own section."""
        return self.section.signals[self.name]


class SignalEncoder(ABC):
    """What one signal of a recipe says of a shard, batch by batch.

    Attributes:
        record: the signal's.
        teacher: the model; None for signals that need none.
        main: the column with one record for each thing described.
    """

    main: ClassVar[str]
    record: SignalRecord

    def __init__(self, cache: Cache, request: Request) -> None:
        """Keep the teacher; a kind makes its record.

        Args:
            cache: whose streams are described.
            request: checked by `check`.
        """
        self.teacher = request.teacher

    @classmethod
    @abstractmethod
    def check(cls, request: Request) -> None:
        """Refuse what this kind of signal cannot be made with, before anything is written.

        Args:
            request: what is asked for.

        Raises:
            RecipeError: the recipe asks for what there is not.
            ModelError: the teacher is of the wrong kind, or lacks a layer.
        """

    @abstractmethod
    def items(self, samples: SampleShard, inputs: Mapping[str, Columns]) -> Items:
        """What the teacher reads, for all samples of a shard.

        Args:
            samples: the shard.
            inputs: columns of the signals that this one is made from, by name.
        """

    @abstractmethod
    def counts(self, items: Items) -> np.ndarray:
        """[F] int64 records (at most) that each item will have in the main column."""

    def plan_lengths(self, items: Items) -> tuple[np.ndarray, np.ndarray]:
        """[F] and [F] lengths whose padded sum `dump.batch_tokens` bounds."""
        return items.lengths()

    @abstractmethod
    def encode(self, items: Items, rows: np.ndarray) -> Callable[[], Columns]:
        """Run the teacher on some items and code what it says, on its device.

        Args:
            items: of the shard.
            rows: [B] which of them.

        Returns:
            What brings the columns to the host; it is called in the writer's thread. Every
            column has B samples.

        Raises:
            ModelError: what the teacher said cannot be stored; `located` adds where.
        """

    def write(
        self, writer: CacheWriter, shard: int, part: int, span: tuple[int, int], columns: Columns
    ) -> PartRecord:
        """Write one part; as Arrow, unless a kind does otherwise.

        Args:
            writer: the cache.
            shard: shard number.
            part: part number.
            span: its samples [start, stop), counted over the corpus.
            columns: one record list for each of them.
        """
        batch = ragged_batch(signal_schema(self.record), columns)
        return writer.write_part(self.record.name, shard, part, *span, batch)


def common_fields(cache: Cache, request: Request) -> dict[str, Any]:
    """What the record of a signal says whatever its kind.

    Args:
        cache: whose streams it is of.
        request: what is asked for.
    """
    dump, name, teacher = request.section, request.name, request.teacher
    streams = signal_streams(request.signal)
    source = streams.get("source")
    used = dump.teacher_of(name)
    return {
        "name": name,
        "stream": streams["stream"],
        "stream_digest": cache.stream(streams["stream"]).digest,
        "source": source,
        "source_digest": None if source is None else cache.stream(source).digest,
        "seed": dump.seed,
        "teacher": None if teacher is None else teacher.record,
        "recipe": {
            "signal": request.signal.model_dump(mode="json"),
            "teacher": None if used is None else used.model_dump(mode="json"),
            "batch_tokens": dump.batch_tokens,
        },
        "versions": library_versions(),
    }
