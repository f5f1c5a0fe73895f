"""A group of real processes: every step is answered exactly once, whatever happens to a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from places import REPO
from rank_engine import Engine
from rank_fakes import (
    DIE,
    FAIL,
    HANG,
    LEAVE,
    LOSE,
    STOP,
    Answers,
    ToyJob,
    has_ended,
    make_plan,
    open_toys,
)
from twostroke.core.types import (
    Failed,
    Finished,
    Request,
    SequenceId,
    StepOutcome,
    StepPlan,
)
from twostroke.errors import CorruptModel, DeviceError, ExecutorLost
from twostroke.exec.ranks import RankGroup


@contextmanager
def toys(world: int = 2, **limits: float) -> Iterator[RankGroup]:
    """A group that is closed, with no process left."""
    group = open_toys(world, **limits)
    try:
        yield group
    finally:
        group.close()
        assert all(map(has_ended, group.pids))


def lose_group(group: RankGroup, token: int) -> ExecutorLost:
    """Starts two steps, the first of which makes a rank misbehave; what both are answered."""
    answers = Answers()
    group.start(make_plan(1, token), answers.take)
    group.start(make_plan(2, 5), answers.take)
    first, second = answers.wait(2)
    assert isinstance(first, ExecutorLost)
    assert isinstance(second, ExecutorLost)
    assert str(first) == str(second)
    assert all(map(has_ended, group.pids))
    group.start(make_plan(3, 5), answers.take)
    assert str(answers.wait(3)[2]) == str(first)
    with pytest.raises(ExecutorLost):
        group.read_kv([0])
    return first


def test_steps_are_answered_in_order_by_the_rank_that_samples() -> None:
    with toys(3) as group:
        answers = Answers()
        for step in range(20):
            group.start(make_plan(step, step + 1, start=step % 16), answers.take)
        outcomes = answers.wait(20)
        assert [one.step for one in outcomes if isinstance(one, StepOutcome)] == list(range(20))
        sums = [one.results[0].tokens for one in outcomes[:16] if isinstance(one, StepOutcome)]
        assert sums == [(sum(range(step + 2)),) for step in range(16)]
        info = group.describe()
        assert (info.device, info.weight_bytes, info.max_step_tokens) == ("3 x toy", 33, 62)
        assert (info.num_blocks, info.kv_bytes) == (16, 3 * 64)


def test_kv_bytes_go_back_to_the_ranks_they_came_from() -> None:
    with toys() as group:
        answers = Answers()
        group.start(make_plan(1, 7, 8, 9, 10, 11), answers.take)
        answers.wait()
        handle = group.read_kv([1, 0])
        group.write_kv(handle, [5, 1])
        assert group.read_kv([5, 1]) == handle
        assert handle.endswith(bytes([11, 0, 0, 0, 7, 8, 9, 10, 12, 1, 1, 1, 8, 9, 10, 11]))
        for wrong, blocks, message in (
            (b"nonsense", [0], "no KV bytes"),
            (handle, [0], "of 2 blocks and not of 1"),
            (handle[:-1], [5, 1], "cut off"),
            (handle[:20], [5, 1], "cut off"),
            (handle + b"x", [5, 1], "behind"),
        ):
            with pytest.raises(DeviceError, match=message):
                group.write_kv(wrong, blocks)
        assert group.read_kv([5, 1]) == handle
    with toys(1) as other, pytest.raises(DeviceError, match="2 x 1 ranks and not of 1 x 1"):
        other.write_kv(handle, [5, 1])


def test_start_does_not_wait_for_a_rank_that_does_not_read() -> None:
    with toys() as group:
        answers = Answers()
        os.kill(group.pids[1], signal.SIGSTOP)
        (row,) = make_plan(0, 5).rows
        long = replace(row, history=tuple(range(8000)))
        begin_s = time.monotonic()
        for step in range(60):  # more than the socket's buffers hold
            group.start(StepPlan(step, (long,)), answers.take)
        assert time.monotonic() - begin_s < 1.5
        os.kill(group.pids[1], signal.SIGCONT)
        assert all(isinstance(each, StepOutcome) for each in answers.wait(60))
        assert len(group.read_kv([0])) > 8  # the other rank has taken all of them


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_loses_every_step_in_flight(rank: int) -> None:
    with toys() as group:
        begin_s = time.monotonic()
        lost = lose_group(group, DIE + rank)
        assert f"rank {rank} of 2 was killed by SIGKILL" in str(lost)
        assert time.monotonic() - begin_s < 3.0


def test_a_rank_killed_while_idle_loses_the_next_step() -> None:
    with toys() as group:
        os.kill(group.pids[1], signal.SIGKILL)
        assert has_ended(group.pids[1])
        answers = Answers()
        group.start(make_plan(1, 5), answers.take)
        assert "rank 1 of 2 was killed by SIGKILL" in str(answers.wait()[0])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (FAIL + 1, "rank 1 of 2: RuntimeError: the device caught fire"),
        (LOSE + 1, "rank 1 of 2: its step failed"),
        (LEAVE, "rank 0 of 2 ended with status 0"),
    ],
)
def test_a_rank_that_fails_says_why(token: int, message: str) -> None:
    with toys() as group:
        assert str(lose_group(group, token)) == message


@pytest.mark.parametrize("token", [HANG, STOP])
def test_a_stuck_rank_is_lost_at_the_deadline(token: int) -> None:
    with toys(step_timeout_s=0.5) as group:
        assert "step 1 was not answered in 0.5 s" in str(lose_group(group, token))


def test_a_stuck_rank_does_not_hold_up_who_asks_for_kv() -> None:
    with toys(step_timeout_s=0.5) as group:
        os.kill(group.pids[1], signal.SIGSTOP)
        with pytest.raises(ExecutorLost, match="no KV came"):
            group.read_kv([0])


def test_closing_answers_steps_in_flight_and_ends_the_ranks() -> None:
    group = open_toys()
    answers = Answers()
    os.kill(group.pids[0], signal.SIGSTOP)
    group.start(make_plan(1, 5), answers.take)
    group.start(make_plan(2, 5), answers.take)
    threading.Timer(0.3, os.kill, (group.pids[0], signal.SIGCONT)).start()
    group.close()
    group.close()
    assert [str(each) for each in answers.answers] == ["the executor is closed"] * 2
    assert all(map(has_ended, group.pids))
    group.start(make_plan(3, 5), answers.take)
    assert str(answers.wait(3)[2]) == "the executor is closed"


def test_closing_ends_a_rank_that_does_not_end_by_itself() -> None:
    with toys(close_timeout_s=0.5) as group:
        handle = group.read_kv([0])
        group.write_kv(handle[:-8] + b"\xff" * 8, [0])
        begin_s = time.monotonic()
        group.close()
        assert 0.4 < time.monotonic() - begin_s < 3.0


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("memory", DeviceError, "rank 1 of 2: CUDA out of memory"),
        ("split", DeviceError, "rank 1 of 2: 6 heads cannot be divided by 4"),
        ("model", CorruptModel, "rank 1 of 2: tensor 'q' lies"),
        ("killed", DeviceError, "rank 1 of 2 was killed by SIGKILL while it started"),
        ("hang", DeviceError, "not ready in 1.5 s: rank 1 of 2"),
        ("blocks", DeviceError, "the ranks' KV pools differ"),
    ],
)
def test_a_rank_that_cannot_start_is_named(
    fault: str, error: type[Exception], message: str
) -> None:
    limit_s = 1.5 if fault == "hang" else 60.0
    with pytest.raises(error, match=message):
        open_toys(job=ToyJob(1, fault), start_timeout_s=limit_s)


def test_ranks_do_not_outlive_a_killed_parent() -> None:
    code = (
        "import time; from rank_fakes import HANG, make_plan, open_toys\n"
        "group = open_toys(); group.start(make_plan(1, HANG), print)\n"
        "print(*group.pids, flush=True); time.sleep(600)"
    )
    paths = os.pathsep.join([str(REPO / "tests"), str(REPO / "src")])
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    with parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    assert all(map(has_ended, pids))


def test_the_engine_serves_over_ranks_and_fails_every_request_when_one_dies() -> None:
    with toys(1) as alone, toys() as group:
        engines = [Engine(alone, 1000), Engine(group, 1000)]
        for engine in engines:
            engine.submit(Request("a", (1, 2, 3), 9), Request("b", (4, 5, 6), 9))
            engine.run()
        assert engines[0].answers == engines[1].answers
        assert {one.ending for one in engine.answers.values()} == {Finished("length")}
        engine.submit(Request("c", (1, 2, 3), 25), Request("d", (1, 2, 3), 25))
        engine.run(engine.num_committed + 3)
        os.kill(group.pids[1], signal.SIGKILL)
        engine.run()
        for name in "cd":
            ending = engine.answers[SequenceId(name, 0)].ending
            assert isinstance(ending, Failed)
            assert "rank 1 of 2 was killed by SIGKILL" in ending.reason
