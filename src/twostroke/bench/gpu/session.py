"""One model on the device, and the sections that measure it.

A Session owns weights and, between two sections, at most one engine: its KV pool takes what the
weights leave, so it is made for one section's steps, or for one trace, and closed again.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from twostroke.bench.gpu.ceilings import Ceilings
from twostroke.bench.gpu.engine import EngineSizes, GpuEngine, make_plan
from twostroke.bench.gpu.results import Run
from twostroke.bench.gpu.synthetic import SyntheticWeights, make_source
from twostroke.bench.gpu.timing import Pace, time_launch
from twostroke.bench.gpu.traces import TraceShape
from twostroke.bench.gpu.workloads import (
    BLOCK_TOKENS,
    DECODE,
    PREFILL,
    RESERVE_BYTES,
    Cell,
    GpuModel,
    list_cells,
)
from twostroke.core.types import StepPlan
from twostroke.exec.cuda_ladder import make_rungs, make_token_rungs
from twostroke.spec.model import ModelSpec

SPARE_BLOCKS = 8
LEAST_STEP_TOKENS = 256

_GAP_CELL = Cell(DECODE, 32, 1, 2048)
_PACE = Pace()
_SHAPE = TraceShape()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure and how long to spend on it.

    cells: of the steps section. peer_cells: shapes compared with peers. trace_limit_s: after which
    a served trace is stopped. gap_steps: decode steps between which the host's gap is taken.
    max_rows, step_tokens: of the largest step while serving.
    """

    cells: tuple[Cell, ...] = field(default_factory=list_cells)
    peer_cells: tuple[Cell, ...] = ()
    gap_cell: Cell = _GAP_CELL
    gap_steps: int = 64
    pace: Pace = _PACE
    shape: TraceShape = _SHAPE
    trace: Path | None = None
    trace_limit_s: float = 60.0
    max_rows: int = 256
    step_tokens: int = 2048


class Clock:
    """Seconds left of a budget."""

    def __init__(self, budget_s: float) -> None:
        self._end = time.perf_counter() + budget_s

    @property
    def left_s(self) -> float:
        """Seconds left; below zero when it is spent."""
        return self._end - time.perf_counter()


@dataclass(slots=True)
class Session:
    """A model's weights on a device, and where its results go. say: takes a line for people."""

    model: GpuModel
    device: torch.device
    ceilings: Ceilings
    run: Run
    say: Callable[[str], None]
    spec: ModelSpec = field(init=False)
    source: SyntheticWeights = field(init=False)

    def __post_init__(self) -> None:
        self.spec = self.model.get_spec()
        dtype = getattr(torch, self.model.dtype)
        self.source = make_source(self.spec, dtype, self.device, self.model.is_int4)

    @contextlib.contextmanager
    def open_engine(self, sizes: EngineSizes) -> Iterator[GpuEngine]:
        """An engine with random KV; its memory is free again afterwards."""
        engine = GpuEngine(self.model, self.source, self.device, sizes)
        try:
            with engine.use():
                yield engine
        finally:
            engine.close()
            del engine
            self.free()

    def get_sizes(self, cells: Sequence[Cell], exact: bool = False) -> EngineSizes:
        """The pool that the largest of some steps needs, and a little more."""
        return EngineSizes(
            num_blocks=max(cell.blocks for cell in cells) + SPARE_BLOCKS,
            max_rows=max(cell.batch for cell in cells),
            context_tokens=max(cell.context for cell in cells) + BLOCK_TOKENS,
            rungs=tuple(sorted({cell.batch for cell in cells if cell.kind == DECODE})),
            token_rungs=tuple(sorted({cell.tokens for cell in cells if cell.kind == PREFILL})),
            max_step_tokens=max(LEAST_STEP_TOKENS, *(cell.batch * cell.tokens for cell in cells)),
            exact=exact,
        )

    def get_serving_sizes(self, plan: Plan, context: int, most_blocks: int) -> EngineSizes:
        """A pool of most of what is free, but no more than a trace can use; every rung captured."""
        free = self.ceilings.memory_bytes
        if self.device.type == "cuda":
            free = int(torch.cuda.mem_get_info(self.device)[0])
        block_bytes = BLOCK_TOKENS * self.spec.get_kv_bytes_per_token()
        blocks = max(1, min((free - RESERVE_BYTES) // block_bytes, most_blocks))
        rows, tokens = plan.max_rows, plan.step_tokens
        rungs, token_rungs = make_rungs(rows), make_token_rungs(tokens)
        return EngineSizes(blocks, rows, context, rungs, token_rungs, tokens)

    def make_plan(self, cell: Cell, num_blocks: int) -> StepPlan:
        """One step of a cell."""
        return make_plan(cell.rows, num_blocks, self.spec.vocab_size)

    def free(self) -> None:
        """Give memory that nobody holds back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let go of the weights."""
        self.source.close()
        self.free()

    def describe_row(self, cell: Cell) -> dict[str, Any]:
        """What every row about a step begins with."""
        return {
            "model": self.model.name,
            "cell": cell.name,
            "kind": cell.kind,
            "batch": cell.batch,
            "tokens": cell.tokens,
            "context": cell.context,
        }


def measure_steps(
    session: Session, cells: Sequence[Cell], exact: bool, clock: Clock, pace: Pace
) -> None:
    """Times of our engine's steps, into the section "steps"; what the budget cuts is noted."""
    if not cells:
        return
    sizes = session.get_sizes(cells, exact)
    with session.open_engine(sizes) as engine:
        for cell in cells:
            what = f"{session.model.name} {cell.name}" + (" exact" if exact else "")
            if clock.left_s <= 0:
                session.run.missing[what] = "the section's time was spent"
                continue
            launch = engine.prepare(session.make_plan(cell, sizes.num_blocks))
            timed = time_launch(launch, session.device, pace)
            row = {**session.describe_row(cell), "exact": exact, **timed.describe()}
            session.run.add("steps", [row])
            session.say(f"  {what}: {timed.seconds * 1e3:.3f} ms")
        check_bytes(session)


def check_bytes(session: Session) -> None:
    """Raise AssertionError unless the weights take the bytes that the floor counts.

    A floor of more bytes than are read would make every share too good.
    """
    spec = session.spec
    counted = sum(
        tensor.bytes
        for tensor in spec.tensors()
        if len(tensor.shape) == 2 and tensor.name != "embed"
    )
    found = session.source.matrix_bytes
    assert abs(found - counted) <= 0.01 * counted, f"{found:,} bytes of weights, not {counted:,}"
