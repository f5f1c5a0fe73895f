"""`twostroke generate`: one prompt, its answer as it comes, and both strokes at the end.

Standard output carries the answer and nothing else (with --json, one object); the settings and the
table go to standard error, so that the answer can be piped on.
"""

from __future__ import annotations

import json
import sys
from typing import TextIO

from twostroke.cli.answer import AnswerWriter, build_params
from twostroke.cli.compose import LLM
from twostroke.cli.limits import format_device, get_stroke_floors, measure_device
from twostroke.cli.options import GenerateOptions, MachineOptions, SamplingOptions
from twostroke.cli.strokes import Stroke, build_table, describe, get_strokes, measure
from twostroke.cli.summary import format_summary
from twostroke.engine.outputs import Completion
from twostroke.errors import InvalidParameter
from twostroke.spec.device import DeviceSpec


def run_generate(
    model: str, generation: GenerateOptions, sampling: SamplingOptions, on: MachineOptions
) -> None:
    """Answer one prompt. Raises TwostrokeError."""
    prompt = read_prompt(generation.prompt, sys.stdin)
    params = build_params(sampling)
    with LLM(model, threads=on.threads, backend=on.backend, max_rows=1) as llm:
        if generation.verbose:
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
        measured = measure(before, llm.stats())
        device = measure_device(llm.built.settings.threads)
        strokes = get_strokes(measured, *get_stroke_floors(llm.built, measured, device))
    answer = writer.get_completion()
    if generation.json:
        print(json.dumps(describe_answer(model, answer, strokes)))
    else:
        print_strokes(strokes, answer, device)


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

    console = Console(stderr=True, highlight=False)
    console.print(build_table(*strokes))
    console.print(format_device(device), style="dim", soft_wrap=True)
    if answer.finish_reason == "length":
        console.print(f"cut after {len(answer.tokens)} tokens; --max-tokens allows more")
