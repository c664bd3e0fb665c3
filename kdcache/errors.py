"""Every error that kdcache reports. The command line prints one as one line and exits 1.

    KDCacheError
    ├── RecipeError      a recipe or an override is wrong
    ├── CorpusError      text that was to be dumped is wrong
    ├── ModelError       a teacher, student or tokenizer cannot be loaded or used
    ├── FormatError      a cache is not what the format says
    │   └── IntegrityError   bytes changed: size, checksum or structure
    ├── IdentityError    two things that must be the same are not (both are shown)
    ├── StorageError     the disk or object store refused
    ├── TrainingError    a run cannot go on
    ├── AuditError       a cache does not say what its teacher says
    └── StoppedError     somebody asked the process to stop

A message says where, what was found, what was expected, and what to do.
"""


class KDCacheError(Exception):
    """Base of every error that kdcache raises on purpose."""


class RecipeError(KDCacheError, ValueError):
    """A recipe, or a dotted override of one, is wrong."""


class CorpusError(KDCacheError, ValueError):
    """The text that was to be dumped or scored is wrong."""


class ModelError(KDCacheError, ValueError):
    """A teacher, student or tokenizer cannot be loaded or used."""


class FormatError(KDCacheError, ValueError):
    """A cache does not follow the format, or follows one this version cannot read."""


class IntegrityError(FormatError):
    """Bytes of a cache are not those that were committed."""


class IdentityError(KDCacheError, ValueError):
    """Teacher, tokenizer, corpus or codec differ from what the cache was made with."""


class StorageError(KDCacheError, OSError):
    """The disk or object store refused a read or a write."""


class TrainingError(KDCacheError, RuntimeError):
    """A training run cannot go on."""


class AuditError(KDCacheError, RuntimeError):
    """A cache does not say what its teacher says, beyond the tolerance."""


class StoppedError(KDCacheError, RuntimeError):
    """The process was asked to stop, and did so where nothing is lost."""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, an OSError's with its file first."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__
