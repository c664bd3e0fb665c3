"""Students that read the tokens of one tokenizer and write those of another.

A student's directory has the files of the tokenizer that it writes, and in `source_tokenizer/`
those of the one that it reads where that is another.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.formats.cache import Cache
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import StudentSection
from kdcache.text.tokenizers import has_tokenizer
from kdcache.train.students.vocabulary import KnownIds, cache_tokenizer_files, check_tokenizer

#: Folder of a student's directory with the tokenizer of what it reads.
SOURCE_FOLDER = "source_tokenizer"


class TwoTokenizers:
    """Two tokenizers that are called as one of transformers with two sides is.

    Args:
        source: of texts that are read.
        target: of texts that are written.
    """

    def __init__(self, source: Any, target: Any) -> None:
        self.source, self.target = source, target

    def __call__(
        self,
        text: Sequence[str] | None = None,
        *,
        text_target: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """Token ids of source texts, or of target texts."""
        if text_target is not None:
            return self.target(text_target=text_target, **options)
        return self.source(text, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """Texts of ids that were written."""
        found: list[str] = self.target.batch_decode(*args, **options)
        return found


def check_source_tokenizer(
    section: StudentSection, cache: Cache, source: str, target: str
) -> list[Path]:
    """Refuse a student whose own tokenizer gives the ids that it reads other meanings.

    Args:
        section: the recipe's student.
        cache: an open cache.
        source: name of the stream that is read.
        target: name of the stream that is written; its tokenizer is checked elsewhere.

    Returns:
        Files of the student's own source tokenizer; none where that is no other than its target's.

    Raises:
        IdentityError: its tokenizer is neither the cache's, nor a prefix or a padding of it.
        ModelError: transformers cannot load its tokenizer.
    """
    if section.path is None:
        return []
    has_own = has_tokenizer(Path(section.path).expanduser() / SOURCE_FOLDER)
    if not has_own and _same_tokenizer(cache, source, target):
        return []
    name = cache.stream(source).tokenizer
    return check_tokenizer(section, cache, name, SOURCE_FOLDER if has_own else "")


def source_files(cache: Cache, ids: KnownIds, own: Sequence[Path]) -> list[Path]:
    """Files of the tokenizer of what is read; none where it is that of what is written.

    Args:
        cache: an open cache.
        ids: that the student has.
        own: from `check_source_tokenizer`.
    """
    if own and ids.source_rows is not None:
        return list(own)
    if _same_tokenizer(cache, ids.source, ids.target):
        return []
    return cache_tokenizer_files(cache, cache.stream(ids.source).tokenizer)


def _same_tokenizer(cache: Cache, source: str, target: str) -> bool:
    """Whether two streams have one tokenizer, under whatever names."""
    names = [cache.stream(stream).tokenizer for stream in (source, target)]
    return len({cache.tokenizer(name).digest for name in names}) == 1


def save_source_tokenizer(files: Sequence[Path], out: Path) -> None:
    """Put files from `source_files` into a student's directory."""
    if files:
        (out / SOURCE_FOLDER).mkdir()
    for file in files:
        shutil.copyfile(file, out / SOURCE_FOLDER / file.name)


def load_tokenizers(directory: Path) -> Any:
    """The tokenizer of a student's directory, or both as one.

    Raises:
        ModelError: transformers cannot load one.
    """
    target = load_tokenizer(directory)
    if not (directory / SOURCE_FOLDER).is_dir():
        return target
    return TwoTokenizers(load_tokenizer(directory / SOURCE_FOLDER), target)
