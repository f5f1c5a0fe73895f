"""Laws of the engine's thread: it sleeps when idle, and every function sent is run or refused."""

from __future__ import annotations

import gc
import threading

import pytest

from twostroke.engine.thread import EngineThread
from twostroke.errors import EngineClosed, InvalidRequest


class CountingWork:
    """A Work that counts its calls and breaks when told to."""

    def __init__(self, wait_s: float | None = None) -> None:
        self.pumps = 0
        self.pumped = threading.Semaphore(0)
        self.wait_s = wait_s
        self.polls: tuple[int, int] | None = None
        self.breaks = False
        self.calls: list[str] = []

    @property
    def poll_for(self) -> tuple[int, int] | None:
        return self.polls

    def pump(self) -> float | None:
        self.pumps += 1
        self.pumped.release()
        if self.breaks:
            raise ValueError("a bug")
        return self.wait_s

    def close(self) -> None:
        self.calls.append("close")

    def abandon(self, reason: str) -> None:
        self.calls.append(reason)


@pytest.fixture
def work() -> CountingWork:
    return CountingWork()


@pytest.fixture
def thread(work: CountingWork) -> EngineThread:
    thread = EngineThread()
    thread.start(work)
    return thread


def test_functions_run_in_order_on_one_thread(thread: EngineThread) -> None:
    seen: list[tuple[int, int]] = []
    for number in range(5):
        thread.post(lambda number=number: seen.append((number, threading.get_ident())))
    assert thread.call(lambda: "last").result(10) == "last"
    assert [number for number, _ in seen] == list(range(5))
    assert len({ident for _, ident in seen} - {threading.get_ident()}) == 1
    thread.stop()


def test_an_idle_thread_does_not_pump(thread: EngineThread, work: CountingWork) -> None:
    for _ in range(3):
        thread.call(lambda: None).result(10)
    thread.stop()
    # One before the first function, at most one for each function, and none while idle.
    assert work.pumps <= 4


def test_a_wake_is_never_missed(thread: EngineThread, work: CountingWork) -> None:
    assert work.pumped.acquire(timeout=10)
    for _ in range(200):
        thread.wake()
        assert work.pumped.acquire(timeout=10)
        while work.pumped.acquire(blocking=False):
            pass
    thread.stop()


def test_a_pump_that_is_due_later_comes_without_a_wake() -> None:
    work, thread = CountingWork(wait_s=0.001), EngineThread()
    thread.start(work)
    for _ in range(3):
        assert work.pumped.acquire(timeout=10)
    thread.stop()


def test_a_typed_error_goes_to_the_caller_and_the_thread_goes_on(thread: EngineThread) -> None:
    def refuse() -> None:
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest, match="no"):
        thread.call(refuse).result(10)
    assert thread.call(lambda: 7).result(10) == 7
    thread.stop()


def test_after_the_end_functions_are_refused(thread: EngineThread, work: CountingWork) -> None:
    thread.stop()
    thread.stop()
    assert work.calls == ["close"]
    thread.post(lambda: work.calls.append("ran"))
    with pytest.raises(EngineClosed, match="was closed"):
        thread.call(lambda: None).result(10)
    assert work.calls == ["close"]


def test_a_bug_ends_the_thread_and_is_told(
    thread: EngineThread, work: CountingWork, caplog: pytest.LogCaptureFixture
) -> None:
    assert work.pumped.acquire(timeout=10)
    work.breaks = True
    thread.wake()
    assert work.pumped.acquire(timeout=10)
    thread.stop()
    assert work.calls == ["the engine's loop failed: ValueError: a bug"]
    assert "a bug" in caplog.text
    with pytest.raises(EngineClosed, match="a bug"):
        thread.call(lambda: None).result(10)


def test_a_bug_in_a_function_leaves_nobody_waiting(thread: EngineThread) -> None:
    def break_down() -> None:
        raise ZeroDivisionError

    with pytest.raises(EngineClosed):
        thread.call(break_down).result(10)
    thread.stop()
    assert "ZeroDivisionError" in (thread.closed_reason or "")


def test_a_cancelled_function_is_not_run(thread: EngineThread) -> None:
    gate, ran = threading.Event(), []
    thread.post(lambda: gate.wait(10) and None)
    future = thread.call(lambda: ran.append(1))
    assert future.cancel()
    gate.set()
    thread.stop()
    assert ran == []


def test_the_thread_may_stop_itself(thread: EngineThread, work: CountingWork) -> None:
    thread.call(thread.stop).result(10)
    thread.stop()
    assert work.calls == ["close"]


def test_a_finaliser_may_send_from_inside_any_allocation(thread: EngineThread) -> None:
    ran: list[int] = []

    class Garbage:
        """Part of a cycle, so that only the collector finalises it, wherever that runs."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            thread.post(lambda: ran.append(1))

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            Garbage()
            thread.post(Garbage)
            thread.wake()
    finally:
        gc.set_threshold(*thresholds)
    for _ in range(2):
        thread.call(lambda: None).result(10)
        gc.collect()
    thread.stop()
    assert len(ran) == 600
