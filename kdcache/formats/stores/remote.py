"""A cache on an object store, or wherever fsspec reaches: s3://, gs://, abfs://, memory://.

Nothing is ever changed in place. Data files are put whole, the record that makes them real is put
create-only after them (If-None-Match on S3), and what is read is fetched into the local copy and
checked there before it is mapped.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.config import conf
from fsspec.core import url_to_fs

from kdcache.errors import IntegrityError, StorageError
from kdcache.formats.manifest import FileRecord
from kdcache.formats.stores import disk
from kdcache.formats.stores.commit import storage_errors
from kdcache.formats.stores.local_copy import LocalCopy
from kdcache.formats.stores.retry import TruncatedError, reason, retried
from kdcache.formats.stores.scratch import scratch_folder
from kdcache.formats.stores.store import CHUNK_BYTES, REPAIR, Claim, Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Bytes of one ranged request; what a dropped connection costs at most.
RANGE_BYTES = 1 << 24
#: Files fetched, or uploaded of one folder, at a time.
THREADS = 8
#: How much of the local copy may be filled ahead of need.
AHEAD = 0.5

#: Stores whose create-only put is one atomic request: If-None-Match of s3fs, ifGenerationMatch=0
#: of gcsfs, overwrite=False of adlfs; memory:// within one process.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
_EXTRAS = dict.fromkeys(("s3", "s3a"), "pip install s3fs")

#: For s3fs: one request where there need not be two, and a bounded buffer for large uploads.
_S3_READ = {"max_concurrency": 1}
_S3_UPLOAD = {"chunksize": 1 << 25, "max_concurrency": 4}
#: botocore tries a request again by itself; what it gives up, `retry` takes up.
_S3_CONFIG = {
    "retries": {"mode": "standard", "total_max_attempts": 3},
    "connect_timeout": 10,
    "read_timeout": 30,
    "max_pool_connections": 32,
}


class RemoteStore(Store):
    """A cache below an fsspec URL.

    Drivers take their options from the environment and fsspec's configuration, as they do
    elsewhere (FSSPEC_S3_ENDPOINT_URL, AWS_PROFILE, ...). A claim keeps nobody out: of two that
    write the same shard one finds the other's record standing, and its bytes must be the same.
    """

    exclusive = False

    def __init__(self, url: str) -> None:
        """Name the store; no request is made.

        Args:
            url: such as "s3://bucket/caches/deen".

        Raises:
            StorageError: no driver for the URL is installed.
        """
        self.name = url.rstrip("/")
        protocol = url.split("://")[0]
        if "::" in url:
            raise StorageError(f"{url}: chained URLs are not taken; give the store's own")
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            advice = _EXTRAS.get(protocol, reason(error))
            raise StorageError(f"{url}: no driver for {protocol}:// installed; {advice}") from None
        except ValueError:
            raise StorageError(f"{url}: fsspec knows no {protocol}://; correct the URL") from None
        self._s3 = protocol in ("s3", "s3a")
        self._atomic = protocol in _ATOMIC
        self._connecting = Lock()
        self._driver: tuple[int, Any, str] | None = None
        self._local: LocalCopy | None = None

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[str]]:
        """Connections do not travel to another process."""
        return RemoteStore, (self.name,)

    @property
    def local(self) -> LocalCopy:
        """Where files are kept that were fetched."""
        if self._local is None:
            self._local = LocalCopy.from_environment(self.name)
        return self._local

    def _connected(self) -> tuple[Any, str]:
        """The driver, an instance of our own in each process, and the cache's path in it."""
        with self._connecting:
            if self._driver is None or self._driver[0] != os.getpid():
                self._driver = os.getpid(), *self._connect()
            return self._driver[1:]

    def _connect(self) -> tuple[Any, str]:
        options: dict[str, Any] = {"skip_instance_cache": True}
        if self._s3:
            given = conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = {**_S3_CONFIG, **given}
        files, root = url_to_fs(self.name, **options)
        if self._s3:
            files.retries = 1  # `retry` sees to it
        # What another process writes must be seen at once.
        getattr(files, "dircache", files).use_listings_cache = False
        if not self._atomic:
            logger.warning(
                "%s: kdcache knows of no create-only writes there; let one process write at a time",
                self.name,
            )
        return files, root.rstrip("/")

    def _call(self, path: str, what: str, call: Callable[[Any, str], T]) -> T:
        """What a call of the driver on a path returns, tried again while it may succeed."""

        def connected() -> T:
            files, root = self._connected()
            return call(files, f"{root}/{path}" if path else root)

        where = self.at(path) if path else self.name
        return retried(f"{where}: cannot be {what}", connected)

    def exists(self) -> bool:
        """Whether anything lies below the URL."""
        return bool(self.names(""))

    def read(self, path: str) -> bytes:
        """All bytes of a small file."""
        options = _S3_READ if self._s3 else {}
        return self._call(path, "read", lambda files, at: bytes(files.cat_file(at, **options)))

    def pieces(self, path: str, chunk: int = CHUNK_BYTES) -> Iterator[bytes]:
        """All bytes of a file in order, by requests of ranges."""
        size, start = self.size(path), 0
        while start < size:
            stop = min(size, start + max(chunk, RANGE_BYTES))
            data = self._range(path, start, stop)
            for begin in range(0, len(data), chunk):
                yield data[begin : begin + chunk]
            start = stop

    def _range(self, path: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file."""

        def fetched(files: Any, at: str) -> bytes:
            data = bytes(files.cat_file(at, start=start, end=stop))
            if len(data) != stop - start:
                raise TruncatedError(f"{len(data)} bytes came of {stop - start}")
            return data

        return self._call(path, "read", fetched)

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return self._call(path, "looked at", self._size)

    def _size(self, files: Any, at: str) -> int:
        """Bytes of a file; of a folder there are none."""
        if self._s3:  # `info` would list the bucket too where there is no such file
            bucket, key, _ = files.split_path(at)
            return int(files.call_s3("head_object", Bucket=bucket, Key=key)["ContentLength"])
        found = files.info(at)
        if found["type"] == "directory":
            raise FileNotFoundError(at)
        return int(found["size"])

    def names(self, folder: str) -> list[str]:
        """Names of files and folders in a folder, sorted."""

        def listed(files: Any, at: str) -> list[str]:
            try:
                found = files.ls(at, detail=False)
            except NotADirectoryError:
                return []
            # An empty object may stand for the folder itself.
            inside = (name.rstrip("/") for name in found)
            return sorted({name.rsplit("/", 1)[-1] for name in inside if name != at})

        try:
            return self._call(folder, "listed", listed)
        except FileNotFoundError:
            return []

    def walk(self, folder: str) -> list[str]:
        """Paths of all files below a folder, sorted."""

        def found(files: Any, at: str) -> list[str]:
            below = len(at) + 1
            prefix = f"{folder}/" if folder else ""
            return sorted(f"{prefix}{name[below:]}" for name in files.find(at) if name != at)

        try:
            return self._call(folder, "listed", found)
        except FileNotFoundError:
            return []

    def create(self, path: str, data: bytes) -> None:
        """Create a file with all its bytes; never replace one.

        Where an answer was lost, a further try may meet what the first one made: FileExistsError
        then, and the caller compares what stands.
        """

        def created(files: Any, at: str) -> None:
            # A server that ignores the condition must not replace what stands, so look first.
            with contextlib.suppress(FileNotFoundError):
                self._size(files, at)
                raise FileExistsError(at)
            if self._atomic:
                files.pipe_file(at, data, mode="create")
                return
            files.makedirs(at.rsplit("/", 1)[0], exist_ok=True)
            temporary = f"{at}.tmp-{os.getpid()}"
            files.pipe_file(temporary, data)
            files.mv(temporary, at)

        self._call(path, "written", created)

    def replace(self, path: str, data: bytes) -> None:
        """Write a small file whole in place of the one before."""

        def replaced(files: Any, at: str) -> None:
            if not self._atomic:
                files.makedirs(at.rsplit("/", 1)[0], exist_ok=True)
            files.pipe_file(at, data)

        self._call(path, "written", replaced)

    def put_file(self, hint: str, write: Callable[[BinaryIO], str]) -> str:
        """Write a file on the local disk, then upload it."""
        with scratch_folder() as folder:
            file = folder / hint.rsplit("/", 1)[-1]
            with storage_errors(file):
                stream = disk.OutputFile(file)
                try:
                    path = write(cast(BinaryIO, stream))
                finally:
                    stream.close()
            self._upload(file, path)
        return path

    def put_folder(self, hint: str, write: Callable[[Path], str]) -> str:
        """Fill a folder on the local disk, then upload its files."""
        with scratch_folder() as folder:
            with storage_errors(folder):
                path = write(folder)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            targets = [f"{path}/{file.relative_to(folder).as_posix()}" for file in files]
            with ThreadPoolExecutor(THREADS, "kdcache-upload") as threads:
                list(threads.map(self._upload, files, targets))
        return path

    def _upload(self, file: Path, path: str) -> None:
        """Put a local file; what is there afterwards must have its size."""
        size = file.stat().st_size
        options = _S3_UPLOAD if self._s3 else {}

        def uploaded(files: Any, at: str) -> None:
            files.put_file(str(file), at, **options)
            found = self._size(files, at)
            if found != size:
                raise TruncatedError(f"{found} bytes stand there, expected {size}")

        self._call(path, "written", uploaded)

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        try:
            self._call(path, "removed", lambda files, at: files.rm(at, recursive=True))
        except FileNotFoundError:
            return

    def open(self, file: FileRecord) -> BinaryIO:
        """The local copy of a file, fetched if need be; the handle survives its eviction."""
        return self.local.ensure(file, lambda stream: self._download(file, stream))

    def _download(self, file: FileRecord, stream: BinaryIO) -> None:
        try:
            for piece in self.pieces(file.path, RANGE_BYTES):
                stream.write(piece)
        except FileNotFoundError:
            raise IntegrityError(f"{self.at(file.path)}: missing; {REPAIR}") from None

    def folder(self, files: Sequence[FileRecord]) -> Path:
        """The folder of the local copy in which the files lie under their paths."""
        for file in files:
            self.open(file).close()
        return self.local.root

    def fetch(self, files: Iterable[FileRecord]) -> None:
        """Fetch into the local copy, several at a time.

        No more than a part of its bound: what is fetched ahead must not push out itself.
        """
        room = int(AHEAD * self.local.max_bytes)
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(THREADS, "kdcache-fetch") as threads:
            for file in files:
                room -= file.bytes
                if room < 0:
                    break
                if len(running) == THREADS:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                running.add(threads.submit(self._fetch, file))
            for future in running:
                future.result()

    def _fetch(self, file: FileRecord) -> None:
        self.open(file).close()

    def claim(self, name: str) -> Claim | None:
        """Nobody is kept out; records decide."""
        return _NoClaim()

    def stale_claims(self) -> list[str]:
        """There are none."""
        return []

    def make(self) -> bool:
        """An object store has no folders to make."""
        return not self.exists()

    def discard(self, root: bool) -> None:
        """An object store has no empty folders to remove."""


class _NoClaim:
    """Leave to write that excludes nobody; nothing of others may be swept under it."""

    stale = False

    def release(self, tidy: bool = True) -> None:
        """Nothing is held."""
