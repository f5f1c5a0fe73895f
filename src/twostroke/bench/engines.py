"""Engines under measurement: each a child process that answers JSON lines.

It owns the processes. A peer that does not start is reported with its last words, not hidden.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostroke.errors import EngineError

_LAST_WORDS = 2000


class BenchEngineFailed(EngineError):
    """An engine under measurement did not start, or died."""


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """How to start one engine's worker; `name` is what reports call it."""

    name: str
    command: tuple[str, ...]


def get_our_command(model: Path, threads: int) -> EngineCommand:
    """This engine's worker."""
    command = (sys.executable, "-m", "twostroke.bench.worker", str(model), str(threads))
    return EngineCommand("twostroke", command)


def get_llama_cpp_command(python: str, model: Path, threads: int) -> EngineCommand:
    """llama.cpp's worker, run by the Python that has llama-cpp-python."""
    script = Path(__file__).with_name("llama_cpp_worker.py")
    return EngineCommand("llama.cpp", (python, str(script), str(model), str(threads)))


class BenchEngine:
    """A started worker. `start_s` is from starting the process to being ready."""

    def __init__(self, command: EngineCommand) -> None:
        """Start it and wait until it is ready. Raises BenchEngineFailed."""
        self.name = command.name
        with contextlib.ExitStack() as undo:
            self._errors = undo.enter_context(tempfile.TemporaryFile())
            begin = time.perf_counter()
            self._process = subprocess.Popen(
                command.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            undo.callback(self._end_process)
            self.description = str(self._read()["ready"])
            self.start_s = time.perf_counter() - begin
            self._resources = undo.pop_all()

    def ask(self, **request: Any) -> dict[str, Any]:
        """One measurement. Raises BenchEngineFailed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process is gone: reading says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._resources.close()

    def _end_process(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what was not sent is of no use now
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace")[-_LAST_WORDS:].strip()
        raise BenchEngineFailed(f"{self.name} ended with {self._process.returncode}: {words}")


def start_engines(
    commands: Sequence[EngineCommand],
) -> tuple[list[BenchEngine], dict[str, str]]:
    """All engines that start, in order, and why the others did not."""
    engines, refused = [], {}
    for command in commands:
        try:
            engines.append(BenchEngine(command))
        except (BenchEngineFailed, OSError) as error:
            refused[command.name] = str(error)
    return engines, refused
