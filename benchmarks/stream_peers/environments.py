"""Virtual environments of the peers, and the processes that run in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def make_environment(folder: Path, name: str) -> Path:
    """Python of the environment that a peer's requirements are installed in, made if need be.

    Args:
        folder: of all environments.
        name: of the requirements.

    Raises:
        subprocess.CalledProcessError: it cannot be made; the output of pip is in it.
    """
    python = folder / name / "bin/python"
    wanted = HERE / f"requirements-{name}.txt"
    done = folder / name / "installed.txt"
    if not done.is_file() or done.read_text() != wanted.read_text():
        if not python.is_file():
            run([sys.executable, "-m", "venv", str(folder / name)])
        run([str(python), "-m", "pip", "install", "-q", "-r", str(wanted)])
        done.write_text(wanted.read_text())
    return python


def run(command: list[str]) -> str:
    """Output of a command that must succeed."""
    found = subprocess.run(command, check=True, text=True, capture_output=True)
    return found.stdout


def versions_in(python: Path, name: str) -> dict[str, str]:
    """What is installed of a peer's requirements."""
    lines = (HERE / f"requirements-{name}.txt").read_text().split()
    packages = [line.split("==")[0] for line in lines]
    code = (
        "import json, sys; from importlib.metadata import version\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    return json.loads(run([str(python), "-c", code, *packages]))


class Server:
    """A process that runs `peer_loop.serve`.

    Args:
        python: of its environment.
        script: in this folder, with its arguments.
        log: file for all that it prints.
    """

    def __init__(self, python: str | Path, script: str, log: Path) -> None:
        self.python, self.script, self.log = python, script, log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if str(python) != sys.executable:
            environment.pop("PYTHONPATH", None)
        with log.open("ab") as errors:
            file, *arguments = script.split()
            self.process = subprocess.Popen(
                [str(python), str(HERE / f"{file}.py"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """The answer to an order.

        Raises:
            RuntimeError: it failed or ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = json.dumps({"do": do, **{key: _plain(value) for key, value in order.items()}})
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            text = self.process.stdout.readline()
        except BrokenPipeError:
            text = ""
        answer = json.loads(text) if text else {"error": "the process ended"}
        if "error" in answer:
            tail = self.log.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{self.script}: {do}: {answer['error']}\n{tail}")
        return answer

    def end(self) -> None:
        """Close its input and wait; it is ended if it does not go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
