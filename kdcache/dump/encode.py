"""Rows of a corpus to tokens, in this process or shared out to others; the same either way."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

from kdcache.dump.chunk import encode_stream
from kdcache.dump.tokenize import Tokenizer
from kdcache.errors import ModelError
from kdcache.formats.ragged import Ragged
from kdcache.processes import worker_pool
from kdcache.recipe import StreamSection
from kdcache.text.corpus import RowBatch

#: A corpus of fewer rows is tokenised before other processes have started.
FEW_ROWS = 200_000

#: Batches that each process may be ahead.
AHEAD = 3

Streams = Mapping[str, StreamSection]


def encoded(
    batches: Iterator[RowBatch],
    streams: Streams,
    tokenizers: Mapping[str, Tokenizer],
    processes: int,
) -> Generator[tuple[RowBatch, dict[str, Ragged]], None, None]:
    """The batches in their order, with the tokens of every stream.

    Args:
        batches: of rows.
        streams: name to how it is encoded.
        tokenizers: by name.
        processes: that tokenise; 1 for this one alone.

    Raises:
        CorpusError: a row cannot be encoded.
        ModelError: a process was killed.
    """
    if processes == 1:
        for batch in batches:
            yield batch, _encode(batch, streams, tokenizers)
        return
    files = {name: (one.files(), one.path) for name, one in tokenizers.items()}
    pool = worker_pool(processes, _begin, (dict(streams), files))
    waiting: deque[tuple[RowBatch, Future[dict[str, Ragged]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_here, batch)))
            if len(waiting) > AHEAD * processes:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise ModelError(
            "a process that tokenises was killed, out of memory perhaps; use --processes 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(
    batch: RowBatch, streams: Streams, tokenizers: Mapping[str, Tokenizer]
) -> dict[str, Ragged]:
    return {
        name: encode_stream(stream, tokenizers[stream.tokenizer], batch)
        for name, stream in streams.items()
    }


_here: list[tuple[Streams, dict[str, Tokenizer]]] = []  # what this process works with


def _begin(streams: Streams, files: Mapping[str, tuple[dict[str, bytes], str]]) -> None:
    """Load the tokenizers, once for all batches of another process."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # as many processes as cores have no use for threads
    loaded = {name: Tokenizer.from_files(*given) for name, given in files.items()}
    _here[:] = [(streams, loaded)]


def _encode_here(batch: RowBatch) -> dict[str, Ragged]:
    """What another process does."""
    return _encode(batch, *_here[0])
