"""What `generate` and `chat` share: parameters from options, and an answer written as it comes."""

from __future__ import annotations

from typing import TextIO

from twostroke.cli.options import SamplingOptions
from twostroke.core.types import Ending
from twostroke.engine.outputs import Completion, OutputDelta
from twostroke.engine.params import SamplingParams


def build_params(sampling: SamplingOptions) -> SamplingParams:
    """The sampling parameters of the command line, checked. Raises InvalidParameter."""
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        stop=sampling.stop,
    )


class AnswerWriter:
    """Gathers one continuation's deltas, and writes their text to `output` where there is one."""

    def __init__(self, output: TextIO | None) -> None:
        self._output = output
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._ending: Ending | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    def take(self, delta: OutputDelta) -> None:
        """Add what is new; text is shown at once."""
        self._texts.append(delta.text)
        self._tokens.extend(delta.tokens)
        self._ending = delta.ending
        if delta.text:
            self._write(delta.text)

    def end_line(self) -> None:
        """Leave the cursor at the start of a line, also after an answer that ended one itself."""
        if not self.text.endswith("\n"):
            self._write("\n")

    def get_completion(self) -> Completion:
        """The whole answer, once its last delta was taken."""
        assert self._ending is not None, "the answer has not ended"
        return Completion(0, self.text, tuple(self._tokens), (), self._ending)

    def _write(self, text: str) -> None:
        if self._output is not None:
            self._output.write(text)
            self._output.flush()
