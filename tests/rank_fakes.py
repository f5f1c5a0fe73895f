"""Executors for the processes of a rank group, and how tests drive one.

ToyExecutor is FakeExecutor's arithmetic in pieces: rank r keeps the tokens of its blocks plus r, so
that bytes that come back to the wrong rank show. A job or a token tells a rank to misbehave. It
imports nothing heavy, because every test starts processes that import this module.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from twostroke.core.ports import ExecutorInfo, OnDone, StepAnswer
from twostroke.core.types import (
    BlockId,
    Row,
    RowResult,
    SamplingSpec,
    SequenceId,
    StepOutcome,
    StepPlan,
)
from twostroke.errors import CorruptModel, DeviceError, ExecutorLost
from twostroke.exec.rank_wire import RankContext
from twostroke.exec.ranks import RankGroup, RankSetup
from twostroke.spec.ranks import RankLayout

NUM_BLOCKS, BLOCK_TOKENS = 16, 4

# Tokens that make the rank `rank % 10` of a step misbehave.
DIE, HANG, FAIL, LOSE, STOP, LEAVE = 900, 910, 920, 930, 940, 950


@dataclass(frozen=True)
class ToyJob:
    """What a toy rank does while it starts: `fault` on rank `rank`, after `delay_s`."""

    rank: int = -1
    fault: str = ""
    delay_s: float = 0.0
    num_blocks: int = NUM_BLOCKS


class ToyExecutor:
    """An Executor in a rank's process; see the module text. Answers from a thread."""

    def __init__(self, context: RankContext, num_blocks: int) -> None:
        self.rank = context.place.rank
        self.pool = [[self.rank] * BLOCK_TOKENS for _ in range(num_blocks)]
        self.answering = ThreadPoolExecutor(1)
        self.is_stuck = False

    def describe(self) -> ExecutorInfo:
        kv_bytes = len(self.pool) * BLOCK_TOKENS
        return ExecutorInfo(
            "toy", "toy", 1, len(self.pool), BLOCK_TOKENS, kv_bytes, 10 + self.rank, 64 - self.rank
        )

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        token = max(token for row in plan.rows for token in row.tokens)
        if token % 10 == self.rank:
            self._misbehave(token - self.rank, on_done)
        # The others wait for it for ever, as in a collective operation.
        self.is_stuck = self.is_stuck or token >= DIE
        if not self.is_stuck:
            self.answering.submit(on_done, self.compute(plan))

    def compute(self, plan: StepPlan) -> StepAnswer:
        """Each row draws the sum of the tokens it has read, modulo 800."""
        results = []
        for row in plan.rows:
            for offset, token in enumerate(row.tokens):
                block, slot = divmod(row.start + offset, BLOCK_TOKENS)
                self.pool[row.blocks[block]][slot] = token + self.rank
            known = [token - self.rank for block in row.blocks for token in self.pool[block]]
            drawn = sum(known[: row.start + len(row.tokens)]) % 800
            results.append(RowResult(row.sequence, (drawn,) if row.sampling else ()))
        return StepOutcome(plan.step, tuple(results), 1000)

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        return bytes([token % 256 for block in blocks for token in self.pool[block]])

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        for index, block in enumerate(blocks):
            part = handle[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            self.pool[block] = list(part)

    def close(self) -> None:
        if self.pool[0][0] == 255:  # written by a test that wants a rank that does not end
            time.sleep(600)

    def _misbehave(self, how: int, on_done: OnDone) -> None:
        match how:
            case 900:  # DIE
                os.kill(os.getpid(), signal.SIGKILL)
            case 910:  # HANG
                time.sleep(600)
            case 920:  # FAIL
                raise RuntimeError("the device caught fire\nand more lines")
            case 930:  # LOSE
                on_done(ExecutorLost("its step failed"))
            case 940:  # STOP
                os.kill(os.getpid(), signal.SIGSTOP)
            case 950:  # LEAVE
                os._exit(0)


def make_toy(context: RankContext, job: object) -> ToyExecutor:
    """The factory of toy ranks."""
    assert isinstance(job, ToyJob)
    if job.rank == context.place.rank:
        time.sleep(job.delay_s)
        match job.fault:
            case "memory":
                raise DeviceError("CUDA out of memory: tried to allocate 3 TiB")
            case "split":
                raise DeviceError("6 heads cannot be divided by 4")
            case "model":
                raise CorruptModel("tensor 'q' lies")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(600)
            case "blocks":
                return ToyExecutor(context, job.num_blocks - 1)
    return ToyExecutor(context, job.num_blocks)


def open_toys(world: int = 2, job: ToyJob | None = None, **limits: float) -> RankGroup:
    """A group of toy ranks; `limits` as in RankSetup."""
    return RankGroup(RankSetup(make_toy, job or ToyJob(), RankLayout(world), **limits))


def make_plan(step: int, *tokens: int, start: int = 0) -> StepPlan:
    """A step of one row whose sequence lies in blocks 0 … 3."""
    row = Row(SequenceId("r", 0), tokens, start, (0, 1, 2, 3), SamplingSpec())
    return StepPlan(step, (row,))


class Answers:
    """Collects answers; `wait` fails a test that would hang."""

    def __init__(self) -> None:
        self.answers: list[StepAnswer] = []
        self._arrived = threading.Condition()

    def take(self, answer: StepAnswer) -> None:
        """An OnDone."""
        with self._arrived:
            self.answers.append(answer)
            self._arrived.notify_all()

    def wait(self, count: int = 1, timeout_s: float = 20.0) -> list[StepAnswer]:
        """All answers once there are `count`."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.answers) >= count, timeout_s)
            return list(self.answers)


def has_ended(pid: int, timeout_s: float = 5.0) -> bool:
    """Whether no process of this id is left, waiting a little for it to go."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False
