"""The walls between the rooms, each in a fresh interpreter."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdcache
import kdcache.compile
import kdcache.dump
import kdcache.exchange
import kdcache.formats
import kdcache.train

HEAVY = ("torch", "transformers")


def modules(package: object) -> list[str]:
    path, name = package.__path__, package.__name__  # type: ignore[attr-defined]
    return [name, *(m.name for m in pkgutil.walk_packages(path, f"{name}."))]


def loaded_after(code: str) -> set[str]:
    """Names in sys.modules after some code ran in a new interpreter."""
    program = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.rstrip().split("\n")[-1].split()
    assert last[0] == "LOADED"
    return set(last[1:])


def importing(names: list[str]) -> str:
    return "\n".join(f"import {name}" for name in names)


def running(*words: str) -> str:
    return (
        "from kdcache.cli import main\n"
        f"try:\n    code = main({list(words)!r})\n"
        "except SystemExit as exit:\n    code = exit.code\n"
        "assert code == 0, code"
    )


def test_formats_stand_without_torch() -> None:
    names = modules(kdcache.formats)
    assert "kdcache.formats.cache" in names
    loaded = loaded_after(importing(names))
    assert not loaded & {*HEAVY, "kdcache.dump", "kdcache.train"}


def test_train_never_imports_dump() -> None:
    names = modules(kdcache.train)
    assert "kdcache.train.losses.fused_loss" in names
    loaded = loaded_after(importing(names))
    assert "kdcache.train.losses.fused_loss" in loaded
    assert not {name for name in loaded if name.startswith("kdcache.dump")}


def test_dump_never_imports_train() -> None:
    loaded = loaded_after(importing(modules(kdcache.dump)))
    assert not {name for name in loaded if name.startswith("kdcache.train")}


def test_compile_takes_the_codecs_of_dump_and_nothing_else() -> None:
    names = modules(kdcache.compile)
    assert "kdcache.compile.reencode" in names
    loaded = loaded_after(importing(names))
    assert "kdcache.dump.codecs" in loaded
    rooms = {".".join(name.split(".")[:3]) for name in loaded if name.startswith("kdcache.dump.")}
    assert rooms == {"kdcache.dump.codecs"}
    assert not {name for name in loaded if name.startswith("kdcache.train")}


def test_compile_runs_without_torch_where_nothing_is_re_encoded(
    tiny_cache: Path, tmp_path: Path
) -> None:
    words = ("compile", str(tiny_cache), "--out", str(tmp_path / "out"), "--fraction", "0.9")
    assert not loaded_after(running(*words)) & set(HEAVY)


def test_exchange_runs_no_teacher_and_no_student() -> None:
    names = modules(kdcache.exchange)
    assert "kdcache.exchange.importer" in names
    loaded = loaded_after(importing(names))
    assert not {name for name in loaded if name.startswith("kdcache.train")}
    assert not {name for name in loaded if name.startswith("kdcache.dump.teachers")}
    assert not {name for name in loaded if name.startswith("kdcache.dump.signals")}


@pytest.mark.parametrize(
    "words",
    [("--help",), ("dump", "--help"), ("import", "--help"), ("recipes",), ("completion", "bash")],
    ids=" ".join,
)
def test_the_face_starts_without_torch(words: tuple[str, ...]) -> None:
    assert not loaded_after(running(*words)) & set(HEAVY)


def test_inspect_and_verify_run_without_torch(tiny_cache: object) -> None:
    for words in (("inspect",), ("inspect", "--json"), ("verify",), ("verify", "--json")):
        loaded = loaded_after(running(words[0], str(tiny_cache), *words[1:]))
        assert not loaded & set(HEAVY), words


def test_print_recipe_runs_without_torch() -> None:
    loaded = loaded_after(running("train", "word-level", "--print-recipe"))
    assert not loaded & set(HEAVY)


def test_the_package_opens_caches_lazily() -> None:
    assert kdcache.open_cache.__module__ == "kdcache.formats.cache"
    assert "kdcache.formats.cache" not in loaded_after("import kdcache")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kdcache.nothing  # noqa: B018
