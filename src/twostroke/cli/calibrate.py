"""`twostroke calibrate`: measures steps of a model on this machine and stores what they cost.

A grid of real plans goes straight to the executor, in rounds: every round runs every step once, in
an order of its own, so that a slow moment of the machine touches other steps every time. Odd rounds
are fitted and predict the even ones; what is stored is fitted to all. Steps of sizes between the
grid's are never fitted and tell how well the fit holds elsewhere. Keys and values are one made-up
number: their time does not depend on it, but memory never written to is read from one page.
Afterwards the whole engine serves a few requests, for what it takes around a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from twostroke.cli.compose import build_engine
from twostroke.cli.options import MachineOptions
from twostroke.cli.settings import (
    EngineSettings,
    ResolvedSettings,
    get_machine_settings,
    keep_on_cpu,
)
from twostroke.cli.step_cost import (
    build_limits_cost,
    get_calibration_path,
    get_settings_work,
    store_fit,
)
from twostroke.cli.timed_steps import (
    Cell,
    build_plan,
    count_repeats,
    fill_pool,
    fits,
    get_order,
    repeat_step,
    sum_cell,
    time_step,
)
from twostroke.core.types import StepPlan
from twostroke.engine.outputs import OutputDelta
from twostroke.engine.params import SamplingParams
from twostroke.engine.service import EngineParts, EngineService
from twostroke.errors import InvalidParameter
from twostroke.exec.local import LocalExecutor
from twostroke.plan.fit import fit_steps, get_usual_ns
from twostroke.plan.step_time import MeasuredCost
from twostroke.spec.cost import StepCost
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import StepTotals

if TYPE_CHECKING:
    from rich.table import Table

BUDGET_S = 12.0
_LEAST_ROUNDS = 3
_MOST_ROUNDS = 24
_LEAST_CELLS = 20
_POOL_BYTES = 2**30  # enough for 64 rows of a small model; larger grids are cut to what fits
# What of an engine's step is not the executor's.
_AROUND = ("commit", "plan", "deliver", "inbox")
_COPIED_BYTES = 2**24
_TABLE_WIDTH = 100
_MOST_DISTURBED = 0.05
# Requests at once, and tokens of each, that tell what the engine takes around a step.
_ENGINE_ROWS = (1, 16)
_ENGINE_TOKENS = 64

# Decoding rows by their context, and lengths of a prompt's chunk by its start: long ones are few,
# because they take most of a round's time.
_DECODES = {
    16: (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
    256: (1, 2, 4, 8, 16, 32, 64),
    1024: (1, 2, 4, 8, 16),
    3072: (1, 3),
}
_PREFILLS = {
    0: (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512),
    512: (1, 4, 16, 32, 64, 256),
    2048: (1, 8, 32, 128),
}
_MIXED = ((2, 30, 256), (8, 120, 0), (8, 248, 256), (32, 96, 512))
# Sizes that are never fitted: decoding rows and their context, then a prompt's length and start.
_BETWEEN = (
    (5, 128, 0, 0),
    (10, 640, 0, 0),
    (40, 200, 0, 0),
    (0, 0, 20, 100),
    (0, 0, 80, 1000),
    (0, 0, 200, 0),
    (0, 0, 100, 1500),
    (4, 400, 60, 300),
    (16, 100, 150, 700),
)
# So many prompts at once, of so many tokens, as they come in bursts: fitted, and never fitted.
_SEVERAL = ((4, 60, True), (8, 30, False))


@dataclass(frozen=True, slots=True)
class Measured:
    """A step that was measured: its totals, and nanoseconds of each repeat, by rounds.

    are_quiet: whether other processes left it the cores, by rounds.
    """

    cell: Cell
    totals: StepTotals
    rounds_ns: list[list[int]] = field(default_factory=list)
    are_quiet: list[bool] = field(default_factory=list)

    def get_times_ns(self, first: int, stride: int) -> list[int]:
        """Times of every `stride`th round from round `first` on, of quiet ones if any were."""
        chosen = self.rounds_ns[first::stride]
        quiet = [
            times_ns
            for times_ns, is_quiet in zip(chosen, self.are_quiet[first::stride], strict=True)
            if is_quiet
        ]
        return [each for times_ns in quiet or chosen for each in times_ns]

    def get_held_out_ns(self) -> float:
        """Its time in the even rounds."""
        return get_usual_ns(self.get_times_ns(1, 2))


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found: `cost` is fitted to all rounds, `held_out` to the odd ones.

    disturbed: the share of repeats during which others took the cores.
    """

    measured: Sequence[Measured]
    cost: MeasuredCost
    held_out: MeasuredCost
    disturbed: float

    def get_errors(self, kind: str = "", is_fitted: bool | None = None) -> list[float]:
        """Relative errors of `held_out` against the even rounds, of some or all steps, rising."""
        return sorted(
            abs(self.held_out.predict_ns(each.totals) / each.get_held_out_ns() - 1)
            for each in self.measured
            if kind in ("", each.cell.kind) and is_fitted in (None, each.cell.is_fitted)
        )


