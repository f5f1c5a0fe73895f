"""Laws of planning: the budget, its order, chunks, rows, and what a row carries."""

from __future__ import annotations

from scheduler_model import Driver, build_driver, build_request
from twostroke.core.types import Finished, Idle, Request, SamplingSpec, SequenceEnded, StepPlan


def plan(driver: Driver) -> StepPlan:
    """A plan that must not be idle."""
    answer = driver.plan()
    assert isinstance(answer, StepPlan)
    return answer


def step(driver: Driver) -> list[tuple[str, int]]:
    """Plan and commit one step; its rows as (request, tokens)."""
    made = plan(driver)
    driver.commit()
    return [(row.sequence.request, len(row.tokens)) for row in made.rows]


def test_nothing_to_do_is_idle() -> None:
    assert build_driver().plan() == Idle(waiting=0, in_flight=0)


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    driver = build_driver(step_tokens=8)
    driver.submit(build_request("a", 19))
    assert [step(driver) for _ in range(3)] == [[("a", 8)], [("a", 8)], [("a", 3)]]


def test_only_the_row_with_the_last_known_token_samples() -> None:
    driver = build_driver(step_tokens=8)
    driver.submit(build_request("a", 12))
    samplings = []
    for _ in range(3):
        samplings.append(plan(driver).rows[0].sampling)
        driver.commit()
    assert samplings == [None, SamplingSpec(), SamplingSpec()]


def test_decodes_come_before_chunks_and_both_share_a_step() -> None:
    driver = build_driver(step_tokens=8)
    driver.submit(build_request("long", 30))
    assert step(driver) == [("long", 8)]
    driver.submit(build_request("short", 2, 9, priority=-1))
    assert step(driver) == [("short", 2), ("long", 6)]
    assert step(driver) == [("short", 1), ("long", 7)]


def test_equal_priorities_are_served_in_order_of_arrival() -> None:
    driver = build_driver(step_tokens=8)
    for name in ("a", "b", "c"):
        driver.submit(build_request(name, 5))
    assert step(driver) == [("a", 5), ("b", 3)]
    assert step(driver) == [("a", 1), ("b", 2), ("c", 5)]


def test_a_smaller_priority_goes_first_even_past_a_prompt_under_way() -> None:
    driver = build_driver(step_tokens=8)
    driver.submit(build_request("late", 20, priority=5))
    assert step(driver) == [("late", 8)]
    driver.submit(build_request("soon", 6, priority=1))
    driver.submit(build_request("last", 6, priority=9))
    assert step(driver) == [("soon", 6), ("late", 2)]


def test_a_step_has_no_more_rows_than_allowed() -> None:
    driver = build_driver(max_rows=3)
    for number in range(7):
        driver.submit(build_request(f"r{number}", 2))
    assert [len(step(driver)) for _ in range(3)] == [3, 3, 3]
    driver.drain()


def test_nobody_runs_without_a_row_in_the_step() -> None:
    for sizes in ({"max_rows": 3}, {"step_tokens": 3}):
        driver = build_driver(**sizes)
        for number in range(7):
            driver.submit(build_request(f"r{number}", 1, 9))
        for _ in range(4):
            step(driver)
        assert driver.scheduler.num_running == 3
        driver.drain()


def test_nobody_overtakes_a_head_of_line_that_does_not_fit() -> None:
    driver = build_driver(num_blocks=8, block_tokens=4)
    driver.submit(build_request("first", 20, 8))
    step(driver)
    driver.submit(build_request("large", 20))
    driver.submit(build_request("small", 1))
    assert step(driver) == [("first", 1)]
    assert driver.scheduler.num_waiting == 2
    driver.drain()


def test_a_newcomer_leaves_a_spare_block_to_each_running_sequence() -> None:
    driver = build_driver(num_blocks=5, block_tokens=4)
    driver.submit(build_request("a", 4, 20))
    step(driver)
    driver.submit(build_request("b", 8))
    assert step(driver) == [("a", 1)]
    driver.submit(build_request("c", 1, priority=-1))
    assert step(driver) == [("a", 1), ("c", 1)]
    driver.drain()


def test_a_newcomer_leaves_prompts_under_way_the_blocks_they_will_need() -> None:
    driver = build_driver(num_blocks=8, block_tokens=4, step_tokens=8)
    driver.submit(build_request("long", 24))
    step(driver)
    driver.submit(build_request("soon", 4, priority=-1))
    assert step(driver) == [("long", 8)]
    driver.drain()
    assert driver.scheduler.memory.num_preemptions == 0


