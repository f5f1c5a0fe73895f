"""`twostroke profile`: where a step's time goes, op by op, beside the least each op can take.

One real request (or a batch of equal ones) runs through the real engine; the executor tells of
every step, the native program of every op, the engine's thread of what lies between. What is left
over, of the native call and of the way from one step to the next, is shown as such, so the parts of
a table always sum to its wall time.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from twostroke.cli.compose import LLM
from twostroke.cli.options import MachineOptions, ProfileOptions
from twostroke.cli.settings import EngineSettings, get_machine_settings, keep_on_cpu
from twostroke.engine.params import SamplingParams
from twostroke.errors import InvalidParameter
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import LocalExecutor, StepTimes
from twostroke.spec.device import DeviceSpec
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import (
    PartFloor,
    PartWork,
    RowShape,
    StepShape,
    get_op_work,
    get_part_floor,
)

if TYPE_CHECKING:
    from rich.table import Table

ROUNDS = 3
SEED = 20
_TABLE_WIDTH = 100
# What remains of the wall time beside ops: of the native call, and of Python in a step's order. The
# last is the rest: the way round the loop, requests and cancels.
CALL_REST = "checks, waking threads"
PYTHON = ("arrays", "results", "commit", "plan", "deliver")
LOOP_REST = "Python: way round"
RESTS = (CALL_REST, *(f"Python: {name}" for name in PYTHON), LOOP_REST)
# An op that belongs to another's floor: the same bytes and operations are counted there.
_BELONGS_TO = {"merge": "attention", "write_kv": "attention"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One step: its times, each op's nanoseconds, and what watching itself took.

    engine: nanoseconds of the engine's thread by part so far, before what this step itself adds.
    """

    times: StepTimes
    ops: Mapping[str, int]
    watch_ns: int
    engine: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Span:
    """From one step to the next: wall_ns, and of it what Python took by part."""

    sample: Sample
    wall_ns: int
    python: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a profile: mean seconds a step, and the floor where there is one."""

    name: str
    seconds: float
    floor: PartFloor | None


@dataclass(frozen=True, slots=True)
class Profile:
    """A stroke's parts, which sum to `wall_s`, the mean time from one step to the next."""

    name: str
    steps: int
    wall_s: float
    parts: tuple[Part, ...]

    @property
    def python_share(self) -> float:
        """What Python takes of the wall time."""
        own = sum(part.seconds for part in self.parts if part.name in RESTS[1:])
        return own / self.wall_s

    @property
    def floor_s(self) -> float:
        """The floors of all parts, one after another."""
        return sum(part.floor.seconds for part in self.parts if part.floor is not None)


class StepWatch:
    """Collects samples of an executor's steps; `take` empties it.

    get_engine: nanoseconds of the engine's thread by part, so far.
    """

    def __init__(
        self, executor: LocalExecutor, get_engine: Callable[[], Mapping[str, int]]
    ) -> None:
        runner = executor.runner
        if not isinstance(runner, CpuRunner):
            raise InvalidParameter("backend", "only the cpu backend tells the time of each op")
        self._runner = runner
        self._get_engine = get_engine
        self._samples: list[Sample] = []
        executor.watch(self._note)

    def take(self) -> list[Sample]:
        """The samples since the last call."""
        samples, self._samples = self._samples, []
        return samples

    def _note(self, times: StepTimes) -> None:
        begin = time.perf_counter_ns()
        engine = self._get_engine()
        ops: Counter[str] = Counter()
        for name, op_ns in self._runner.take_times():
            ops[name] += op_ns
        self._samples.append(Sample(times, ops, time.perf_counter_ns() - begin, engine))


def run_profile(model: str, options: ProfileOptions, on: MachineOptions) -> None:
    """Measure both strokes and print them. Raises TwostrokeError."""
    from twostroke.cli.limits import format_device, measure_device

    wanted = EngineSettings(
        model=model,
        **get_machine_settings(keep_on_cpu(on)),
        max_rows=options.requests,
        has_chat=False,
    )
    with LLM.from_settings(wanted) as llm:
        spec, settings = llm.built.parts.spec, llm.built.settings
        room = spec.context_tokens - options.new_tokens - 1
        if options.prompt_tokens > room:
            raise InvalidParameter(
                "prompt_tokens", f"at most {room} fit with {options.new_tokens} steps"
            )
        runs = measure_runs(llm, options)
    gc.collect()
    device = measure_device(settings.threads)
    profiles = build_profiles(runs, spec, options, device, settings.kv_element)
    if options.json:
        print(json.dumps(describe(profiles, device)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, _TABLE_WIDTH)  # also where the output is piped on
    for profile in profiles:
        console.print(build_table(profile))
    console.print(format_device(device), style="dim", soft_wrap=True)


def measure_runs(llm: LLM, options: ProfileOptions) -> list[list[Sample]]:
    """All steps of each round, by round; a first round, not counted, warms everything."""
    executor = llm.built.parts.executor
    if not isinstance(executor, LocalExecutor):
        raise InvalidParameter("backend", "only an executor of this process can be watched")

    def get_engine() -> dict[str, int]:
        return {name: round(part * 1e9) for name, part in llm.stats().part_seconds.items()}

    watch = StepWatch(executor, get_engine)
    draw = random.Random(SEED)
    vocab = llm.built.parts.spec.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=options.new_tokens + 2, ignore_eos=True)
    runs = []
    for turn in range(ROUNDS + 1):
        prompts = [
            [draw.randrange(vocab) for _ in range(options.prompt_tokens)]
            for _ in range(options.requests)
        ]
        llm.generate(prompts, params)
        samples = watch.take()
        if turn:
            runs.append(samples)
    return runs


