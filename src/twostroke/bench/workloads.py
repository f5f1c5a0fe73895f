"""What is measured: prompts to read and tokens to write, and the least time each can take."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from twostroke.errors import InvalidParameter
from twostroke.spec.device import DeviceSpec
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import RowShape, StepShape, get_floor_seconds, get_model_work

SEED = 20
CHUNK = 512  # tokens of a prefill step, for every engine
CONTEXT = 8192  # tokens that each engine is given room for, where the model has as many


@dataclass(frozen=True, slots=True)
class Workload:
    """One measurement: `rows` prompts of `prompt` tokens are read, then `steps` written after each.

    op: "prefill" times the reading; "decode" the writing of one; "batch" of all rows together.
    """

    name: str
    op: str
    prompt: int
    steps: int = 0
    rows: int = 1

    @property
    def timed_tokens(self) -> int:
        """Tokens that the measured time stands for."""
        return self.rows * self.steps or self.prompt

    @property
    def context(self) -> int:
        """Tokens of one sequence, all that is written included."""
        return self.prompt + self.steps + 1


# Batch prompts are short enough for all of them to fit the first step: their first tokens come
# together, and what follows is decode and nothing else.
STANDARD = (
    *(Workload(f"prefill-{length}", "prefill", length) for length in (128, 512, 2048, 8000)),
    Workload("decode-0", "decode", 8, 64),
    Workload("decode-1024", "decode", 1024, 48),
    Workload("decode-4096", "decode", 4096, 32),
    *(Workload(f"batch-{rows}", "batch", 8, 63, rows) for rows in (1, 2, 4, 8, 16, 32)),
)
MOST_ROWS = max(one.rows for one in STANDARD)


def choose(wanted: str, known: tuple[str, ...], what: str) -> list[str]:
    """The names of a comma-separated list, in their known order; "all" is every one.

    Raises InvalidParameter naming what is unknown.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            raise InvalidParameter(what, f"has no {name!r}; known are {', '.join(known)}")
    return [name for name in known if name in names]


def make_prompt(spec: ModelSpec, length: int, row: int = 0) -> list[int]:
    """The same pseudo-random ordinary tokens for every engine and run; other rows, other tokens."""
    draw = random.Random(SEED + row)
    low = min(300, spec.vocab_size // 2)
    return [draw.randrange(low, min(spec.vocab_size, 40_000)) for _ in range(length)]


def make_request(spec: ModelSpec, workload: Workload) -> dict[str, object]:
    """The workload as a line of the workers' protocol."""
    prompts = [make_prompt(spec, workload.prompt, row) for row in range(workload.rows)]
    if workload.op == "batch":
        return {"op": "batch", "prompts": prompts, "steps": workload.steps}
    if workload.op == "decode":
        return {"op": "decode", "tokens": prompts[0], "steps": workload.steps}
    return {"op": "prefill", "tokens": prompts[0]}


def get_floor(spec: ModelSpec, workload: Workload, device: DeviceSpec) -> float:
    """Seconds the workload takes at the least on `device`, from spec/work.py; f16 KV."""
    if workload.op == "prefill":
        return add_floors(spec, cut_prompts([workload.prompt]), device)
    steps = (
        StepShape((RowShape(1, workload.prompt + step, 1),) * workload.rows)
        for step in range(workload.steps)
    )
    return add_floors(spec, steps, device)


def add_floors(spec: ModelSpec, steps: Iterator[StepShape], device: DeviceSpec) -> float:
    """Least seconds of steps one after another."""
    work = get_model_work(spec)
    return sum(get_floor_seconds(work.get_step_work(step), device).seconds for step in steps)


def cut_prompts(lengths: list[int]) -> Iterator[StepShape]:
    """Prompts cut into full steps of CHUNK tokens, one prompt after another."""
    rows: list[RowShape] = []
    room = CHUNK
    for length in lengths:
        done = 0
        while done < length:
            count = min(room, length - done)
            rows.append(RowShape(count, done, int(done + count == length)))
            done, room = done + count, room - count
            if not room:
                yield StepShape(tuple(rows))
                rows, room = [], CHUNK
    if rows:
        yield StepShape(tuple(rows))
