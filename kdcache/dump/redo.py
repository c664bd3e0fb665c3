"""Parts of a cache made again: signals by their teacher, samples and tokenizers from the corpus.

What is made goes into a folder beside the cache, from which `formats.mending` puts it in place. How
it was made the first time is what the cache's own records say; a recipe may be given instead, and
dotted overrides where paths have moved.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from kdcache.dump.checks import check_streams
from kdcache.dump.ranks import Ranks
from kdcache.dump.recipe_tokenizers import max_tokens, recipe_tokenizers
from kdcache.dump.samples import SampleWriter
from kdcache.dump.shards import redo_shard
from kdcache.dump.signals.encoder import Request, SignalEncoder
from kdcache.dump.signals.kinds import ENCODERS
from kdcache.dump.stopping import Stopping
from kdcache.dump.teacher import Teacher
from kdcache.dump.teachers.in_turn import Teachers
from kdcache.dump.teachers.loading import load_teacher
from kdcache.dump.tokenize import Tokenizer
from kdcache.dump.watch import Watch
from kdcache.errors import FormatError, IdentityError, KDCacheError, RecipeError
from kdcache.formats.cache import Cache
from kdcache.formats.data_files import write_ipc
from kdcache.formats.identity import differences
from kdcache.formats.listing import list_commits, read_commit, read_signal
from kdcache.formats.manifest import (
    MANIFEST_NAME,
    SAMPLES,
    CommitRecord,
    FileRecord,
    Manifest,
    PartRecord,
    part_path,
    signal_path,
)
from kdcache.formats.signals import SignalRecord
from kdcache.formats.stores.scratch import scratch_folder
from kdcache.formats.stores.store import Store, open_store
from kdcache.formats.writer import SIGNAL_IGNORES, CacheWriter
from kdcache.recipe import Recipe, load_recipe, parse_recipe
from kdcache.recipe.tree import override
from kdcache.text.corpus import read_corpus

Overrides = Sequence[tuple[str, str]]

#: Where it is to be found is said by the error before this.
ADVICE = "name what it was made with by --recipe or overrides, or a copy of the cache by --mirror"


class Redo:
    """Makes parts of a cache again, one shard at a time; a `mending.Source`.

    Used as a context manager, for the folder in which it works.
    """

    how = "made again"

    def __init__(self, store: Store, recipe: str | None, overrides: Overrides) -> None:
        """Load nothing yet.

        Args:
            store: of the cache.
            recipe: file or built-in name; what the cache's own records say without it.
            overrides: (dotted path, YAML text) pairs for either.
        """
        self._store, self._recipe, self._overrides = store, recipe, overrides
        self._scratch = scratch_folder()
        self._folder = Path()
        self._teachers: dict[str, Teacher] = {}
        self._encoder: SignalEncoder | None = None
        self._samples: _Remade | None = None

    def __enter__(self) -> Self:
        """Make the folder."""
        self._folder = self._scratch.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove it."""
        self._scratch.__exit__(kind, error, trace)

    def manifest(self) -> Manifest:
        """The manifest, from the corpus; the commits of the samples that stand must agree."""
        if self._recipe is None:
            raise RecipeError(f"{self._store.at(MANIFEST_NAME)}: it alone said how; {ADVICE}")
        made = self._samples = self._remake([])
        for number in sorted(list_commits(self._store).get(SAMPLES, set())):
            try:
                stands = read_commit(self._store, SAMPLES, number)
            except FormatError:
                continue  # broken itself
            if number >= len(made.commits) or stands.digest != made.commits[number].digest:
                raise IdentityError(
                    f"{self._store.name}: samples shard {number} is {stands.digest} in the cache, "
                    f"the recipe gives another: {ADVICE}"
                )
        assert made.manifest is not None
        return made.manifest

    def signal(self, name: str) -> SignalRecord:
        """The record of a signal, from the recipe; its commits that stand must be of it."""
        if self._recipe is None:
            raise RecipeError(f"{self._store.at(signal_path(name))}: it alone said how; {ADVICE}")
        record = self._encoder_of(name, None).record
        for number in sorted(list_commits(self._store).get(name, set())):
            try:
                said = read_commit(self._store, name, number).record
            except FormatError:
                continue  # broken itself
            if said != record.digest:
                raise IdentityError(
                    f"{self._store.at(signal_path(name))}: the recipe gives a signal of digest "
                    f"{record.digest}, the commit of shard {number} is of {said}: {ADVICE}"
                )
        return record

    def tokenizer_file(self, name: str, file: FileRecord) -> bytes:
        """A file of a tokenizer, from where the recipe has it, or trained again."""
        recipe = self._samples_recipe()
        files = recipe_tokenizers(recipe, check_streams(recipe))[name].files()
        return files.get(file.path.rpartition("/")[2], b"")

    def offers(self, signal: str, number: int, has_data: bool) -> bool:
        """A signal that is unfinished is left to `kdcache dump`, but for what was begun of it."""
        return has_data or signal == SAMPLES

    def prepare(self, signal: str, shards: list[int]) -> None:
        """Load the teacher of a signal and check that it is the one; make the samples."""
        if signal == SAMPLES:
            self._samples = self._remake(shards)
        else:
            self._encoder = self._encoder_of(signal, read_signal(self._store, signal))

    def shard(self, signal: str, number: int) -> Store:
        """Make one shard, in a cache of its own."""
        if signal == SAMPLES:
            assert self._samples is not None, "prepared before"
            return self._samples.store
        assert self._encoder is not None, "prepared before"
        folder, encoder = self._folder / f"{signal}.{number}", self._encoder
        cache = self._cache()
        with CacheWriter(folder) as writer, Stopping() as stopping:
            watch = Watch(writer.store, Ranks(), stopping)
            redo_shard(writer, cache, encoder, number, watch)
        return open_store(folder)

    def done(self, signal: str, number: int) -> None:
        """Remove what was made of a shard."""
        if signal != SAMPLES:
            shutil.rmtree(self._folder / f"{signal}.{number}", ignore_errors=True)

    def _cache(self) -> Cache:
        """The cache as it stands, without signals whose record is broken."""
        return Cache(self._store, skip_broken=True)

    def _encoder_of(self, name: str, stands: SignalRecord | None) -> SignalEncoder:
        """What makes a signal, loaded with the teacher; it must be what the record says."""
        cache = self._cache()
        section = self._signal_recipe(cache, name, stands).dump
        used = section.teacher_of(name)
        kind = section.signals[name].kind
        teacher = None
        if used is not None:
            # Attention probabilities need another implementation, which gives other float noise.
            key = f"{used.model_dump_json()} {kind == 'attention'}"
            if key not in self._teachers:
                self._teachers.clear()  # before the next one takes memory
                self._teachers[key] = load_teacher(used, needs_attention=kind == "attention")
            teacher = self._teachers[key]
        encoder = ENCODERS[kind](cache, Request(section, name, teacher))
        if stands is not None:
            given = encoder.record
            before, now = (record.model_dump(mode="json") for record in (stands, given))
            faults = differences(before, now, SIGNAL_IGNORES)
            begun, asked = (r.recipe.get("batch_tokens") for r in (stands, given))
            if begun != asked:
                faults.append(f"dump.batch_tokens: {begun} in the cache, {asked} given")
            if faults:
                where = self._store.at(signal_path(name))
                raise IdentityError(f"{where}: {'; '.join(faults[:4])}: {ADVICE}")
            encoder.record = stands
        return encoder

    def _signal_recipe(self, cache: Cache, name: str, stands: SignalRecord | None) -> Recipe:
        """How one signal is made."""
        if self._recipe is not None:
            recipe = load_recipe(self._recipe, self._overrides).single()
            if name not in recipe.dump.signals:
                raise RecipeError(
                    f"{self._recipe}: it has no signal {name!r}; it has "
                    f"{sorted(recipe.dump.signals)}"
                )
            return recipe
        assert stands is not None, "a record that is broken does not say"
        try:
            signal = dict(stands.recipe["signal"])
            signal.pop("teacher", None)  # its section stands beside it
            dump = {
                **self._own(cache.manifest)["dump"],
                "teacher": stands.recipe["teacher"],
                "signals": {name: signal},
                "seed": stands.seed,
                "batch_tokens": stands.recipe["batch_tokens"],
            }
        except (KeyError, TypeError, AttributeError):
            where = self._store.at(signal_path(name))
            raise RecipeError(f"{where}: it does not say how it was dumped; {ADVICE}") from None
        return self._parsed({**self._own(cache.manifest), "dump": dump})

    def _samples_recipe(self) -> Recipe:
        """How samples and tokenizers are made."""
        if self._recipe is not None:
            return load_recipe(self._recipe, self._overrides).single()
        cache = self._cache()
        tree = self._own(cache.manifest)
        # A tokenizer without a path is the teacher's; only signals say which that was.
        said = [record.recipe.get("teacher") for record in cache.signals.values()]
        tree["dump"]["teacher"] = next((teacher for teacher in said if teacher), None)
        return self._parsed(tree)

    def _own(self, manifest: Manifest) -> dict[str, Any]:
        """What the manifest says of its recipe."""
        said = manifest.recipe
        if not said.get("corpus") and not self._overrides and self._imported():
            raise RecipeError(
                f"{self._store.name}: it was imported; name a copy of it by --mirror, or import "
                "the files again"
            )
        if not isinstance(said.get("corpus"), Mapping) or not isinstance(said.get("dump"), Mapping):
            where = self._store.at(MANIFEST_NAME)
            raise RecipeError(f"{where}: it does not say how it was dumped; {ADVICE}")
        return {key: dict(said[key]) for key in ("corpus", "dump")} | {"name": "repair"}

    def _imported(self) -> bool:
        """Whether its labels came from files of others, and its samples with them."""
        return any(record.imported for record in self._cache().signals.values())

    def _parsed(self, tree: dict[str, Any]) -> Recipe:
        for dotted, text in self._overrides:
            override(tree, dotted, text)
        return parse_recipe(tree, where=f"the recipe of {self._store.name}")

    def _remake(self, shards: list[int]) -> _Remade:
        """Read the corpus again and keep some shards of the samples."""
        recipe = self._samples_recipe()
        corpus = check_streams(recipe)
        stands = self._standing_manifest()
        tokenizers = self._standing_tokenizers(stands)
        tokenizers = tokenizers or recipe_tokenizers(recipe, corpus)
        if stands is not None:
            limit = stands.recipe.get("dump", {}).get("max_tokens", recipe.dump.max_tokens)
        else:
            limit = max_tokens(recipe.dump, Teachers(recipe.dump), tokenizers)
        made = _Remade(self._folder / "samples", set(shards))
        with made, Stopping() as stopping:
            num_rows = sum(batch.num_read for batch in read_corpus(corpus))
            SampleWriter(made, recipe, corpus, tokenizers, limit).run(num_rows, stopping)
        if stands is not None:
            self._compare(stands, made)
        return made

    def _compare(self, stands: Manifest, made: _Remade) -> None:
        assert made.manifest is not None
        kept = {"corpus", "streams", "shards"}
        before, now = (
            manifest.model_dump(mode="json", include=kept) for manifest in (stands, made.manifest)
        )
        faults = differences(before, now)
        if faults:
            raise IdentityError(
                f"{self._store.name}: another corpus or tokenizer: {'; '.join(faults[:4])}: "
                f"{ADVICE}"
            )

    def _standing_manifest(self) -> Manifest | None:
        try:
            return self._cache().manifest
        except FormatError:
            return None

    def _standing_tokenizers(self, manifest: Manifest | None) -> dict[str, Tokenizer]:
        """The cache's own tokenizers, if all of them are sound."""
        if manifest is None:
            return {}
        cache, found = self._cache(), {}
        for name, record in manifest.tokenizers.items():
            try:
                found[name] = Tokenizer.load(str(cache.tokenizer_dir(name)))
            except KDCacheError:
                return {}
            if found[name].digest != record.digest:
                return {}
        return found


class _Remade(CacheWriter):
    """Takes the samples of a whole corpus, keeps some shards of them, and writes no manifest.

    Attributes:
        commits: of all shards, in order.
    """

    def __init__(self, folder: Path, kept: set[int]) -> None:
        super().__init__(folder)
        self._kept = kept
        self.commits: list[CommitRecord] = []

    def write_part(
        self, signal: str, shard: int, part: int, start: int, stop: int, batch: pa.RecordBatch
    ) -> PartRecord:
        """Write a part, or digest it alone."""
        if shard in self._kept:
            return super().write_part(signal, shard, part, start, stop, batch)
        file = write_ipc(batch, None)
        path = part_path(signal, shard, part, [file])
        return PartRecord(start=start, stop=stop, files=[file.model_copy(update={"path": path})])

    def commit(self, record: CommitRecord) -> CommitRecord:
        """Commit a shard that is kept."""
        self.commits.append(record)
        return super().commit(record) if record.shard in self._kept else record

    def write_manifest(self, manifest: Manifest) -> Manifest:
        """Hold it."""
        self.manifest = manifest
        return manifest
