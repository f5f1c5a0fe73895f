"""When blocks run out: who gives way, who comes back first, and that everything still ends."""

from __future__ import annotations

from scheduler_model import Driver, build_driver, build_request
from twostroke.core.types import Idle, Preempted, SequenceId, StepPlan


def run_until_preempted(driver: Driver) -> tuple[StepPlan, tuple[object, ...]]:
    """Steps up to the first preemption: the plan that preempted and its commit's updates."""
    while True:
        made = driver.plan()
        assert isinstance(made, StepPlan)
        updates = driver.commit()
        if driver.scheduler.memory.num_preemptions:
            return made, updates


def crowd(prompts: dict[str, int], **sizes: int) -> Driver:
    """A driver with these requests, each about to draw many tokens."""
    driver = build_driver(**sizes)
    for name, prompt_tokens in prompts.items():
        driver.submit(build_request(name, prompt_tokens, 16))
    return driver


def test_the_last_in_policy_order_gives_way() -> None:
    driver = crowd({"a": 4, "b": 4, "c": 4}, num_blocks=7, block_tokens=4)
    made, updates = run_until_preempted(driver)
    assert updates[0] == Preempted(SequenceId("c", 0))
    assert [row.sequence.request for row in made.rows] == ["a", "b"]
    driver.drain()


def test_a_larger_priority_number_gives_way_whatever_the_arrival() -> None:
    driver = build_driver(num_blocks=7, block_tokens=4)
    for name, priority in (("a", 2), ("b", 0), ("c", 1)):
        driver.submit(build_request(name, 4, 16, priority=priority))
    _, updates = run_until_preempted(driver)
    assert updates[0] == Preempted(SequenceId("a", 0))
    driver.drain()


def test_a_preempted_sequence_goes_ahead_of_newcomers() -> None:
    driver = crowd({"a": 4, "b": 4, "c": 4}, num_blocks=7, block_tokens=4)
    run_until_preempted(driver)
    driver.submit(build_request("d", 1, 16))
    seen = []
    while "d" not in seen:
        made = driver.plan()
        assert isinstance(made, StepPlan)
        seen += [row.sequence.request for row in made.rows]
        driver.commit()
    assert "c" in seen
    driver.drain()


def test_a_preempted_sequence_recomputes_all_it_knows_and_draws_the_same() -> None:
    driver = crowd({"a": 4, "b": 4, "c": 4}, num_blocks=7, block_tokens=4)
    run_until_preempted(driver)
    known = 4 + len(driver.get_output("c"))
    rows = []
    while not rows:
        made = driver.plan()
        assert isinstance(made, StepPlan)
        rows = [row for row in made.rows if row.sequence.request == "c"]
        driver.commit()
    assert (rows[0].start, len(rows[0].tokens)) == (0, known)
    driver.drain()  # compares every output with the request computed alone


def test_a_preempted_sequence_does_not_come_back_to_be_preempted_again() -> None:
    driver = crowd({f"r{number}": 6 for number in range(12)}, num_blocks=16, block_tokens=4)
    driver.drain()
    assert driver.scheduler.memory.num_preemptions <= 6


def test_a_sequence_with_a_row_in_flight_is_never_preempted() -> None:
    # One token a step and two steps in flight: the two sequences take turns, so that whenever the
    # first needs a block the second has a row in flight, until both rows have settled.
    driver = crowd({"a": 11, "b": 3}, num_blocks=6, block_tokens=4, step_tokens=1)
    driver.reserve("a", 10)
    driver.attach("a")
    waits = 0
    while not driver.scheduler.memory.num_preemptions:
        in_flight = [row.sequence.request for step in driver.flights for row in step.plan.rows]
        made = driver.plan()
        if driver.scheduler.memory.num_preemptions:
            assert "b" not in in_flight
        if isinstance(made, StepPlan) and len(driver.flights) < 2:
            continue
        waits += made == Idle(waiting=0, in_flight=1)
        driver.commit()
    assert waits > 0
    driver.drain()


def test_the_first_in_order_proceeds_while_others_are_in_flight() -> None:
    driver = crowd({"a": 6, "b": 6, "c": 6}, num_blocks=6, block_tokens=2, step_tokens=2)
    while driver.get_live():
        driver.plan()
        driver.plan()
        driver.commit()
        while len(driver.flights) > 1:
            driver.commit()
    assert driver.scheduler.counts["finished"] == 3


def test_one_sequence_may_use_the_whole_pool() -> None:
    driver = build_driver(num_blocks=3, block_tokens=4)
    driver.submit(build_request("a", 5, 7))
    driver.submit(build_request("b", 11, 1))
    driver.drain()
    assert len(driver.get_output("a")) == 7
    assert len(driver.get_output("b")) == 1


def test_a_preemption_is_reported_by_whichever_answer_comes_next() -> None:
    for answer in ("commit", "cancel", "lose"):
        driver = crowd({"a": 4, "b": 4, "c": 4}, num_blocks=7, block_tokens=4)
        while not driver.scheduler.memory.num_preemptions:
            driver.plan()
            if not driver.scheduler.memory.num_preemptions:
                driver.commit()
        calls = {
            "commit": driver.commit,
            "cancel": lambda driver=driver: driver.cancel("a"),
            "lose": lambda driver=driver: driver.lose(0, [0]),
        }
        assert calls[answer]()[0] == Preempted(SequenceId("c", 0))
        driver.drain()
