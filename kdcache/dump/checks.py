"""What can be wrong with a dump before anything is written: streams, inputs, vocabularies."""

from __future__ import annotations

import logging
from pathlib import Path

from kdcache.dump.signals.attention import check_layers
from kdcache.dump.signals.encoder import Request
from kdcache.dump.signals.kinds import ENCODERS
from kdcache.dump.teacher import Teacher
from kdcache.dump.teachers.loading import teacher_class
from kdcache.dump.tokenize import Tokenizer
from kdcache.errors import IdentityError, ModelError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.formats.stores.claims import standing_manifest
from kdcache.formats.stores.store import open_store
from kdcache.recipe import (
    CorpusSection,
    DumpSection,
    Recipe,
    SentencePieceTokenizer,
    TeacherSection,
    WordPieceTokenizer,
    signal_streams,
)

logger = logging.getLogger(__name__)


def check_streams(recipe: Recipe) -> CorpusSection:
    """What can be known from the recipe alone.

    Returns:
        Its corpus.

    Raises:
        RecipeError: there is none, a name resolves to nothing, or a signal has no teacher.
    """
    corpus, section = recipe.corpus, recipe.dump
    if corpus is None:
        raise RecipeError("a dump needs a corpus: set corpus.fields (and corpus.format)")
    for name, stream in section.streams.items():
        for key, field in (("field", stream.field), ("pair", stream.pair)):
            if field not in (None, *corpus.field_names):
                raise RecipeError(
                    f"dump.streams.{name}.{key} is {field!r}; corpus.fields has "
                    f"{sorted(corpus.field_names)}; where there is no such text say "
                    f"--corpus.without '[{field}]'"
                )
    for name, tokenizer in section.tokenizers.items():
        if isinstance(tokenizer, SentencePieceTokenizer | WordPieceTokenizer):
            unknown = sorted(set(tokenizer.fields) - set(corpus.field_names))
            if unknown:
                raise RecipeError(
                    f"dump.tokenizers.{name}.fields has {unknown[0]!r}; corpus.fields has "
                    f"{sorted(corpus.field_names)}"
                )
    if not section.streams:
        raise RecipeError("a dump needs at least one stream: set dump.streams")
    for name, signal in section.signals.items():
        if signal.kind != "masks" and section.teacher_of(name) is None:
            raise RecipeError(
                f"signals.{name} needs a teacher: set dump.teacher.path, or signals.{name}.teacher "
                f"to one of dump.teachers {sorted(section.teachers)}"
            )
        task = signal.task if signal.kind == "classes" else None
        if task not in (None, *corpus.tasks):
            raise RecipeError(
                f"signals.{name}.task is {task!r}; corpus.tasks has {sorted(corpus.tasks)}"
            )
    return corpus


def check_inputs(section: DumpSection, out: str | Path) -> None:
    """A signal that is made from another needs it, in the recipe or in the cache that stands.

    Args:
        section: the recipe's.
        out: directory or URL of the cache, if there is one.

    Raises:
        RecipeError: it is in neither, is of another kind or stream, or has too few hypotheses.
    """
    begun = standing_manifest(open_store(out)) is not None
    stands = open_cache(out).signals if begun else {}
    known = {name: (record.kind, record.stream) for name, record in stands.items()}
    known |= {name: (signal.kind, signal.stream) for name, signal in section.signals.items()}
    numbers = {name: getattr(record, "num_hypotheses", 0) for name, record in stands.items()}
    numbers |= {name: getattr(s, "num_hypotheses", 0) for name, s in section.signals.items()}
    for name, signal in section.signals.items():
        for role, kind in (("masks", "masks"), ("hypotheses", "beams")):
            wanted = getattr(signal, role, None)
            if wanted is None:
                continue
            if wanted not in known:
                raise RecipeError(
                    f"signals.{name}.{role} is {wanted!r}, which neither the recipe nor the cache "
                    f"has; they have {sorted(known)}"
                )
            if known[wanted] != (kind, signal.stream):
                raise RecipeError(
                    f"signals.{name}.{role} is {wanted!r}, of kind {known[wanted][0]} over stream "
                    f"{known[wanted][1]!r}; expected kind {kind} over {signal.stream!r}"
                )
            which, count = getattr(signal, "hypothesis", "all"), int(numbers[wanted])
            if role == "hypotheses" and which != "all" and int(which) >= count:
                raise RecipeError(
                    f"signals.{name}.hypothesis is {which}; {wanted} has {count} a sample, so "
                    f"expected 0 to {count - 1}, or all"
                )


