"""Engines under measurement: each a child process that answers JSON lines.

It owns the processes. A peer that does not start is reported with its last words, not hidden.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from twostroke.errors import EngineError

_LAST_LINES = 3


class BenchEngineFailed(EngineError):
    """An engine under measurement did not start, or died."""


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """How to start one engine's worker; `name` is what reports call it."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class BenchEngine:
    """A started worker. start_s: from starting the process to being ready. about: its greeting."""

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
                env={**os.environ, **command.environment},
            )
            undo.callback(self._end_process)
            self.about = self._read()
            self.start_s = time.perf_counter() - begin
            self._resources = undo.pop_all()

    @property
    def description(self) -> str:
        """What it calls itself, with its version."""
        return str(self.about["ready"])

    def ask(self, **request: Any) -> dict[str, Any]:
        """One measurement. Raises BenchEngineFailed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process is gone: reading says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def get_peak_bytes(self) -> int:
        """The most memory it and its children have had resident so far."""
        return get_peak_bytes(self._process.pid)

    def close(self) -> None:
        """End the process."""
        self._resources.close()

    def _end_process(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what was not sent is of no use now
            self._process.stdin.close()
        end_process(self._process)
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        words = read_last_words(self._errors)
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


def end_process(process: subprocess.Popen[Any], patience_s: float = 10) -> None:
    """Wait for a process that was told to end, and kill it when it does not."""
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read_last_words(errors: IO[bytes]) -> str:
    """The last lines a process wrote to standard error, where Python puts what went wrong."""
    errors.seek(0)
    return get_last_lines(errors.read().decode(errors="replace"))


def get_last_lines(text: str) -> str:
    """The last lines that are not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-_LAST_LINES:])


def get_peak_bytes(process: int) -> int:
    """The most memory a process has had resident, and its children, each at its own peak.

    Pages of a mapped file count as the system counts them: those that were touched.
    """
    folder = Path(f"/proc/{process}")
    try:
        status = (folder / "status").read_text()
        children = " ".join(
            (task / "children").read_text() for task in (folder / "task").iterdir()
        ).split()
    except OSError:  # it has ended, or this system has no /proc
        return 0
    # One that has ended and was not waited for has no such line.
    peak = sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return peak * 1024 + sum(get_peak_bytes(int(child)) for child in children)
