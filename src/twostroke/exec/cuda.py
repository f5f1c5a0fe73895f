"""The GPU executor: queues plans on the device as they come, and answers each when it is done.

`start` builds a step's arrays, queues its moves, its forward pass and its draws, and returns; a
thread waits for the device, so that planning, detokenising and streaming go on beside it. Two steps
may be queued, and a token that the first draws is read by the second on the device. Every plan is
answered exactly once: by that thread, by `close`, or at once when it cannot be queued. After the
device has failed nothing is run any more, for its memory cannot be trusted.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from twostroke.core.ports import ExecutorInfo, OnDone, StepAnswer
from twostroke.core.types import BlockId, Row, SequenceId, StepOutcome, StepPlan
from twostroke.errors import ExecutorLost
from twostroke.exec.batch import Batch, BatchBuilder
from twostroke.exec.cuda_device import Device, Event
from twostroke.exec.cuda_draw import DeviceDraws, DrawTicket
from twostroke.exec.cuda_runner import CudaRunner
from twostroke.exec.rank_draws import NoDraws
from twostroke.exec.sampling import build_results
from twostroke.kernels.cuda.types import BLOCK_TOKENS
from twostroke.kernels.ops import I32

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Flight:
    """A plan that was queued: when it begins and ends on the device, and what it draws."""

    plan: StepPlan
    on_done: OnDone
    begin: Event
    end: Event
    drawn: list[DrawTicket] = field(default_factory=list)
    scored: list[DrawTicket] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CudaFacts:
    """What `describe` tells beside what the runner knows. host_blocks: room for moved blocks."""

    device: str
    backend: str
    weight_bytes: int
    host_blocks: int = 0


class CudaExecutor:
    """Runs plans on one device (see core.ports.Executor). `start` is called by one thread."""

    def __init__(
        self, runner: CudaRunner, draws: DeviceDraws | NoDraws, device: Device, facts: CudaFacts
    ) -> None:
        self._runner, self._draws, self._device, self._facts = runner, draws, device, facts
        self._builder = BatchBuilder(runner.limits.logit_rows)
        self._drawers: tuple[SequenceId, ...] = ()  # of the tokens in runner.drawn
        self._host: torch.Tensor | None = None
        self._moving: tuple[frozenset[BlockId], Event] | None = None
        self._lock = threading.Lock()
        self._unanswered: dict[int, _Flight] = {}
        self._lost: str | None = None
        self._queued: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._waiter = threading.Thread(target=self._answer, name="twostroke-cuda", daemon=True)
        self._waiter.start()

    @property
    def runner(self) -> CudaRunner:
        """The forward pass it runs."""
        return self._runner

    @property
    def work_bytes(self) -> int:
        """Device memory beside weights, the pool and graphs."""
        return self._runner.work_bytes + self._draws.bytes

    def describe(self) -> ExecutorInfo:
        """What this executor offers."""
        pool, facts = self._runner.pool, self._facts
        return ExecutorInfo(
            device=facts.device,
            backend=facts.backend,
            threads=0,
            num_blocks=pool.num_blocks,
            block_tokens=BLOCK_TOKENS,
            kv_bytes=pool.bytes,
            weight_bytes=facts.weight_bytes,
            max_step_tokens=self._runner.limits.tokens,
        )

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        """Queues a plan on the device; `on_done` is called once, mostly from another thread."""
        if self._lost is not None:
            on_done(ExecutorLost(self._lost))
            return
        flight = self._try(plan, partial(self._enqueue, plan, on_done))
        if flight is None:
            on_done(ExecutorLost(self._lost or ""))
            return
        with self._lock:
            is_open = self._lost is None
            if is_open:
                self._unanswered[id(flight)] = flight
        if is_open:
            self._queued.put(flight)
        else:
            on_done(ExecutorLost(self._lost or ""))

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        """The bytes of these blocks, one after another; no step may be running."""
        with self._device.use():
            index = torch.tensor(list(blocks), dtype=torch.int64, device=self._device.name)
            return self._runner.pool.read(index).cpu().numpy().tobytes()

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        """Puts bytes from `read_kv` into `blocks`; no step may be running."""
        shape = (len(blocks), self._runner.pool.shape.block_bytes)
        data = torch.from_numpy(np.frombuffer(handle, np.uint8).reshape(shape).copy())
        with self._device.use():
            index = torch.tensor(list(blocks), dtype=torch.int64, device=self._device.name)
            self._runner.pool.write(index, data.to(self._device.name))
            self._device.synchronize()

    def close(self) -> None:
        """Ends it; plans still running answer ExecutorLost."""
        self._lose("the executor is closed")
        self._queued.put(None)
        if threading.current_thread() is not self._waiter:
            self._waiter.join(timeout=10)

    # ---- queueing ------------------------------------------------------------------------------

    def _enqueue(self, plan: StepPlan, on_done: OnDone) -> _Flight:
        with self._device.use():
            return self._enqueue_here(plan, on_done)

    def _enqueue_here(self, plan: StepPlan, on_done: OnDone) -> _Flight:
        """Queues a plan on the stream in use."""
        self._move_blocks(plan)
        begin = self._device.record()
        batch = self._builder.build(plan)
        sources = self._find_sources(plan.rows, batch)
        logits = self._runner.enqueue(batch.step, sources)
        drawn, scored = [], list[DrawTicket]()
        if count := batch.step.logit_rows.size:
            drawn.append(self._draws.draw(logits, batch.first, self._runner.drawn[:count]))
        if not batch.is_whole:
            self._enqueue_rest(batch, drawn, scored)
        # A tuple a step is cheaper than a table that few steps ask for.
        self._drawers = tuple(
            row.sequence
            for row in plan.rows
            if row.sampling is not None
            for _ in range(row.drafts + 1)
        )
        return _Flight(plan, on_done, begin, self._device.record(), drawn, scored)

    def _enqueue_rest(
        self, batch: Batch, drawn: list[DrawTicket], scored: list[DrawTicket]
    ) -> None:
        """The draws that are still missing, and all scores, so many rows at a time as fit."""
        limit, layout = self._runner.limits.logit_rows, batch.layout
        for chunk in layout.get_chunks(limit):
            if chunk.draws and chunk.start < limit:
                continue
            logits = self._runner.enqueue_head(chunk.positions)
            if chunk.draws:
                tokens = self._runner.drawn[chunk.start : chunk.start + chunk.positions.size]
                drawn.append(self._draws.draw(logits, layout.take_arrays(chunk.part), tokens))
            else:
                targets, top = layout.targets[chunk.part], layout.top[chunk.part]
                scored.append(self._draws.score(logits, targets, top))

    def _find_sources(self, rows: Sequence[Row], batch: Batch) -> I32 | None:
        """Where among the tokens drawn last each pending token is; None when none is pending."""
        tokens = batch.step.tokens
        pending = tokens < 0
        if not pending.any():
            return None
        places = {sequence: place for place, sequence in enumerate(self._drawers)}
        sources = np.full(tokens.size, -1, np.int32)
        for row, first in zip(rows, batch.step.row_offsets.tolist(), strict=False):
            if pending[first]:
                sources[first] = places[row.sequence]
        return sources

    def _move_blocks(self, plan: StepPlan) -> None:
        """Queues a plan's moves on the stream for copies; the step waits if it touches them."""
        if plan.copies or plan.swaps_out or plan.swaps_in:
            with self._device.use_copies():
                self._queue_moves(plan)
                done = self._device.record()
            touched = [move.block for move in (*plan.swaps_out, *plan.swaps_in)]
            touched += [block for copy in plan.copies for block in (copy.source, copy.target)]
            before = self._moving
            if before is not None:
                touched += before[0]
            self._moving = frozenset(touched), done
        if self._moving is not None:
            blocks, done = self._moving
            if any(not blocks.isdisjoint(row.blocks) for row in plan.rows):
                self._device.wait_for(done)
                self._moving = None
            elif done.has_passed():
                self._moving = None

    def _queue_moves(self, plan: StepPlan) -> None:
        pool = self._runner.pool.memory
        if self._host is None and plan.swaps_out:
            # Made when first needed: most runs never preempt.
            shape = (self._facts.host_blocks, pool.shape[1])
            self._host = self._device.pin(shape, torch.uint8)
        for move in plan.swaps_out:
            assert self._host is not None
            self._host[move.host].copy_(pool[move.block], non_blocking=True)
        for move in plan.swaps_in:
            assert self._host is not None, "moved in before anything was moved out"
            pool[move.block].copy_(self._host[move.host], non_blocking=True)
        for copy in plan.copies:
            pool[copy.target].copy_(pool[copy.source], non_blocking=True)

    # ---- answering -----------------------------------------------------------------------------

    def _answer(self) -> None:
        """Waits for flights in the order they were queued; the waiter's whole life."""
        while (flight := self._queued.get()) is not None:
            answer = self._try(flight.plan, partial(self._finish, flight))
            if answer is not None:
                self._settle(flight, answer)

    def _try(self, plan: StepPlan, function: Callable[[], Result]) -> Result | None:
        """What `function` returns; None when it fails, which loses the executor."""
        try:
            return function()
        except Exception as error:  # noqa: BLE001 outermost frame: every plan is answered
            _log.exception("step %d failed", plan.step)
            self._lose(f"step {plan.step} failed: {type(error).__name__}: {error}")
            return None

    def _finish(self, flight: _Flight) -> StepOutcome:
        flight.end.wait()
        drawn = [ticket.take() for ticket in flight.drawn]
        scored = [ticket.take() for ticket in flight.scored]
        results = build_results(flight.plan.rows, drawn, scored)
        return StepOutcome(flight.plan.step, results, flight.end.get_ns_since(flight.begin))

    def _settle(self, flight: _Flight, answer: StepAnswer) -> None:
        """Answers a flight unless that has been done."""
        with self._lock:
            is_first = self._unanswered.pop(id(flight), None) is not None
        if is_first:
            flight.on_done(answer)

    def _lose(self, reason: str) -> None:
        """Refuses what comes later and answers all that is queued."""
        with self._lock:
            if self._lost is None:
                self._lost = reason
            flights = list(self._unanswered.values())
        for flight in flights:
            self._settle(flight, ExecutorLost(reason))
