"""What every side of the benchmark does: take orders, a line of JSON each, and answer with one.

    {"do": "convert", "samples": folder, "data": folder}
    {"do": "check", "data": folder, "batch": B, "workers": n, "batches": number}
    {"do": "stream", "data": folder, "batch": B, "workers": n, "seconds": s, "seed": n}

`check` gives the rows and a digest of all tensors of some batches, so that the driver can make the
same batches and compare. `stream` counts what was delivered in seconds after the first few.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Looped(Protocol):
    """What delivers batches."""

    def loader(self, data: Path, batch: int, workers: int, seed: int) -> Iterable[Any]:
        """Shuffled batches of one epoch (each time it is iterated)."""

    def tokens(self, batch: Any) -> int:
        """Target tokens of a batch."""


class Checked(Looped, Protocol):
    """What delivers batches whose tensors can be looked at."""

    def tensors(self, batch: Any) -> Mapping[str, Tensor]:
        """All tensors of a batch."""


class Peer(Checked, Protocol):
    """A way to keep samples and to read them in batches."""

    def convert(self, samples: Path, data: Path) -> None:
        """Write the samples in the peer's format."""


class Collated:
    """What peers have in common whose batches come from `peer_samples.collate`."""

    def tensors(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a batch."""
        return batch

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """Target tokens of a batch."""
        return len(batch["gold"])


def serve(side: Looped) -> None:
    """Orders from stdin until it ends; `check` is for a `Checked`, `convert` for a `Peer`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    acts: dict[str, Callable[..., Any]] = {"convert": convert, "check": check, "stream": stream}
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = acts[order.pop("do")](side, **order)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def convert(peer: Peer, samples: str, data: str) -> dict[str, Any]:
    """Seconds and bytes of the peer's own files."""
    began = time.perf_counter()
    peer.convert(Path(samples), Path(data))
    files = [path for path in Path(data).rglob("*") if path.is_file()]
    return {
        "seconds": time.perf_counter() - began,
        "bytes": sum(path.stat().st_size for path in files),
    }


def check(side: Checked, data: str, batch: int, workers: int, batches: int) -> dict[str, Any]:
    """Rows and digests of some batches, and their sizes."""
    found, tokens, held = [], 0, 0
    running = iter(side.loader(Path(data), batch, workers, 1))
    for one in running:
        tensors = side.tensors(one)
        found.append({"rows": tensors["rows"].tolist(), "digest": digest(tensors)})
        tokens += side.tokens(one)
        held += sum(tensor.nbytes for tensor in tensors.values())
        if len(found) == batches:
            break
    return {"batches": found, "tokens": tokens, "bytes": held}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and contents."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def stream(
    side: Looped, data: str, batch: int, workers: int, seconds: float, seed: int
) -> dict[str, Any]:
    """Seconds to the first batch, and tokens a second once all workers run, epoch after epoch."""
    began = time.perf_counter()
    loader = side.loader(Path(data), batch, workers, seed)
    running = iter(loader)
    next(running)
    arrived = time.perf_counter()
    for _ in range(2 * workers):  # workers start late, and then some batches are there at once
        next(running)
    first = time.perf_counter()
    busy = time.process_time()
    tokens = batches = epochs = 0
    now = first
    while now - first < seconds:
        one = next(running, None)
        if one is None:
            epochs += 1
            running = iter(loader)
            continue
        tokens += side.tokens(one)
        batches += 1
        now = time.perf_counter()
    return {
        "first_batch_seconds": arrived - began,
        "seconds": now - first,
        "tokens": tokens,
        "batches": batches,
        "epochs_ended": epochs,
        "tokens_per_second": tokens / (now - first),
        "processor_seconds": time.process_time() - busy,  # of this process alone
    }
