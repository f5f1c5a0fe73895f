"""`twostroke generate`: one prompt, its answer as it comes, and both strokes at the end.

Standard output carries the answer and nothing else (with --json, one object); the settings and the
table go to standard error, so that the answer can be piped on.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from twostroke.cli.answer import AnswerWriter, build_params
from twostroke.cli.compose import LLM
from twostroke.cli.options import GenerateOptions, MachineOptions, SamplingOptions
from twostroke.cli.settings import EngineSettings, ResolvedSettings, get_machine_settings
from twostroke.engine.metrics import EngineStats
from twostroke.engine.outputs import Completion
from twostroke.engine.params import SamplingParams
from twostroke.errors import InvalidParameter
from twostroke.spec.model import ModelSpec

if TYPE_CHECKING:
    from twostroke.cli.strokes import Stroke
    from twostroke.spec.device import DeviceSpec


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, the engine's counts before and after it, and what the engine ran with."""

    completion: Completion
    before: EngineStats
    after: EngineStats
    spec: ModelSpec
    settings: ResolvedSettings


def run_generate(
    model: str, generation: GenerateOptions, sampling: SamplingOptions, on: MachineOptions
) -> None:
    """Answer one prompt. Raises TwostrokeError."""
    prompt = read_prompt(generation.prompt, sys.stdin)
    params = build_params(sampling)
    wanted = EngineSettings(
        model=model,
        **get_machine_settings(on),
        max_rows=1,
        has_chat=generation.chat is not False,
    )
    answered = answer_prompt(wanted, prompt, params, generation)
    # The probes take memory of their own: the engine's goes first.
    gc.collect()
    strokes, device = measure_strokes(answered)
    if generation.json:
        print(json.dumps(describe_answer(model, answered.completion, strokes)))
    else:
        print_strokes(strokes, answered.completion, device)


def answer_prompt(
    wanted: EngineSettings, prompt: str, params: SamplingParams, generation: GenerateOptions
) -> Answered:
    """Start an engine, show the answer as it comes, and end the engine. Raises TwostrokeError."""
    with LLM.from_settings(wanted) as llm:
        if generation.verbose:
            from twostroke.cli.summary import format_summary

            print(format_summary(llm.built), file=sys.stderr)
        before = llm.stats()
        if should_use_template(generation.chat, llm):
            deltas = llm.stream_chat([{"role": "user", "content": prompt}], params)
        else:
            deltas = llm.stream(prompt, params)
        writer = AnswerWriter(None if generation.json else sys.stdout)
        for delta in deltas:
            writer.take(delta)
        writer.end_line()
        spec, settings = llm.built.parts.spec, llm.built.settings
        return Answered(writer.get_completion(), before, llm.stats(), spec, settings)


def measure_strokes(answered: Answered) -> tuple[tuple[Stroke, Stroke], DeviceSpec]:
    """Both strokes of the answer, and this machine's limits, measured now.

    What this needs is imported here, when the answer is out.
    """
    from twostroke.cli.limits import get_stroke_floors, measure_limits
    from twostroke.cli.strokes import get_strokes, measure

    measured = measure(answered.before, answered.after)
    device = measure_limits(answered.settings)
    floors = get_stroke_floors(answered.spec, answered.settings, measured, device)
    return get_strokes(measured, *floors), device


def read_prompt(given: str | None, standard_input: TextIO) -> str:
    """The prompt given, or all of what is piped in, less the line end that `echo` adds.

    Raises InvalidParameter where there is neither, or nothing in it.
    """
    prompt = given
    if prompt is None:
        if standard_input.isatty():
            raise InvalidParameter("prompt", "give one with --prompt, or pipe it in")
        prompt = standard_input.read().removesuffix("\n")
    if not prompt:
        raise InvalidParameter("prompt", "is empty")
    return prompt


def should_use_template(asked: bool | None, llm: LLM) -> bool:
    """As asked, else where the model has a chat template."""
    return llm.built.parts.chat_template is not None if asked is None else asked


def describe_answer(
    model: str, answer: Completion, strokes: tuple[Stroke, Stroke]
) -> dict[str, object]:
    """The answer and its strokes as plain values, for JSON."""
    from twostroke.cli.strokes import describe

    return {
        "model": model,
        "text": answer.text,
        "token_ids": list(answer.tokens),
        "finish_reason": answer.finish_reason,
        **{stroke.name: describe(stroke) for stroke in strokes},
    }


def print_strokes(strokes: tuple[Stroke, Stroke], answer: Completion, device: DeviceSpec) -> None:
    """The table, and a hint where the answer was cut; to standard error."""
    from rich.console import Console

    from twostroke.cli.limits import format_device
    from twostroke.cli.strokes import build_table

    console = Console(stderr=True, highlight=False)
    console.print(build_table(*strokes))
    console.print(format_device(device), style="dim", soft_wrap=True)
    if answer.finish_reason == "length":
        console.print(f"cut after {len(answer.tokens)} tokens; --max-tokens allows more")