def test_a_newcomer_leaves_a_block_to_each_continuation_yet_to_be_forked() -> None:
    driver = build_driver(num_blocks=9, block_tokens=4, step_tokens=8)
    driver.submit(build_request("forking", 15, 1, n=4))
    step(driver)
    driver.submit(build_request("soon", 4, priority=-1))
    assert step(driver) == [("forking", 6)]
    assert len(step(driver)) == 4
    driver.drain()
    assert driver.scheduler.memory.num_preemptions == 0


def test_cancelled_waiters_leave_the_order_of_the_others() -> None:
    driver = build_driver(max_rows=1)
    for number in range(300):
        driver.submit(build_request(f"r{number}", 2, 1))
    for number in range(300):
        if number % 50:
            driver.cancel(f"r{number}")
    assert driver.scheduler.num_waiting == 6
    served = [step(driver)[0][0] for _ in range(6)]
    assert served == [f"r{number}" for number in range(0, 300, 50)]


def test_history_is_given_only_where_sampling_needs_it() -> None:
    driver = build_driver(step_tokens=4)
    driver.submit(build_request("a", 6, sampling=SamplingSpec(repetition_penalty=1.1)))
    assert plan(driver).rows[0].history == ()
    driver.commit()
    row = plan(driver).rows[0]
    assert row.history == build_request("a", 6).prompt
    assert row.history_prompt == 6
    driver.drain()


def test_a_stop_token_is_emitted_last() -> None:
    driver = build_driver()
    driver.submit(Request("a", (1, 2), 9))
    driver.drain()
    third = driver.get_output("a")[2]
    driver.submit(Request("a", (1, 2), 9, stop_tokens=frozenset({third})))
    driver.plan()
    driver.commit()
    while driver.get_live():
        driver.plan()
        updates = driver.commit()
    assert driver.get_output("a")[-1] == third
    assert updates[-1] == SequenceEnded(updates[-1].sequence, Finished("stop"))


def test_stop_tokens_are_not_obeyed_before_the_least_length() -> None:
    driver = build_driver(vocab_size=2)
    stops = frozenset({0, 1})
    driver.submit(Request("a", (1, 0), 9, stop_tokens=stops, min_new_tokens=4))
    driver.submit(Request("b", (1, 0), 9, stop_tokens=stops))
    driver.drain()
    assert len(driver.get_output("a")) == 4
    assert len(driver.get_output("b")) == 1


def test_a_sequence_that_outgrows_the_pool_ends_by_length() -> None:
    driver = build_driver(num_blocks=2, block_tokens=4)
    driver.submit(build_request("a", 3, 100))
    driver.drain()
    assert len(driver.get_output("a")) == 6
    assert driver.scheduler.counts["finished"] == 1


def test_prompt_scores_come_once_and_whole_over_chunks() -> None:
    driver = build_driver(step_tokens=3)
    driver.submit(build_request("a", 10, prompt_logprobs=2))
    rows = []
    while driver.get_live():
        rows += plan(driver).rows
        driver.commit()
    prompt = build_request("a", 10).prompt
    assert tuple(token for row in rows for token in row.scored) == prompt[1:]
    assert {row.scored_top for row in rows if row.scored} == {2}


def test_positions_scored_before_a_preemption_are_not_scored_again() -> None:
    driver = build_driver(num_blocks=18, block_tokens=1, step_tokens=3)
    driver.submit(build_request("old", 2, 12))
    step(driver)
    driver.submit(build_request("new", 12, prompt_logprobs=0))
    rows = []
    while driver.get_live():
        rows += [row for row in plan(driver).rows if row.sequence.request == "new"]
        driver.commit()
    prompt = build_request("new", 12).prompt
    assert tuple(token for row in rows for token in row.scored) == prompt[1:]
    restart = [row.start for row in rows].index(0, 1)
    edge = sum(len(row.scored) for row in rows[:restart])
    # Recomputed in other chunks than before, cut where scoring goes on.
    assert edge % 3 == 1
    assert [(row.start, len(row.scored)) for row in rows[restart : restart + 5]] == [
        (0, 0),
        (3, 0),
        (6, 0),
        (9, 0),
        (10, 1),
    ]


def test_counts_and_views_follow_a_request() -> None:
    driver = build_driver()
    scheduler = driver.scheduler
    driver.submit(build_request("a", 6, 2))
    assert (scheduler.num_waiting, scheduler.num_running, len(scheduler._flights)) == (1, 0, 0)
    driver.plan()
    assert (scheduler.num_waiting, scheduler.num_running, len(scheduler._flights)) == (0, 1, 1)
    assert scheduler.num_free_blocks == 62
    assert scheduler.num_held_tokens == 0
    driver.commit()
    assert scheduler.num_held_tokens == 6
    driver.drain()
    assert scheduler.counts["submitted"] == scheduler.counts["finished"] == 1
