"""Whether a recipe and a corpus would give the samples that a cache has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from kdcache.dump.chunk import sample_ids_of
from kdcache.errors import IdentityError
from kdcache.formats.cache import Cache
from kdcache.formats.identity import CorpusDigest, differences
from kdcache.formats.manifest import Manifest
from kdcache.progress import progress
from kdcache.recipe import CorpusSection, Recipe
from kdcache.text.corpus import read_corpus


def manifest_recipe(recipe: Recipe, max_tokens: int | None) -> dict[str, Any]:
    """What a manifest says of its recipe: all that decides the samples."""
    dump = recipe.dump.model_dump(mode="json")
    kept = ("tokenizers", "streams", "too_long", "shard_tokens")
    corpus = recipe.corpus.model_dump(mode="json") if recipe.corpus else {}
    return {
        "name": recipe.name,
        "corpus": corpus,
        "dump": {**{key: dump[key] for key in kept}, "max_tokens": max_tokens},
    }


def _as_read_now(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of its recipe, keys that it did not know yet at their defaults."""
    try:
        recipe = Recipe.model_validate({**tree, "corpus": tree["corpus"] or None})
    except (ValidationError, KeyError):
        return dict(tree)
    return manifest_recipe(recipe, recipe.dump.max_tokens)


def check_recipe(manifest: Manifest, recipe: Recipe, path: str) -> None:
    """Refuse a recipe that would give other samples than a cache has.

    Paths may differ, files move; what they hold is checked by digests. A limit that the recipe
    leaves to the teacher is the cache's.

    Raises:
        IdentityError: with both sides.
    """
    given = manifest_recipe(recipe, recipe.dump.max_tokens)
    stands = _as_read_now(manifest.recipe)
    tasks = list(recipe.corpus.tasks) if recipe.corpus else []
    fields = recipe.corpus.field_names if recipe.corpus else []
    places = ["corpus", *(f"corpus.tasks.{name}" for name in tasks)]
    ignore = [f"{place}.{key}" for place in places for key in ("path", "format", "fields")]
    # What `without` names is among the fields that are compared below.
    ignore += [
        "name",
        "corpus.without",
        *(f"dump.tokenizers.{name}.path" for name in recipe.dump.tokenizers),
    ]
    if recipe.dump.max_tokens is None:
        ignore.append("dump.max_tokens")
    faults = []
    if tasks != manifest.corpus.tasks:
        faults.append(f"corpus.tasks: {manifest.corpus.tasks} in the cache, {tasks} given")
        ignore.append("corpus.tasks")
    faults += differences(stands, given, ignore)
    if fields != manifest.corpus.fields:
        faults.append(f"corpus.fields: {manifest.corpus.fields} in the cache, {fields} given")
    if faults:
        raise IdentityError(
            f"{path}: {'; '.join(faults[:4])}: use what the cache was made with, or choose "
            "another output"
        )


def check_corpus(cache: Cache, corpus: CorpusSection) -> None:
    """Refuse a corpus whose rows are not those a cache was made of. Nothing is tokenised.

    Raises:
        IdentityError: with both digests, or both counts.
    """
    standing = cache.manifest.corpus
    digest = CorpusDigest()
    num_rows = num_empty = 0
    kept = np.concatenate([cache.samples(shard).row for shard in range(cache.num_shards)])
    with progress(standing.num_rows, "check corpus", "row") as bar:
        for batch in read_corpus(corpus):
            num_rows += batch.num_read
            num_empty += batch.dropped
            begin, end = np.searchsorted(kept, (num_rows - batch.num_read, num_rows))
            chosen = np.flatnonzero(np.isin(batch.rows, kept[begin:end], assume_unique=True))
            fields = {name: [texts[i] for i in chosen] for name, texts in batch.fields.items()}
            ids = sample_ids_of(fields, batch.task, corpus.label)
            digest.update(ids, batch.rows[chosen])
            bar.update(batch.num_read)
    found = {"rows": num_rows, "empty": num_empty, "digest": digest.hexdigest()}
    expected = {
        "rows": standing.num_rows,
        "empty": standing.dropped.get("empty", 0),
        "digest": standing.digest,
    }
    faults = differences(expected, found)
    if faults:
        raise IdentityError(
            f"{cache.path}: another corpus: {'; '.join(faults)}: use the corpus the cache was "
            "made of, or choose another output"
        )
