"""Watching a dump: the progress bar's figures, and a status file that others can poll."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from kdcache.dump.ranks import Ranks
from kdcache.dump.stopping import Stopping
from kdcache.errors import StorageError
from kdcache.formats.codes import gold_log_probs
from kdcache.formats.manifest import CommitRecord
from kdcache.formats.ragged import Ragged
from kdcache.formats.stores.store import STATUS, Store
from kdcache.progress import progress

#: Seconds between two writes of the status file, on a disk and on an object store.
LOCAL_SECONDS, REMOTE_SECONDS = 2.0, 20.0


class Watch:
    """What a dump tells while it runs.

    The status file is CACHE/.status/RANK-of-WORLD.json; it is no part of the cache.
    """

    def __init__(self, store: Store, ranks: Ranks, stopping: Stopping) -> None:
        """Begin to watch; nothing is written yet.

        Args:
            store: of the cache.
            ranks: which process this is.
            stopping: asked at every step.
        """
        self._store, self._ranks, self.stopping = store, ranks, stopping
        self._path = f"{STATUS}/{ranks.rank:05d}-of-{ranks.world:05d}.json"
        self._every = LOCAL_SECONDS if store.exclusive else REMOTE_SECONDS
        self._written = 0.0
        self._began = time.time()
        self._status: dict[str, Any] = {}
        self._bar: tqdm[Any] | None = None

    def stage(self, state: str, **facts: object) -> None:
        """Enter another stage of the dump and write that down at once.

        Args:
            state: loading, tokenising, waiting, dumping, done, stopped or failed.
            facts: what else is known, as plain values.
        """
        self._status = {"state": state, **facts}
        self._write()

    def signal(self, name: str, kind: str, own: int, done: int, tokens: int) -> tqdm[Any]:
        """Begin a signal.

        Args:
            name: of the signal.
            kind: of the signal.
            own: shards of this process.
            done: those that are committed.
            tokens: of the signal's stream in the others.

        Returns:
            The bar of its tokens, to be used in a `with` block.
        """
        self._signal_began = time.time()
        self._made = {"tokens": 0, "labels": 0, "entries": 0, "bytes": 0}
        self._loss, self._targets = 0.0, 0
        self._tokens_total, self._tokens_done = tokens, 0
        self._status = {
            "state": "dumping",
            "signal": name,
            "kind": kind,
            "shards": own,
            "shards_done": done,
            "tokens": tokens,
        }
        self._bar = progress(tokens, f"{kind} ({name})", "token")
        self._write()
        return self._bar

    def labels(self, columns: Mapping[str, Ragged]) -> None:
        """Take note of a batch of labels: what the teacher says of the targets."""
        tokens = columns.get("tokens")
        if tokens is not None and "gold" in tokens.fields:
            codes = tokens.fields["gold"]
            self._loss -= float(gold_log_probs(codes).sum(dtype=np.float64))
            self._targets += len(codes)

    def committed(self, record: CommitRecord, tokens: int) -> None:
        """Take note of a shard that is real now.

        Args:
            record: its commit.
            tokens: of the signal's stream in it.
        """
        self._status["shards_done"] += 1
        made = self._made
        made["tokens"] += tokens
        made["labels"] += record.tokens
        made["entries"] += sum(record.entries.values()) - record.tokens
        made["bytes"] += sum(file.bytes for part in record.parts for file in part.files)

    def advance(self, tokens: int) -> None:
        """Go on by some tokens; stop here if that was asked for.

        Raises:
            StoppedError: it was.
        """
        self._tokens_done += tokens
        if self._bar is not None:
            self._bar.update(tokens)
        if time.monotonic() - self._written >= self._every:
            self._write()
        self.stopping.check()

    def _figures(self) -> dict[str, Any]:
        """Rates so far."""
        now, made = time.time(), self._made
        rate = self._tokens_done / max(1e-9, now - self._signal_began)
        left = max(0, self._tokens_total - self._tokens_done)
        figures: dict[str, Any] = {
            "tokens_done": self._tokens_done,
            "tokens_per_second": round(rate, 1),
            "expected_end": _clock(now + left / rate) if rate else None,
        }
        if made["tokens"]:
            figures["bytes_per_token"] = round(made["bytes"] / made["tokens"], 3)
            figures["entries_per_token"] = round(made["entries"] / made["tokens"], 3)
        if self._targets:
            figures["teacher_loss"] = round(self._loss / self._targets, 4)
        return figures

    def _write(self) -> None:
        """Write the status file, and the bar's figures; a refusal is not worth a dump."""
        self._written = time.monotonic()
        status = dict(self._status)
        if status["state"] == "dumping":
            status |= (figures := self._figures())
            if self._bar is not None:
                shown = {"loss": "teacher_loss", "B/tok": "bytes_per_token"}
                shown |= {"entries/tok": "entries_per_token"}
                self._bar.set_postfix(
                    {short: figures[key] for short, key in shown.items() if key in figures},
                    refresh=False,
                )
        status |= {
            "rank": self._ranks.rank,
            "world": self._ranks.world,
            "host": platform.node(),
            "pid": os.getpid(),
            "began": _clock(self._began),
            "updated": _clock(time.time()),
        }
        try:
            self._store.replace(self._path, (json.dumps(status, indent=1) + "\n").encode())
        except StorageError:
            return


def _clock(seconds: float) -> str:
    """A moment as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
