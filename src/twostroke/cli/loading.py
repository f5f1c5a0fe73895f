"""How far the weights of a GPU are loaded, as one line that is written over and then taken away."""

from __future__ import annotations

import time
from typing import TextIO

from twostroke.cli.settings import format_bytes

_EVERY_S = 0.1


class LoadingLine:
    """Called with the bytes done and those there are; writes to a terminal, and to nothing else.

    Loads that end within a tenth of a second write nothing.
    """

    def __init__(self, output: TextIO) -> None:
        self._output = output if output.isatty() else None
        self._next_s = time.monotonic() + _EVERY_S
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        if self._output is None:
            return
        if done >= total:
            if self._width:
                self._output.write("\r" + " " * self._width + "\r")
                self._output.flush()
            return
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + _EVERY_S
        line = f"  loading weights: {format_bytes(done)} of {format_bytes(total)}"
        self._width = max(self._width, len(line))
        self._output.write("\r" + line.ljust(self._width))
        self._output.flush()
