"""Routers: who gets the next request, by what was sent and has ended, and by nothing else."""

from __future__ import annotations

import random

import pytest

from twostroke.errors import InvalidParameter
from twostroke.sim.arrivals import Arrival
from twostroke.sim.routers import (
    ROUTERS,
    LeastLoaded,
    PrefixAware,
    RoundRobin,
    count_tokens,
    make_router,
)


def ask(prompt_tokens: int = 10, new_tokens: int = 10, prefix: tuple[int, ...] = ()) -> Arrival:
    """An arrival; its time does not matter to a router."""
    return Arrival(0, prompt_tokens, new_tokens, prefix, 16)


def test_round_robin_takes_turns_and_leaves_out_the_closed() -> None:
    router = RoundRobin(3)
    assert [router.choose(ask()) for _ in range(4)] == [0, 1, 2, 0]
    router.close(1)
    assert [router.choose(ask()) for _ in range(3)] == [2, 0, 2]
    router.close(0)
    router.close(2)
    assert router.choose(ask()) == -1


@pytest.mark.parametrize("seed", range(5))
def test_least_loaded_never_chooses_another_than_the_least(seed: int) -> None:
    draw, router, loads = random.Random(seed), LeastLoaded(7, count_tokens), [0] * 7
    sent: list[tuple[int, Arrival]] = []
    for _ in range(2_000):
        if sent and draw.random() < 0.5:
            replica, arrival = sent.pop(draw.randrange(len(sent)))
            router.end(replica, arrival)
            loads[replica] -= count_tokens(arrival)
        else:
            arrival = ask(draw.randrange(1, 50), draw.randrange(1, 50))
            replica = router.choose(arrival)
            assert replica == loads.index(min(loads))
            loads[replica] += count_tokens(arrival)
            sent.append((replica, arrival))


def test_a_closed_replica_is_never_least_loaded() -> None:
    for router in (LeastLoaded(2), PrefixAware(2)):
        router.close(0)
        assert [router.choose(ask()) for _ in range(3)] == [1, 1, 1]
        router.end(1, ask())
        router.close(1)
        assert router.choose(ask()) == -1


def test_prompts_with_a_prefix_in_common_stay_together() -> None:
    router = PrefixAware(4)
    first = router.choose(ask(64, 1, (1, 2, 3, 4)))
    router.choose(ask(64, 1, (7, 8)))
    router.end(first, ask(64, 1, (1, 2, 3, 4)))
    assert router.choose(ask(64, 1, (1, 2, 9))) == first


def test_a_prefix_is_left_when_its_replica_has_much_more_to_do() -> None:
    router = PrefixAware(2)
    assert router.choose(ask(32, 100, (1, 2))) == 0
    assert router.choose(ask(32, 10, (1, 2))) == 1


def test_the_memory_of_prefixes_is_bounded_and_forgets_the_oldest() -> None:
    router = PrefixAware(3, most=4)
    assert router.choose(ask(32, 1, (1, 2))) == 0
    router.end(0, ask(32, 1, (1, 2)))
    for part in range(10, 14):
        replica = router.choose(ask(32, 1, (part,)))
        router.end(replica, ask(32, 1, (part,)))
    router.choose(ask(1, 1))  # replica 0 has something to do now
    assert router.choose(ask(32, 1, (1, 2))) == 1


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_made_by_its_name(name: str) -> None:
    assert make_router(name, 3).choose(ask()) == 0


def test_an_unknown_router_and_no_replica_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="round-robin, least-requests"):
        make_router("random", 3)
    with pytest.raises(InvalidParameter, match="replicas"):
        make_router("round-robin", 0)
