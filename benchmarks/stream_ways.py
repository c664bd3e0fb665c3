"""The ways of delivering batches that `bench_stream` compares, each a process that takes orders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from setting import log
from stream_peers.environments import Server, make_environment, versions_in

#: Way to its environment and script; those of kdcache run under this Python.
PEERS = {
    "datasets, numpy": ("datasets", "peer_datasets numpy"),
    "datasets, arrow": ("datasets", "peer_datasets arrow"),
    "mosaicml-streaming": ("streaming", "peer_streaming"),
    "litdata": ("litdata", "peer_litdata"),
    "webdataset": ("webdataset", "peer_webdataset"),
    "parquet (DistillKit-like)": ("datasets", "peer_parquet"),
}
OURS = {
    "kdcache": "side_kdcache",
    "kdcache, no thread": "side_kdcache 0",
    "copy": "side_copy flat",
    "clone": "side_copy clone",
}

#: Ways that get a new process for every turn. LitData waits ten seconds before it reads again in a
#: process that has stopped reading in the middle of an epoch.
FRESH = ("litdata",)


class Ways:
    """The processes of all ways, and what became of those that failed.

    Args:
        root: folder of the run.
        venvs: folder of the environments.
        wanted: names of the peers.
    """

    def __init__(self, root: Path, venvs: Path, wanted: list[str]) -> None:
        self.root = root
        self.failed: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.servers: dict[str, Server] = {}
        self.batch: dict[tuple[str, int], int] = {}
        self.workers: dict[tuple[str, str, int], int] = {}
        for name in wanted:
            environment, script = PEERS[name]
            try:
                python = make_environment(venvs, environment)
                self.versions[environment] = versions_in(python, environment)
                self.servers[name] = Server(python, script, root / f"{script}.log")
            except (subprocess.CalledProcessError, OSError) as error:
                self.fail(name, f"not installed: {getattr(error, 'stderr', '') or error}")
        for name, script in OURS.items():
            self.servers[name] = Server(sys.executable, script, root / f"{script}.log")

    def fail(self, name: str, why: object) -> None:
        """Leave a way out from now on, and say so."""
        self.failed[name] = str(why)[-600:]
        log(f"{name} is left out: {why}")
        server = self.servers.pop(name, None)
        if server is not None:
            server.end()

    def ask(self, name: str, do: str, **order: Any) -> dict[str, Any] | None:
        """The answer of a way; None, and the way is out, if it fails."""
        try:
            return self.servers[name].ask(do, **order)
        except (RuntimeError, OSError, ValueError) as error:
            if name in OURS:
                raise
            self.fail(name, error)
            return None

    def stream(
        self, name: str, codec: str, budget: int, seconds: float, seed: int
    ) -> dict[str, Any] | None:
        """What a way delivers in some seconds; None if it fails."""
        ours = name in OURS
        if name in FRESH:
            self.restart(name)
        return self.ask(
            name,
            "stream",
            data=self.data(name, codec),
            batch=budget if ours else self.batch[codec, budget],
            workers=self.workers.get((name, codec, budget), 0),
            seconds=seconds,
            seed=seed,
        )

    def restart(self, name: str) -> None:
        """End the process of a way and begin another."""
        old = self.servers[name]
        old.end()
        self.servers[name] = Server(old.python, old.script, old.log)

    @property
    def peers(self) -> list[str]:
        """Names of those peers that are still there."""
        return [name for name in self.servers if name not in OURS]

    def data(self, name: str, codec: str) -> Path:
        """Where a way's files are."""
        short = codec.split()[0]
        return self.root / (f"cache-{short}" if name in OURS else f"{short}-{slug(name)}")

    def end(self) -> None:
        """End all processes."""
        for server in self.servers.values():
            server.end()


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
