"""`twostroke batch`: answers a file of requests with one model, and may be begun again.

Composes an engine and the application that serves, without a socket; server/batch.py does the rest.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from pathlib import Path

from twostroke.cli.compose import build_engine
from twostroke.cli.options import MachineOptions
from twostroke.cli.question_options import BatchOptions
from twostroke.cli.settings import EngineSettings, get_machine_settings
from twostroke.engine.async_llm import AsyncLLM
from twostroke.errors import TwostrokeError
from twostroke.server.app import create_app
from twostroke.server.batch import BatchLine, BatchProgress, open_output, read_batch, run_batch
from twostroke.server.limits import Limits
from twostroke.server.settings import ServerSettings

_SHOWN_EVERY_S = 0.5


def run_batch_file(files: BatchOptions, on: MachineOptions) -> None:
    """Answer every line of the input that the output lacks. Raises TwostrokeError."""
    lines = read_batch(Path(files.input))
    output, done = open_output(Path(files.output), lines)
    try:
        if len(done) < len(lines):
            _answer(lines, output, done, on)
        else:
            print(f"all {len(lines):,} lines are answered already", file=sys.stderr)
    finally:
        os.close(output)


def _answer(lines: list[BatchLine], output: int, done: set[str], on: MachineOptions) -> None:
    # All lines go to one model, the first that is asked for; the others are told so.
    model = next(line.model for line in lines if line.custom_id not in done)
    built = build_engine(EngineSettings(model=model, **get_machine_settings(on)))
    try:
        engine = AsyncLLM(built.parts)
        # A file waits for as long as it takes.
        app = create_app(engine, ServerSettings(limits=Limits(queue_s=math.inf)))
        line = _ProgressLine()
        try:
            progress = asyncio.run(run_batch(app, lines, output, done, line.show))
        except* TwostrokeError as failed:
            raise failed.exceptions[0] from None
        finally:
            line.end()
            engine.close()
    finally:
        built.model.close()
    answered = progress.answered - progress.refused
    print(
        f"{answered:,} answered, {progress.refused:,} refused, {progress.before:,} before; "
        f"{line.seconds:.1f} s",
        file=sys.stderr,
    )


class _ProgressLine:
    """One line on a terminal that says how far the batch is; nothing anywhere else."""

    def __init__(self) -> None:
        self._began = self._shown = time.monotonic()
        self._is_open = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def show(self, progress: BatchProgress) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or now - self._shown < _SHOWN_EVERY_S:
            return
        self._shown, self._is_open = now, True
        at = progress.before + progress.answered
        print(f"\r{at:,} of {progress.total:,} lines", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._is_open:
            print(file=sys.stderr)
