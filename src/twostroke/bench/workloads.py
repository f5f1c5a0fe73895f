"""What is measured: prompts to read and tokens to write, and the least time each can take."""

from __future__ import annotations

import random
from dataclasses import dataclass

from twostroke.errors import InvalidParameter
from twostroke.spec.device import DeviceSpec
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import RowShape, StepShape, get_floor_seconds, get_model_work

SEED = 20
CHUNK = 512  # tokens of a prefill step, for every engine


@dataclass(frozen=True, slots=True)
class Workload:
    """One measurement: `prompt` tokens are read, then `steps` written (0: a prefill)."""

    name: str
    prompt: int
    steps: int

    @property
    def op(self) -> str:
        """The worker's operation."""
        return "decode" if self.steps else "prefill"

    @property
    def timed_tokens(self) -> int:
        """Tokens that the measured time stands for."""
        return self.steps or self.prompt


STANDARD = (
    Workload("prefill-128", 128, 0),
    Workload("prefill-512", 512, 0),
    Workload("prefill-2048", 2048, 0),
    Workload("decode-0", 8, 64),
    Workload("decode-1024", 1024, 48),
    Workload("decode-4096", 4096, 32),
)


def make_prompt(spec: ModelSpec, length: int) -> list[int]:
    """The same pseudo-random ordinary tokens for every engine and run."""
    draw = random.Random(SEED)
    low = min(300, spec.vocab_size // 2)
    return [draw.randrange(low, min(spec.vocab_size, 40_000)) for _ in range(length)]


def get_floor(spec: ModelSpec, workload: Workload, device: DeviceSpec) -> float:
    """Seconds the workload takes at the least on `device`, from spec/work.py; f16 KV."""
    work = get_model_work(spec, 2)
    if workload.steps:
        rows = [RowShape(1, workload.prompt + step, 1) for step in range(workload.steps)]
    else:
        starts = range(0, workload.prompt, CHUNK)
        rows = [
            RowShape(
                min(CHUNK, workload.prompt - start), start, int(start + CHUNK >= workload.prompt)
            )
            for start in starts
        ]
    return sum(
        get_floor_seconds(work.get_step_work(StepShape((row,))), device).seconds for row in rows
    )


def choose(wanted: str | None) -> list[Workload]:
    """The standard workloads named in a comma-separated list, in standard order; None is all.

    Raises InvalidParameter naming what is unknown.
    """
    if wanted is None:
        return list(STANDARD)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    known = [one.name for one in STANDARD]
    for name in names:
        if name not in known:
            raise InvalidParameter("workloads", f"has no {name!r}; known are {', '.join(known)}")
    return [one for one in STANDARD if one.name in names]