def run_calibrate(model: str, on: MachineOptions) -> None:
    """Measure, fit, print and store. Raises TwostrokeError."""
    from rich.console import Console

    wanted = EngineSettings(
        model=model,
        **get_machine_settings(keep_on_cpu(on)),
        kv_memory=_POOL_BYTES,
        has_chat=False,
    )
    built = build_engine(wanted)
    executor, spec, settings = built.parts.executor, built.parts.spec, built.settings
    try:
        if not isinstance(executor, LocalExecutor):
            raise InvalidParameter("backend", "only an executor of this process can be measured")
        found = calibrate(built.parts, settings, BUDGET_S)
    finally:
        executor.close()
        built.model.close()
    path = get_calibration_path(spec, settings)
    store_fit(path, found.cost.fit)
    console = Console(highlight=False)
    console.width = max(console.width, _TABLE_WIDTH)  # also where the output is piped on
    console.print(build_table(found, build_limits_cost(spec, settings)))
    rounds = len(found.measured[0].rounds_ns)
    for line in describe(found):
        console.print(line, soft_wrap=True)
    console.print(f"{len(found.measured)} steps, {rounds} rounds; stored as {path}", soft_wrap=True)


def calibrate(parts: EngineParts, settings: ResolvedSettings, budget_s: float) -> Calibration:
    """Measures the grid for about `budget_s` seconds, three rounds at least, then the engine.

    Writes to every block of the executor's pool, and closes the executor.
    """
    executor, spec = parts.executor, parts.spec
    assert isinstance(executor, LocalExecutor)
    fill_pool(executor)
    work = get_settings_work(spec, settings)
    measured = [
        Measured(cell, sum_cell(cell, work.get_row_totals)) for cell in list_cells(spec, settings)
    ]
    plans = [
        build_plan(each.cell, step, spec.vocab_size, settings.block_tokens)
        for step, each in enumerate(measured)
    ]
    chosen = warm_up(executor, measured, plans, budget_s / 2)
    measured, plans = [measured[at] for at in chosen], [plans[at] for at in chosen]
    begin, rounds, disturbed = time.monotonic(), 0, 0
    while rounds < _MOST_ROUNDS:
        for at in get_order(len(plans), rounds):
            repeats = count_repeats(measured[at].totals.tokens)
            times_ns, is_quiet = repeat_step(executor, plans[at], repeats, settings.threads)
            measured[at].rounds_ns.append(times_ns)
            measured[at].are_quiet.append(is_quiet)
            disturbed += not is_quiet
        rounds += 1
        spent = time.monotonic() - begin
        if rounds >= _LEAST_ROUNDS and spent + spent / rounds > budget_s:
            break
    copy_byte_ns = time_copies(executor, settings.num_blocks, settings.kv_bytes)
    engine_ns = time_engine(parts)
    fitted = [each for each in measured if each.cell.is_fitted]
    half = [(each.totals, at) for each in fitted for at in each.get_times_ns(0, 2)]
    whole = [(each.totals, at) for each in fitted for at in each.get_times_ns(0, 1)]
    cost, held_out = (
        MeasuredCost(work, fit_steps(each, copy_byte_ns, engine_ns)) for each in (whole, half)
    )
    return Calibration(measured, cost, held_out, disturbed / (rounds * len(measured)))


def warm_up(
    executor: LocalExecutor,
    measured: Sequence[Measured],
    plans: Sequence[StepPlan],
    round_s: float,
) -> list[int]:
    """Runs steps once, those of few tokens first, and returns which are quick enough to repeat.

    A slow machine leaves out the longest; what the fit needs is among the first.
    """
    order = sorted(range(len(plans)), key=lambda at: measured[at].totals.tokens)
    begin = time.monotonic()
    for done, at in enumerate(order, 1):
        time_step(executor, plans[at])
        if done >= _LEAST_CELLS and time.monotonic() - begin > round_s:
            return sorted(order[:done])
    return sorted(order)


def list_cells(spec: ModelSpec, settings: ResolvedSettings) -> Iterator[Cell]:
    """The grid, as far as the model's context, the pool, the rows and the step budget allow."""
    cells = [
        Cell("decode", ((1, before, 1),) * rows)
        for before, counts in _DECODES.items()
        for rows in counts
    ]
    cells += [
        Cell("prefill", ((new, start, 0),)) for start, sizes in _PREFILLS.items() for new in sizes
    ]
    cells += [Cell("prefill", ((new, 0, 1),)) for new in (16, 128)]
    cells += [
        Cell("mixed", ((1, before or 64, 1),) * rows + ((new, before, 0),))
        for rows, new, before in _MIXED
    ]
    for rows, before, new, start in _BETWEEN:
        prompt = ((new, start, 0),) if new else ()
        kind = "mixed" if rows and new else "decode" if rows else "prefill"
        cells.append(Cell(kind, ((1, before, 1),) * rows + prompt, is_fitted=False))
    for prompts, tokens, is_fitted in _SEVERAL:
        cells.append(Cell("prefill", ((tokens, 0, 1),) * prompts, is_fitted))
    return (cell for cell in cells if fits(cell, spec, settings))


