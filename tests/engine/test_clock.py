"""Laws of the clocks: nothing runs early, everything due runs in order."""

from __future__ import annotations

import threading

from fakes import ManualClock
from twostroke.engine.clock import MonotonicClock


def test_functions_run_in_order_of_time_and_never_early() -> None:
    clock, done = MonotonicClock(), threading.Event()
    start_ns, ran = clock.now_ns(), []
    for delay_ns in (3_000_000, 1_000_000, 2_000_000):
        clock.call_at(
            start_ns + delay_ns, lambda delay_ns=delay_ns: ran.append((delay_ns, clock.now_ns()))
        )
    clock.call_at(start_ns + 4_000_000, done.set)
    assert done.wait(10)
    assert [delay_ns for delay_ns, _ in ran] == [1_000_000, 2_000_000, 3_000_000]
    assert all(at_ns >= start_ns + delay_ns for delay_ns, at_ns in ran)
    clock.close()


def test_a_closed_clock_runs_nothing() -> None:
    clock, ran = MonotonicClock(), []
    clock.call_at(clock.now_ns() + 10**15, lambda: ran.append(1))
    clock.close()
    clock.call_at(0, lambda: ran.append(2))
    assert ran == []


def test_a_function_may_schedule_another() -> None:
    clock, done = MonotonicClock(), threading.Event()
    clock.call_at(0, lambda: clock.call_at(0, done.set))
    assert done.wait(10)
    clock.close()


def test_the_manual_clock_shows_each_function_its_own_time() -> None:
    clock = ManualClock(0)
    seen: list[int] = []
    for at_ns in (30, 10, 99):
        clock.call_at(at_ns, lambda: seen.append(clock.now_ns()))
    clock.advance(50)
    assert seen == [10, 30]
    assert clock.now_ns() == 50
