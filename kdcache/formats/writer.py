"""The one writer of a cache: data files first, then the record that makes them real."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
import pyarrow as pa

from kdcache.errors import FormatError, IdentityError, KDCacheError, StorageError
from kdcache.formats.commit import (
    LOCK_NAME,
    Lock,
    create_file,
    is_temporary,
    storage_errors,
    write_data,
    write_directory,
)
from kdcache.formats.data_files import write_group, write_ipc
from kdcache.formats.dense import SCALE, VALUES
from kdcache.formats.identity import differences
from kdcache.formats.integrity import check_file, digest_bytes
from kdcache.formats.listing import leftovers, list_commits, names_in, read_commit
from kdcache.formats.manifest import (
    MANIFEST_NAME,
    RESERVED,
    CommitRecord,
    FileRecord,
    Manifest,
    PartRecord,
    Record,
    commit_path,
    encode_record,
    inside,
    part_digest,
    part_path,
    read_record,
    signal_path,
)
from kdcache.formats.signals import SignalRecord

R = TypeVar("R", bound=Record)

#: Keys that may differ between two dumps of the same thing.
_MANIFEST_IGNORES = ("recipe", "versions")
_SIGNAL_IGNORES = ("recipe", "versions", "teacher.path", "teacher.revision")


class CacheWriter:
    """Writes a cache, one process at a time.

    Used as a context manager: entering takes the lock and sweeps what an interrupted dump left
    behind; leaving, by an exception or not, commits nothing. What was not committed by then was
    never written, as far as any reader can tell, and where nothing was, nothing stays.
    """

    def __init__(self, path: str | Path) -> None:
        """Name the cache; nothing is touched before the context is entered.

        Args:
            path: directory of the cache; made where there is none.
        """
        self.path = Path(path)
        self.manifest: Manifest | None = None
        self._lock = Lock(self.path)
        self._made = False

    def __enter__(self) -> Self:
        """Take the lock, read what stands and sweep what no record names.

        Raises:
            StorageError: the directory holds something else than a cache, another process
                writes it, or the disk refused.
            FormatError: the manifest or a commit that stands is damaged.
        """
        with storage_errors(self.path):
            try:
                self._made = not self.path.exists()
                self.path.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                raise StorageError(
                    f"{self.path}: output is a file, a cache is a directory; choose another output"
                ) from None
            self._refuse_others()
        self._lock.acquire()
        try:
            self.manifest = _standing(Manifest, self.path, MANIFEST_NAME)
            self.sweep()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lock back; commit nothing; take away a cache that holds no commit."""
        try:
            # What led here matters more than a tidy end.
            with contextlib.suppress(KDCacheError, OSError):
                if self.manifest is None and not list_commits(self.path):
                    self._discard()
        finally:
            self._lock.release()

    def _discard(self) -> None:
        """Remove what a dump that committed nothing wrote."""
        self.sweep()
        _empty(self.path / "tokenizers")
        for name in RESERVED:
            with contextlib.suppress(OSError):
                (self.path / name).rmdir()
        if set(names_in(self.path)) == {LOCK_NAME}:
            self._lock.remove()
            if self._made:
                self.path.rmdir()

    def _refuse_others(self) -> None:
        """A directory is ours if it is empty, has a manifest, or a dump that began left a lock."""
        names = {item.name for item in self.path.iterdir()}
        if not names or MANIFEST_NAME in names:
            return
        others = sorted(name for name in names - RESERVED - {LOCK_NAME} if not is_temporary(name))
        if LOCK_NAME not in names:
            others = others or sorted(names)
        if others:
            raise StorageError(
                f"{self.path}: output already holds other files ({', '.join(others[:3])}"
                f"{', ...' if len(others) > 3 else ''}); choose an empty or new directory"
            )

    def sweep(self) -> list[str]:
        """Remove temporary files and data files that no commit names.

        Returns:
            Paths inside the cache of what was removed.
        """
        named = {
            file.path
            for signal, shards in list_commits(self.path).items()
            for shard in shards
            for part in self.commit_record(signal, shard).parts
            for file in part.files
        }
        removed = []
        with storage_errors(self.path):
            for path in leftovers(self.path, named):
                if (self.path / path).is_dir() and not (self.path / path).is_symlink():
                    shutil.rmtree(self.path / path)
                else:
                    (self.path / path).unlink(missing_ok=True)
                removed.append(path)
        return removed

    def committed(self, signal: str) -> set[int]:
        """Shards of a signal (or of "samples") whose commit stands."""
        return list_commits(self.path).get(signal, set())

    def commit_record(self, signal: str, shard: int) -> CommitRecord:
        """The commit of one shard.

        Raises:
            FormatError: there is none, or it is damaged or another shard's.
        """
        return read_commit(self.path, signal, shard)

    def write_manifest(self, manifest: Manifest) -> Manifest:
        """Create kdcache.json, or find that the same stands already.

        Recipe and library versions may differ from those that stand; the first ones are kept.

        Returns:
            The manifest that stands.

        Raises:
            IdentityError: a different one stands; the message shows both sides.
        """
        self.manifest = self._create(MANIFEST_NAME, manifest, self._manifest_ignores(manifest))
        return self.manifest

    @staticmethod
    def _manifest_ignores(manifest: Manifest) -> tuple[str, ...]:
        """A tokenizer is its digest; its other files change with library versions."""
        files = tuple(f"tokenizers.{name}.files" for name in manifest.tokenizers)
        return (*_MANIFEST_IGNORES, *files)

    def write_signal(self, record: SignalRecord) -> SignalRecord:
        """Create a signal's record, or find that the same stands already.

        Returns:
            The record that stands.

        Raises:
            IdentityError: a different one stands; the message shows both sides.
        """
        path = signal_path(record.name)
        return self._create(path, record, _SIGNAL_IGNORES, "give the signal another name")

    def put_tokenizer(self, name: str, files: Mapping[str, bytes]) -> list[FileRecord]:
        """Write the files of a tokenizer, before the manifest that names them.

        Where the manifest stands, nothing is written and its own records are returned.

        Args:
            name: tokenizer name.
            files: file name to bytes.
        """
        if self.manifest is not None:
            if name not in self.manifest.tokenizers:
                raise IdentityError(
                    f"{self.path}: the cache has the tokenizers "
                    f"{sorted(self.manifest.tokenizers)}, not {name!r}; choose another output"
                )
            return list(self.manifest.tokenizers[name].files)
        folder = self.path / "tokenizers" / name
        with storage_errors(folder):
            _empty(folder)
        records = []
        for file, data in sorted(files.items()):
            try:
                path = inside(f"tokenizers/{name}/{file}")
            except ValueError as error:
                raise FormatError(f"tokenizer {name}: {error}") from None
            create_file(self.path / path, data)
            records.append(digest_bytes(data, path))
        return records

    def write_part(
        self, signal: str, shard: int, part: int, start: int, stop: int, batch: pa.RecordBatch
    ) -> PartRecord:
        """Write one data file of a shard that is to be committed.

        Where the shard's commit stands, nothing is kept: the bytes must be those committed.

        Args:
            signal: signal name, or "samples".
            shard: shard number.
            part: part number, from 0.
            start: first sample, counted over the corpus.
            stop: sample after the last.
            batch: stop - start rows.

        Raises:
            IdentityError: the shard is committed with other bytes.
            StorageError: the disk refused; nothing is left behind.
        """
        if batch.num_rows != stop - start:
            raise FormatError(
                f"{signal} shard {shard} part {part}: {batch.num_rows} rows given for the "
                f"samples {start} to {stop}"
            )
        if shard in self.committed(signal):
            return self._compare_part(signal, shard, part, [write_ipc(batch, None)])
        record: list[FileRecord] = []

        def write(stream: BinaryIO) -> Path:
            found = write_ipc(batch, stream)
            path = part_path(signal, shard, part, [found])
            record.append(found.model_copy(update={"path": path}))
            return self.path / path

        write_data(self.path / signal / f"{shard:05d}.{part}.arrow", write)
        return PartRecord(start=start, stop=stop, files=record)

    def write_dense_part(
        self,
        signal: str,
        shard: int,
        part: int,
        start: int,
        stop: int,
        values: np.ndarray,
        scale: np.ndarray | None = None,
    ) -> PartRecord:
        """Write one Zarr group of a shard that is to be committed.

        Where the shard's commit stands, nothing is written: the bytes must be those committed.

        Args:
            signal: signal name.
            shard: shard number.
            part: part number, from 0.
            start: first sample, counted over the corpus.
            stop: sample after the last.
            values: [rows, layers, width] as `dense.dense_arrays` says, for all of the samples.
            scale: [rows, layers] float32, for int8.

        Raises:
            IdentityError: the shard is committed with other bytes.
            StorageError: the disk refused; nothing is left behind.
        """
        arrays = {VALUES: values} | ({} if scale is None else {SCALE: scale})
        if shard in self.committed(signal):
            return self._compare_part(signal, shard, part, write_group(None, arrays))
        files: list[FileRecord] = []

        def write(folder: Path) -> Path:
            found = write_group(folder, arrays)
            path = part_path(signal, shard, part, found)
            files.extend(f.model_copy(update={"path": f"{path}/{f.path}"}) for f in found)
            return self.path / path

        write_directory(self.path / signal / f"{shard:05d}.{part}.zarr", write)
        return PartRecord(start=start, stop=stop, files=files)

    def _compare_part(
        self, signal: str, shard: int, part: int, given: list[FileRecord]
    ) -> PartRecord:
        """The part that stands, if it has the bytes that are given."""
        standing = self.commit_record(signal, shard).parts
        found = "no such part"
        if part < len(standing):
            found = part_digest(standing[part].files)
        if found != part_digest(given):
            raise IdentityError(
                f"{self.path}: {signal} shard {shard} part {part} holds xxh3 {found} in the cache, "
                f"{part_digest(given)} given: corpus, tokenizer or recipe changed; use those the "
                "cache was begun with, or choose another output"
            )
        return standing[part]

    def commit(self, record: CommitRecord) -> CommitRecord:
        """Make one shard real: check that its files are there, then create the record.

        Returns:
            The commit that stands.

        Raises:
            IdentityError: a different commit of the shard stands.
        """
        for part in record.parts:
            for file in part.files:
                check_file(self.path, file)
        return self._create(commit_path(record.signal, record.shard), record, ())

    def _create(
        self,
        path: str,
        record: R,
        ignore: tuple[str, ...],
        otherwise: str = "choose another output",
    ) -> R:
        try:
            create_file(self.path / path, encode_record(record))
        except FileExistsError:
            standing = read_record(type(record), self.path, path)
        else:
            return record
        faults = differences(_tree(standing), _tree(record), ignore)
        if faults:
            shown = "; ".join(faults[:4]) + ("; ..." if len(faults) > 4 else "")
            raise IdentityError(
                f"{self.path / path}: {shown}: use what the cache was made with, or {otherwise}"
            )
        return standing


def _empty(folder: Path) -> None:
    """Remove everything in a folder."""
    for item in sorted(folder.rglob("*"), reverse=True):
        if item.is_dir() and not item.is_symlink():
            item.rmdir()
        else:
            item.unlink()


def _tree(record: Record) -> dict[str, Any]:
    return record.model_dump(mode="json")


def _standing(kind: type[R], root: Path, path: str) -> R | None:
    try:
        return read_record(kind, root, path)
    except FileNotFoundError:
        return None