def check_signal(
    section: DumpSection, name: str, teacher: Teacher | None, tokenizers: dict[str, Tokenizer]
) -> None:
    """A signal's teacher must be able to say it, in the ids of the signal's streams.

    Args:
        section: the recipe's.
        name: of the signal.
        teacher: of the signal, loaded; None where it needs none.
        tokenizers: by name, those that exist already.

    Raises:
        RecipeError: a stream has a tokenizer that is still to be trained.
        ModelError: the teacher is of the wrong kind, lacks a layer, or has too few ids.
        IdentityError: a stream has another tokenizer than the teacher; shows both digests.
    """
    signal = section.signals[name]
    ENCODERS[signal.kind].check(Request(section, name, teacher, tokenizers))
    used = section.teacher_of(name)
    if teacher is None or used is None:
        return
    for stream in signal_streams(signal).values():
        tokenizer_name = section.streams[stream].tokenizer
        if tokenizer_name not in tokenizers:
            raise RecipeError(
                f"signals.{name} reads stream {stream!r}, whose tokenizer {tokenizer_name!r} is "
                "trained on the corpus; the teacher needs its own tokenizer there"
            )
        tokenizer = tokenizers[tokenizer_name]
        if teacher.input_size is not None and tokenizer.vocab_size > teacher.input_size:
            raise ModelError(
                f"{used.label}: it knows {teacher.input_size} ids, the tokenizer "
                f"{tokenizer.path} has {tokenizer.vocab_size}; use the teacher's own tokenizer"
            )
        for path in used.paths:
            _check_own(name, stream, tokenizer_name, tokenizer, path, used)


def check_later(
    section: DumpSection, name: str, teacher: Teacher | None, tokenizers: dict[str, Tokenizer]
) -> None:
    """What is known of a signal before its teacher is loaded, so that it fails before a dump.

    Args:
        section: the recipe's.
        name: of the signal.
        teacher: the same model, loaded for another signal; None where it is another model.
        tokenizers: by name, those that exist already.

    Raises:
        RecipeError: as `check_signal`.
        ModelError: as `check_signal`, or the teacher's files are not there.
        IdentityError: as `check_signal`.
    """
    signal, used = section.signals[name], section.teacher_of(name)
    assert used is not None, "a signal without a teacher is checked at once"
    if teacher is None:
        found = teacher_class(used)
        if signal.kind not in found.signals:
            raise ModelError(
                f"signals.{name}: {used.label}, a teacher of kind {found.kind}, has no "
                f"{signal.kind}; it has {', '.join(found.signals) or 'nothing'}"
            )
    elif signal.kind == "attention":
        check_layers(name, signal, teacher)
    else:
        check_signal(section, name, teacher, tokenizers)


def _check_own(
    name: str,
    stream: str,
    tokenizer_name: str,
    tokenizer: Tokenizer,
    path: str,
    used: TeacherSection,
) -> None:
    """The tokenizer of a stream must be the one in the teacher's directory."""
    if tokenizer.path == path:
        return
    own = _own_tokenizer(path, used.revision)
    if own is not None and own.digest != tokenizer.digest:
        raise IdentityError(
            f"signals.{name}: stream {stream!r} uses the tokenizer {tokenizer.path} "
            f"({tokenizer.digest}), the teacher {path} has its own ({own.digest}); leave out "
            f"dump.tokenizers.{tokenizer_name}.path, or name the teacher's"
        )


def _own_tokenizer(path: str, revision: str | None) -> Tokenizer | None:
    """The tokenizer in the teacher's directory, if there is one."""
    try:
        return Tokenizer.load(path, revision)
    except ModelError:
        logger.warning("%s has no tokenizer to compare with", path)
        return None
