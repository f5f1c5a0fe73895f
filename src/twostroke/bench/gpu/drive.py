"""Runs a plan on the device: opens each model once and lets its sections measure it."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from twostroke.bench.gpu.attention import FAKE_SHAPES, SHAPES, measure_attention
from twostroke.bench.gpu.ceilings import measure_ceilings
from twostroke.bench.gpu.results import Run
from twostroke.bench.gpu.schedule import (
    ATTENTION,
    EXACT,
    GAP,
    PEERS,
    SERVED,
    STEPS,
    Choice,
    Visit,
    plan_visits,
)
from twostroke.bench.gpu.sections import (
    Section,
    run_exact,
    run_gap,
    run_peers,
    run_served,
    run_steps,
)
from twostroke.bench.gpu.session import Clock, Plan, Session
from twostroke.bench.gpu.timing import QUICK, Pace
from twostroke.bench.gpu.traces import TraceShape
from twostroke.bench.gpu.workloads import (
    DECODE,
    FAKE_CELLS,
    PREFILL,
    TINY,
    Cell,
    find_obstacle,
    get_model,
)

SECTIONS: Mapping[str, Section] = {
    STEPS: run_steps,
    PEERS: run_peers,
    EXACT: run_exact,
    GAP: run_gap,
    SERVED: run_served,
}
PEER_CELLS = (
    Cell(PREFILL, 1, 2048, 2048),
    Cell(DECODE, 1, 1, 2048),
    Cell(DECODE, 32, 1, 2048),
)
SMALLEST = Cell(DECODE, 1, 1, 128)
LEAST_S = 3.0  # a section with less time left is not begun

Say = Callable[[str], None]


def make_plan(choice: Choice) -> Plan:
    """What the sections measure."""
    if choice.is_fake:
        return Plan(
            cells=FAKE_CELLS,
            peer_cells=FAKE_CELLS[:2],
            gap_cell=Cell(DECODE, 2, 1, 7),
            gap_steps=4,
            pace=QUICK,
            shape=TraceShape(3, 50.0, 6, 3, TINY.vocab_size),
            trace=choice.trace,
            trace_limit_s=60.0,
            max_rows=4,
            step_tokens=32,
        )
    shape = TraceShape(vocab_size=100_000)
    return Plan(peer_cells=PEER_CELLS, shape=shape, trace=choice.trace)


def measure(choice: Choice, about: dict[str, Any], keep: Callable[[Run], None], say: Say) -> Run:
    """Every visit of the plan while the budget lasts; `keep` is given the run after each."""
    device = torch.device("cpu" if choice.is_fake else "cuda")
    whole = Clock(choice.budget_s)
    begin = time.perf_counter()
    run = Run(about, measure_ceilings(device))
    run.seconds["ceilings"] = time.perf_counter() - begin
    keep(run)
    card = run.ceilings
    say(
        f"{card.card}: copy {card.copy_bandwidth / 1e12:.3f} TB/s, read "
        f"{card.read_bandwidth / 1e12:.3f} TB/s, BF16 {card.matrix_rate / 1e12:.0f} TFLOP/s"
    )
    plan, visits = make_plan(choice), plan_visits(choice)
    place = _Place(run, device, whole, keep, say)
    if any(visit.section == ATTENTION for visit in visits):
        shapes, pace = (FAKE_SHAPES, QUICK) if choice.is_fake else (SHAPES, Pace(budget_s=0.15))

        def attend(seconds: float) -> None:
            run.add(ATTENTION, measure_attention(shapes, device, pace))

        place.guard(visits[1], attend)
    of_models = [visit for visit in visits if visit.model]
    for name, group in itertools.groupby(of_models, lambda visit: visit.model):
        _visit_model(name, list(group), plan, place)
    return run


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a run's sections happen, how much time is left for all of them, and who is told."""

    run: Run
    device: torch.device
    whole: Clock
    keep: Callable[[Run], None]
    say: Say

    def guard(self, visit: Visit, measure: Callable[[float], None]) -> None:
        """Let `measure` have its seconds; whatever it dies of costs this section and no other."""
        what = f"{visit.section} {visit.model}".rstrip()
        seconds = min(visit.seconds, self.whole.left_s)
        if seconds < LEAST_S:
            self.run.missing[what] = "the run's time was spent"
            return
        self.say(f"{what} ({seconds:.0f} s)")
        begin = time.perf_counter()
        try:
            measure(seconds)
        except Exception as error:  # noqa: BLE001 outermost frame: the other sections go on
            self.say(traceback.format_exc())
            self.run.missing[what] = f"{type(error).__name__}: {error}".splitlines()[0]
        self.run.seconds[what] = time.perf_counter() - begin
        self.keep(self.run)


def _run_section(section: Section, session: Session, plan: Plan, seconds: float) -> None:
    section(session, plan, Clock(seconds))


def _visit_model(name: str, visits: Sequence[Visit], plan: Plan, place: _Place) -> None:
    model, run = get_model(name), place.run
    obstacle = find_obstacle(model.get_spec(), SMALLEST, run.ceilings.memory_bytes)
    if obstacle:
        run.missing[name] = obstacle
        place.say(f"{name}: {obstacle}")
        return
    begin = time.perf_counter()
    session = Session(model, place.device, run.ceilings, run, place.say)
    run.seconds[f"weights {name}"] = time.perf_counter() - begin
    place.say(f"{name}: weights made in {run.seconds[f'weights {name}']:.1f} s")
    try:
        for visit in visits:
            section = SECTIONS[visit.section]
            place.guard(visit, partial(_run_section, section, session, plan))
    finally:
        session.close()
