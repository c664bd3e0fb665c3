"""Class scores are of whole samples, so any stream that holds the same text can be learned from."""

from __future__ import annotations

from kdcache.formats.cache import Cache
from kdcache.formats.signals import ClassesRecord, SignalRecord


def signals_for(cache: Cache, source: str) -> dict[str, SignalRecord]:
    """The signals of a cache as a student finds them.

    Args:
        cache: an open cache.
        source: stream that the student reads. Scores of a stream of the same fields, under another
            tokenizer perhaps, are as good as its own, and called so.
    """
    streams, found = cache.manifest.streams, dict(cache.signals)
    own = streams.get(source)
    for name, record in cache.signals.items():
        if own is None or not isinstance(record, ClassesRecord) or record.masks is not None:
            continue
        other = streams[record.stream]
        if (other.field, other.pair, other.template) == (own.field, own.pair, own.template):
            found[name] = record.model_copy(update={"stream": source})
    return found