def time_engine(parts: EngineParts) -> tuple[float, float]:
    """Nanoseconds the engine takes from one step to the next beside the executor: for every step,
    and for each of its rows. Serves requests, and closes the engine."""
    service = EngineService(parts)
    try:
        few, many = (_time_around(service, rows) for rows in _ENGINE_ROWS)
    finally:
        service.close()
    row_ns = max(0.0, (many - few) / (_ENGINE_ROWS[1] - _ENGINE_ROWS[0]))
    return max(0.0, few - row_ns * _ENGINE_ROWS[0]), row_ns


def _time_around(service: EngineService, rows: int) -> float:
    """Nanoseconds a step of so many rows takes outside the executor, in the mean of many."""
    params = SamplingParams(temperature=0.0, max_tokens=_ENGINE_TOKENS, ignore_eos=True, seed=0)
    left = threading.Semaphore(0)

    def take(deltas: Sequence[OutputDelta], ended: bool) -> None:
        if ended:
            left.release()

    states = []
    for row in range(rows):
        tokens = tuple((97 * row + at) % service.parts.spec.vocab_size for at in range(4))
        request = service.make_request(params, f"calibration-{rows}-{row}", tokens)
        states.append(service.make_state(request, params, take))
    before = service.get_stats()
    service.submit(states).result()
    for _ in states:
        left.acquire()
    after = service.get_stats()
    around_s = sum(after.part_seconds[part] - before.part_seconds[part] for part in _AROUND)
    return around_s * 1e9 / (after.steps - before.steps)


def time_copies(executor: LocalExecutor, num_blocks: int, kv_bytes: int) -> float:
    """Nanoseconds a byte of KV takes between the pool and host memory, the slower way."""
    count = max(1, min(num_blocks, _COPIED_BYTES * num_blocks // kv_bytes))
    blocks = range(count)
    times: list[list[int]] = [[], []]
    for _ in range(5):
        begin = time.perf_counter_ns()
        handle = executor.read_kv(blocks)
        read = time.perf_counter_ns()
        executor.write_kv(handle, blocks)
        times[0].append(read - begin)
        times[1].append(time.perf_counter_ns() - read)
    return max(median(each) for each in times) / len(handle)


def build_table(found: Calibration, limits: StepCost) -> Table:
    """Predicted beside measured, every step; and what the machine's limits alone would say."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step")
    headings = ("rows", "tokens", "keys a row", "measured, ms", "predicted", "error", "by limits")
    for heading in headings:
        table.add_column(heading, justify="right")
    for each in found.measured:
        seen_ns = each.get_held_out_ns()
        predicted_ns = found.held_out.predict_ns(each.totals)
        table.add_row(
            each.cell.kind + ("" if each.cell.is_fitted else " *"),
            str(each.totals.rows),
            str(each.totals.tokens),
            str(sum(before for _, before, _ in each.cell.rows) // len(each.cell.rows)),
            f"{seen_ns / 1e6:.3f}",
            f"{predicted_ns / 1e6:.3f}",
            f"{predicted_ns / seen_ns - 1:+.1%}",
            f"{limits.predict_ns(each.totals) / 1e6:.3f}",
        )
    return table


def describe(found: Calibration) -> Iterator[str]:
    """Errors of the fit to odd rounds against even rounds, in a line for each kind of step."""
    groups = {
        "decode": found.get_errors("decode", True),
        "prefill": found.get_errors("prefill", True),
        "mixed": found.get_errors("mixed", True),
        "all fitted": found.get_errors(is_fitted=True),
        "* sizes between": found.get_errors(is_fitted=False),
    }
    for name, errors in groups.items():
        if errors:
            most = _get_p90(errors)
            yield f"{name:15} median error {median(errors):.1%}, 90th percentile {most:.1%}"
    fit = found.cost.fit
    yield (
        f"the engine takes {fit.engine_step_ns / 1e6:.3f} ms around a step, and "
        f"{fit.engine_row_ns / 1e6:.3f} ms for each of its rows"
    )
    if found.disturbed > _MOST_DISTURBED:
        yield (
            f"the machine was busy with other things during {found.disturbed:.0%} of the steps: "
            "calibrate again when it is quiet"
        )


def _get_p90(rising: Sequence[float]) -> float:
    return rising[min(len(rising) - 1, int(0.9 * len(rising)))]
