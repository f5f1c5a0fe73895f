"""Laws of the executor in a child process: whoever dies, no token changes or is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from child_engine import POISON, SIZES, make_local, open_supervisor, run_requests
from places import REPO
from rank_fakes import make_plan
from tiny_models import TINY_SPECS, VOCAB, make_config
from tiny_models import run_requests as run_local
from twostroke.core.types import (
    Failed,
    Finished,
    Request,
    Row,
    SamplingSpec,
    SequenceId,
    StepOutcome,
    StepPlan,
)
from twostroke.errors import BlamelessLoss, DeviceError, ExecutorLost
from twostroke.exec import child_supervisor
from twostroke.exec.child_executor import ChildExecutor
from twostroke.exec.child_memory import MemorySizes, SharedMemory


def make_requests(tokens: int) -> list[Request]:
    """Greedy, seeded, three at once, penalties and log-probabilities, and eight more."""
    rng, letters = random.Random(5), [token for token in range(VOCAB) if token != POISON]

    def prompt(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(letters, k=count))

    kinds = [
        SamplingSpec(),
        SamplingSpec(temperature=0.9, seed=4),
        SamplingSpec(temperature=1.0, seed=5, top_k=20),
        SamplingSpec(temperature=0.8, seed=6, repetition_penalty=1.2, logprobs=2),
    ]
    requests = [
        Request(f"a{place}", prompt(70), tokens, kind, n=3 if place == 2 else 1)
        for place, kind in enumerate(kinds)
    ]
    return requests + [
        Request(f"b{place}", prompt(5 + place), tokens, kinds[place % 2]) for place in range(8)
    ]


class Killer:
    """Sends a signal to the executor once at every number of committed steps that `when` names."""

    def __init__(self, number: int, when: range) -> None:
        self.number = number
        self.left = list(when)
        self.delays = random.Random(3)

    def __call__(self, executor: ChildExecutor, committed: int) -> None:
        if self.left and committed >= self.left[0] and executor.is_ready:
            self.left = [one for one in self.left if one > committed]
            # Before the step is begun, in it, or behind it: it takes a third of a millisecond.
            time.sleep(self.delays.choice((0.0, 0.0001, 0.0003)))
            os.kill(executor.child.pid, self.number)


def check_same(requests: list[Request], killer: Killer, least: int) -> None:
    undisturbed = run_requests(requests)
    disturbed = run_requests(requests, killer)
    assert undisturbed.lost == []
    assert len(disturbed.lost) >= least
    assert disturbed.tokens == undisturbed.tokens
    assert disturbed.logprobs == undisturbed.logprobs
    assert disturbed.endings == undisturbed.endings


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_executors_that_are_killed_or_stopped_change_nothing(number: int) -> None:
    check_same(make_requests(8), Killer(number, range(0, 12, 4)), 2)


@pytest.mark.slow
def test_executors_killed_at_every_token_and_every_chunk_change_nothing() -> None:
    check_same(make_requests(48), Killer(signal.SIGKILL, range(70)), 30)


@pytest.mark.slow
def test_executors_stopped_at_many_tokens_change_nothing() -> None:
    check_same(make_requests(48), Killer(signal.SIGSTOP, range(0, 70, 3)), 12)


def test_a_child_answers_what_the_same_executor_answers_in_process() -> None:
    requests = make_requests(8)
    config = make_config(TINY_SPECS["llama"], SIZES, 32)
    local = run_local(make_local(None, None).runner, SIZES, requests, config)
    child = run_requests(requests)
    assert child.tokens == {id: answer.tokens for id, answer in local.answers.items()}


def test_a_request_that_kills_executors_fails_alone() -> None:
    requests = make_requests(6)
    poison = Request("poison", (1, 2, POISON, 3), 4)
    expected = run_requests(requests)
    found = run_requests([*requests[:3], poison, *requests[3:]], factory="make_poisoned")
    failed = {id.request for id, one in found.endings.items() if isinstance(one, Failed)}
    drew_poison = {id.request for id, tokens in expected.tokens.items() if POISON in tokens}
    assert "poison" in failed
    assert failed <= {"poison"} | drew_poison
    for id, tokens in expected.tokens.items():
        if id.request not in failed:
            assert found.tokens[id] == tokens
            assert found.endings[id] == Finished("length")


def test_a_child_that_dies_idle_is_not_held_against_the_next_step() -> None:
    supervisor = open_supervisor()
    try:
        executor = supervisor.open()
        os.kill(executor.child.pid, signal.SIGKILL)
        answers: list[object] = []
        executor.start(make_plan(0), answers.append)
        while not answers:
            executor.run_pending()
        assert isinstance(answers[0], BlamelessLoss)
        assert executor.is_dead
    finally:
        supervisor.close()


def test_a_child_that_cannot_start_says_why_and_leaves_nothing() -> None:
    with pytest.raises(DeviceError, match="ValueError: no such thing"):
        open_supervisor("make_broken").open()


def test_children_that_never_answer_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_supervisor, "MOST_IN_A_ROW", 2)
    supervisor = open_supervisor()
    try:
        supervisor.open()
        for _ in range(2):
            supervisor.replace(ExecutorLost("it died"))
        with pytest.raises(ExecutorLost, match="2 in a row"):
            supervisor.replace(ExecutorLost("it died"))
    finally:
        supervisor.close()


def test_a_spare_that_cannot_be_started_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*unused: object) -> NoReturn:
        raise OSError(errno.EMFILE, "too many open files")

    supervisor = open_supervisor()
    try:
        executor = supervisor.open()
        monkeypatch.setattr(child_supervisor, "ChildProcess", refuse)
        answers: list[object] = []
        row = Row(SequenceId("r", 0), (3, 4), 0, (0,), SamplingSpec())
        executor.start(StepPlan(0, (row,)), answers.append)
        while not answers:
            executor.run_pending()
        assert isinstance(answers[0], StepOutcome)
        assert executor.lost is None
        with pytest.raises(ExecutorLost, match="too many open files"):
            supervisor.replace(ExecutorLost("it died"))
    finally:
        supervisor.close()


def test_memory_is_reserved_only_while_it_is_wanted() -> None:
    memory = SharedMemory(MemorySizes(1 << 20))
    try:
        memory.reserve(lambda: False)
        assert os.fstat(memory.descriptor).st_blocks == 0
        memory.reserve()
        assert os.fstat(memory.descriptor).st_blocks * 512 >= memory.sizes.total
    finally:
        memory.close()


@pytest.mark.parametrize("kv_bytes", [1 << 60, 1 << 70])
def test_memory_that_cannot_be_had_is_refused(kv_bytes: int) -> None:
    before = list_descriptors()
    with pytest.raises(DeviceError, match="cannot be shared"):
        SharedMemory(MemorySizes(kv_bytes))
    assert list_descriptors() <= before


def test_no_descriptor_and_no_process_is_left() -> None:
    before = list_descriptors()
    run_requests(make_requests(4), Killer(signal.SIGKILL, range(0, 4, 2)))
    assert list_descriptors() <= before
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert children == []


@pytest.mark.parametrize("is_stopped", [False, True])
def test_children_die_with_a_killed_parent_even_when_stopped(is_stopped: bool) -> None:
    code = (
        f"import sys, time; sys.path[:0] = [{str(REPO / 'src')!r}, {str(REPO / 'tests')!r}]\n"
        "from child_engine import open_supervisor\n"
        "supervisor = open_supervisor(); print(supervisor.open().child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    if is_stopped:
        os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.01)


def list_descriptors() -> set[str]:
    """What this process has open."""
    targets = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            targets.add(os.readlink(f"/proc/self/fd/{number}"))
    return targets


def is_alive(pid: int) -> bool:
    """Whether a process runs or is stopped; one that nobody has waited for yet does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