def build_profiles(
    runs: Sequence[Sequence[Sample]],
    spec: ModelSpec,
    options: ProfileOptions,
    device: DeviceSpec,
    kv_element: KvElement = KvElement.F16,
) -> tuple[Profile, Profile]:
    """Prefill (the round of the median wall time) and decode (the middle half of all steps)."""
    prefills, decodes = [], []
    for run in runs:
        spans = [_measure_span(step, after) for step, after in pairwise(run)]
        first = [step.times.tokens == options.requests for step in run].index(True)
        prefills.append(spans[:first])
        decodes += spans[first : first + options.new_tokens]
    prefills.sort(key=lambda spans: sum(span.wall_ns for span in spans))
    chosen = prefills[len(prefills) // 2]
    shape = StepShape((RowShape(options.prompt_tokens, 0, 1),) * options.requests)
    prefill = _build("prefill", chosen, 1, get_op_work(spec, shape, kv_element), device)
    decodes.sort(key=lambda span: span.wall_ns)
    quarter = len(decodes) // 4
    middle = decodes[quarter : len(decodes) - quarter]
    depth = options.prompt_tokens + options.new_tokens // 2
    shape = StepShape((RowShape(1, depth, 1),) * options.requests)
    decode = _build("decode", middle, len(middle), get_op_work(spec, shape, kv_element), device)
    return prefill, decode


def _measure_span(step: Sample, after: Sample) -> Span:
    """From a step's begin to the next one's, less the time that went into watching."""
    wall_ns = after.times.begin_ns - step.times.begin_ns - step.watch_ns
    python = {
        name: after.engine.get(name, 0) - step.engine.get(name, 0)
        for name in ("arrays", "commit", "plan", "deliver")
    }
    python["results"] = step.times.run_ns - step.times.call_ns - python["arrays"]
    return Span(step, wall_ns, python)


def _build(
    name: str,
    spans: Sequence[Span],
    count: int,
    work: Mapping[str, PartWork],
    device: DeviceSpec,
) -> Profile:
    """Parts per `count`, in the order of the pass, then what is left over."""
    ops: Counter[str] = Counter()
    python: Counter[str] = Counter()
    for span in spans:
        ops.update(span.sample.ops)
        python.update(span.python)
    wall_ns = sum(span.wall_ns for span in spans)
    call_ns = sum(span.sample.times.call_ns for span in spans)
    scale = 1e-9 / count
    parts = [
        Part(op, op_ns * scale, _find_floor(op, ops, work, device)) for op, op_ns in ops.items()
    ]
    rests = (
        call_ns - sum(ops.values()),
        *(python[each] for each in PYTHON),
        wall_ns - call_ns - sum(python.values()),
    )
    parts += [Part(rest, ns * scale, None) for rest, ns in zip(RESTS, rests, strict=True)]
    return Profile(name, len(spans), wall_ns * scale, tuple(parts))


def _find_floor(
    op: str, ops: Mapping[str, int], work: Mapping[str, PartWork], device: DeviceSpec
) -> PartFloor | None:
    """The floor of an op; of several weights' products in one call, their sum."""
    if op in _BELONGS_TO and _BELONGS_TO[op] in ops:
        return None
    names = op.split("+")  # a joined middle does the gate's work too
    if len(names) > 1 and "gated" not in ops:
        names.append("gated")
    found = [get_part_floor(work[name], device) for name in names if name in work]
    if not found:
        return None
    longest = max(found, key=lambda floor: floor.seconds)
    return PartFloor(op, sum(floor.seconds for floor in found), longest.bound_by)


def build_table(profile: Profile) -> Table:
    """One stroke as a table, the longest ops first, what is left over last."""
    from rich import box
    from rich.table import Table

    title = f"{profile.name}: {profile.wall_s * 1e3:.3f} ms, Python {profile.python_share:.1%}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    for heading in (
        "µs",
        "of the step",
        "floor, µs",
        "bound by",
        "of its limit",
        "over the floor, µs",
    ):
        table.add_column(heading, justify="right")
    ops = sorted((p for p in profile.parts if p.name not in RESTS), key=lambda p: -p.seconds)
    for part in (*ops, *(p for p in profile.parts if p.name in RESTS)):
        table.add_row(part.name, *_format_cells(part.seconds, part.floor, profile.wall_s))
    total = PartFloor("all", profile.floor_s, "")
    table.add_row("all", *_format_cells(profile.wall_s, total, profile.wall_s), style="bold")
    return table


def _format_cells(seconds: float, floor: PartFloor | None, wall_s: float) -> tuple[str, ...]:
    measured = (f"{seconds * 1e6:,.1f}", f"{seconds / wall_s:.1%}")
    if floor is None:
        return (*measured, "–", "–", "–", "–")
    share = f"{floor.seconds / seconds:.0%}" if seconds > 0 else "–"
    over = f"{(seconds - floor.seconds) * 1e6:,.1f}"
    return (*measured, f"{floor.seconds * 1e6:,.1f}", floor.bound_by or "–", share, over)


def describe(profiles: Sequence[Profile], device: DeviceSpec) -> dict[str, object]:
    """The profiles as plain values, for JSON."""
    return {
        "limits": {"bytes_per_s": device.memory_bandwidth, **dict(device.rates)},
        **{
            profile.name: {
                "wall_s": profile.wall_s,
                "steps": profile.steps,
                "floor_s": profile.floor_s,
                "python_share": profile.python_share,
                "parts": [
                    {
                        "name": part.name,
                        "seconds": part.seconds,
                        "floor_s": None if part.floor is None else part.floor.seconds,
                        "bound_by": None if part.floor is None else part.floor.bound_by,
                    }
                    for part in profile.parts
                ],
            }
            for profile in profiles
        },
    }
