"""Laws of the paces that predict nothing: fixed budgets, the load heuristic, static batches."""

from __future__ import annotations

import pytest

from policy_loads import make_load
from twostroke.core.policy import Pace, Room
from twostroke.errors import InvalidParameter
from twostroke.policies.pace import FixedPace, LoadHeuristicPace, StaticBatchPace


def fill(room: Room, *wanted: int) -> list[int]:
    """What the room gives prompts from position 0 that want so many tokens, one after another."""
    given = []
    for each in wanted:
        given.append(room.get_tokens(0, each))
        room.add(0, given[-1])
    return given


def test_a_fixed_step_counts_decodes_and_prompts_together() -> None:
    room = FixedPace(64).open_step(make_load(decodes=range(10)), 0)
    assert fill(room, 30, 30, 30) == [30, 24, 0]


def test_drafts_count_toward_a_fixed_step() -> None:
    room = FixedPace(64).open_step(make_load(decodes=range(10)), 0)
    room.add(7, 5)
    assert fill(room, 100) == [50]


def test_more_decodes_than_a_fixed_step_leave_no_room() -> None:
    assert fill(FixedPace(8).open_step(make_load(decodes=range(10)), 0), 30) == [0]


def test_the_load_heuristic_cuts_prompts_to_its_chunk() -> None:
    room = LoadHeuristicPace(2_000).open_step(make_load(decodes=range(10)), 0)
    assert fill(room, 1_500, 1_500, 1_500) == [1_500, 500, 0]


def test_the_load_heuristic_halves_the_chunk_when_blocks_run_short() -> None:
    pace = LoadHeuristicPace(2_000)
    assert fill(pace.open_step(make_load(free_blocks=20), 0), 5_000) == [2_000]
    assert fill(pace.open_step(make_load(free_blocks=19), 0), 5_000) == [1_000]


def test_the_load_heuristic_halves_the_chunk_of_a_long_prompt() -> None:
    pace = LoadHeuristicPace(2_000)
    assert fill(pace.open_step(make_load(), 0), 10_000) == [2_000]
    assert fill(pace.open_step(make_load(), 0), 10_001) == [1_000]
    assert pace.open_step(make_load(), 0).get_tokens(9_000, 1_001) == 1_000


def test_the_load_heuristic_knows_a_long_prompt_in_line_by_its_request() -> None:
    # A step that takes 2000 tokens cannot want 20,000.
    room = LoadHeuristicPace(2_000).open_step(make_load(prefills=[20_000]), 0)
    assert fill(room, 2_000) == [1_000]


def test_the_load_heuristic_halves_once() -> None:
    room = LoadHeuristicPace(2_000).open_step(make_load(free_blocks=0), 0)
    assert fill(room, 20_000) == [1_000]


def test_the_load_heuristic_takes_short_prompts_whole() -> None:
    room = LoadHeuristicPace(100).open_step(make_load(), 0)
    assert fill(room, 512, 512) == [512, 0]
    room = LoadHeuristicPace(100).open_step(make_load(), 0)
    assert fill(room, 513) == [100]


def test_drafts_leave_the_load_heuristic_alone() -> None:
    room = LoadHeuristicPace(1_000).open_step(make_load(decodes=[7]), 0)
    room.add(7, 5)
    assert fill(room, 5_000) == [1_000]


def test_a_static_batch_waits_until_it_is_full() -> None:
    pace = StaticBatchPace(4, 1_000)
    assert pace.open_step(make_load(waiting=3), 0).newcomers == 0
    assert pace.open_step(make_load(waiting=4), 1).newcomers == 4


def test_a_static_batch_waits_no_longer_than_its_timeout() -> None:
    pace = StaticBatchPace(4, 1_000)
    room = pace.open_step(make_load(waiting=3, oldest_ns=50), 1_049)
    assert (room.newcomers, room.wake_ns) == (0, 1_050)
    room = pace.open_step(make_load(waiting=3, oldest_ns=50), 1_050)
    assert (room.newcomers, room.wake_ns) == (3, 0)


def test_nobody_joins_a_static_batch_that_runs() -> None:
    pace = StaticBatchPace(2, 1_000)
    pace.open_step(make_load(waiting=2), 0).newcomers -= 2
    for running in (make_load(decodes=[5], waiting=9), make_load(prefills=[5], waiting=9)):
        room = pace.open_step(running, 9_999)
        assert (room.newcomers, room.wake_ns) == (0, 0)
    assert pace.open_step(make_load(waiting=9), 9_999).newcomers == 2


def test_a_static_batch_may_be_admitted_over_several_steps() -> None:
    pace = StaticBatchPace(5, 1_000)
    pace.open_step(make_load(waiting=9), 0).newcomers -= 2
    room = pace.open_step(make_load(prefills=[5, 9], waiting=7), 1)
    assert room.newcomers == 3
    room.newcomers -= 3
    assert pace.open_step(make_load(decodes=[5, 9], waiting=4), 2).newcomers == 0


def test_a_static_batch_does_not_wait_for_those_who_left() -> None:
    pace = StaticBatchPace(5, 1_000)
    pace.open_step(make_load(waiting=5), 0).newcomers -= 2
    pace.open_step(make_load(prefills=[5, 9], waiting=0), 1)
    assert pace.open_step(make_load(decodes=[5, 9], waiting=3), 2).newcomers == 0


def test_an_idle_static_batch_asks_for_no_wake() -> None:
    room = StaticBatchPace(5, 1_000).open_step(make_load(), 7)
    assert (room.newcomers, room.wake_ns) == (0, 0)


@pytest.mark.parametrize("make", [lambda: FixedPace(9), lambda: LoadHeuristicPace(9)])
def test_only_static_batches_close_the_door(make: type[Pace]) -> None:
    room = make().open_step(make_load(decodes=[5], waiting=3), 0)
    assert room.newcomers > 1_000_000
    assert room.wake_ns == 0


def test_sizes_of_nothing_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="step_tokens: must be at least 1, not 0"):
        FixedPace(0)
    with pytest.raises(InvalidParameter, match="chunk_tokens: must be at least 2, not 1"):
        LoadHeuristicPace(1)
    with pytest.raises(InvalidParameter, match="batch_size: must be at least 1, not 0"):
        StaticBatchPace(0, 5)
    with pytest.raises(InvalidParameter, match="batch_timeout_ns: must be at least 0, not -1"):
        StaticBatchPace(4, -1)
