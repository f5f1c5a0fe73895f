"""One random world for the deterministic simulation: everything that will happen, from a seed.

Owns the drawing, and what each policy promises about who may overtake whom. A scene is plain data
but for its policies, which remember and so are made for one run. Sizes are small, so that every
limit is met often.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from scheduler_fuzz import VOCAB_SIZE, draw_config, draw_policies, draw_request
from scheduler_model import RandomDrafter
from step_costs import LinearStepCost
from twostroke.core.admission import find_rejection
from twostroke.core.policy import Policies
from twostroke.core.types import Request, SchedulerConfig
from twostroke.policies.names import ORDERS, PACES, PolicyChoice, build_policies
from twostroke.policies.target import BLOCK_TOKENS
from twostroke.sim.faults import Fault, FaultRates, StepDies, draw_faults

# What an executor may answer that no plan of ours asked for.
HARMS = (
    "refuses", "short", "other_step", "next_step", "bad_token", "twice", "no_answer", "too_many",
    "one_more_token", "late",
)  # fmt: skip
BLOCK_BYTES = 8
NOBODY: tuple[int, ...] = (1 << 62,)
Ranks = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Somebody gives up at `time_ns`: the request or one continuation, which `pick` chooses."""

    time_ns: int
    pick: int
    one: bool
    stops: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a run follows from.

    arrivals: (time, request, stop token or -1 where its text is a stop string). choice: None where
    the policies are the fakes of the scheduler's own fuzz. replacements: executors that may be lost
    before the last; None for no end. harms: by number of the step started, one of HARMS. lazy: how
    often, of 100 events, the loop is not pumped at once. closes_ns: the engine is closed then.
    """

    seed: int
    config: SchedulerConfig
    choice: PolicyChoice | None
    policies: Policies
    arrivals: tuple[tuple[int, Request, int], ...]
    cancels: tuple[Cancel, ...]
    faults: tuple[Fault, ...]
    harms: dict[int, str]
    max_in_flight: int
    max_iterations: int
    replacements: int | None
    deadline_ns: int | None
    restart_ns: int
    lazy: int
    closes_ns: int

    def get_lane(self, request: Request) -> str:
        """Among whom the order holds: all, or with accounts those of one tenant."""
        return request.tenant if self.policies.accounts is not None else ""

    def get_ranks(self, request: Request, arrived_ns: int) -> Ranks:
        """The least and the greatest rank that the policy may give a request that waits."""
        order = "" if self.choice is None else self.choice.order
        return _RANKS[order](self, request, arrived_ns)


def _rank_alike(scene: Scene, request: Request, arrived_ns: int) -> Ranks:
    return (), ()


def _rank_ageing(scene: Scene, request: Request, arrived_ns: int) -> Ranks:
    assert scene.choice is not None
    rank = (arrived_ns + request.priority * scene.choice.age_ns,)
    return rank, rank


def _rank_shortest(scene: Scene, request: Request, arrived_ns: int) -> Ranks:
    if request.expected_tokens:
        rank = (min(request.expected_tokens, request.max_new_tokens),)
        return rank, rank
    return (1,), (request.max_new_tokens,)


def _rank_deadline(scene: Scene, request: Request, arrived_ns: int) -> Ranks:
    assert scene.choice is not None
    horizon_ns = scene.choice.horizon_ns
    due_ns = arrived_ns + (request.ttft_ns or horizon_ns)
    return (due_ns,), (due_ns + (horizon_ns if request.ttft_ns else 0),)


def _rank_unknown(scene: Scene, request: Request, arrived_ns: int) -> Ranks:
    """Of a fake order: by priority, or by no promise at all."""
    if scene.policies.order.changes:
        return (-(1 << 62),), NOBODY
    return (request.priority,), (request.priority,)


_RANKS: dict[str, Callable[[Scene, Request, int], Ranks]] = {
    "first-come": _rank_alike,
    "fair": _rank_alike,
    "priority": _rank_ageing,
    "shortest": _rank_shortest,
    "deadline": _rank_deadline,
    "": _rank_unknown,
}


def draw_scene(seed: int, choice: PolicyChoice | None = None) -> Scene:
    """The scene of a seed; with `choice`, the same but for its policies."""
    rng = random.Random(f"scene {seed}")
    config = draw_config(rng)
    if rng.random() < 0.3:  # roomy, so that there are long strides and big batches too
        config = replace(config, num_blocks=rng.randint(15, 60), reserve_tokens=0)
    drawn = draw_choice(rng)
    choice = choice or (drawn if rng.random() < 0.75 else None)
    if choice is not None and choice.pace == "target":
        config = replace(config, step_tokens=max(BLOCK_TOKENS, config.step_tokens))
    arrivals = draw_arrivals(rng, config)
    end_ns = arrivals[-1][0] + 60_000
    deadline_ns = rng.choice([None, 2_500, 20_000, 100_000])
    faulty = rng.random() < 0.6
    return Scene(
        seed=seed,
        config=config,
        choice=choice,
        policies=make_policies(rng, config, choice),
        arrivals=arrivals,
        cancels=tuple(
            Cancel(rng.randint(0, end_ns), rng.randrange(1 << 20), *rng.choices([True, False], k=2))
            for _ in range(rng.choice([0, 0, 1, 3, 9]))
        ),
        faults=tuple(_draw_faults(rng, end_ns, deadline_ns)) if faulty else (),
        harms=_draw_harms(rng) if faulty else {},
        max_in_flight=2 if config.plans_ahead else rng.choice([1, 2]),
        max_iterations=rng.choice([1, 1, 3, 100]),
        replacements=rng.choice([0, 1, 3, None, None, None]),
        deadline_ns=deadline_ns,
        restart_ns=rng.choice([0, 0, 5_000]),
        lazy=rng.choice([0, 0, 20, 50]),
        closes_ns=rng.randint(1, end_ns) if rng.random() < 0.05 else 0,
    )


def draw_choice(rng: random.Random) -> PolicyChoice:
    """Any order with any pace, at times on the scale of a step."""
    pace = rng.choice(PACES)
    return PolicyChoice(
        order=rng.choice(ORDERS),
        pace=pace,
        age_ns=rng.choice([1, 4_000, 100_000]),
        horizon_ns=rng.choice([5_000, 50_000]),
        fixed_tokens=rng.choice([0, 1, 6]),
        chunk_tokens=rng.choice([2, 6, 40]),
        itl_ns=rng.choice([1_400, 2_500]) if pace == "target" else 0,
        batch_size=rng.choice([1, 3]),
        batch_timeout_ns=rng.choice([0, 7_000, 25_000]),
        drafts=rng.random() < 0.2,
    )


def make_policies(
    rng: random.Random, config: SchedulerConfig, choice: PolicyChoice | None
) -> Policies:
    """New policies of the kinds chosen; now and then with a drafter that is mostly right."""
    if choice is None:
        return draw_policies(rng, config)
    block_bytes = rng.choice([0, BLOCK_BYTES, 1000])
    cost = LinearStepCost()
    policies = build_policies(
        choice, step_tokens=config.step_tokens, block_bytes=block_bytes, cost=cost
    )
    if choice.drafts and rng.random() < 0.5:
        policies = replace(policies, drafter=RandomDrafter(config))
    return policies


def draw_arrivals(
    rng: random.Random, config: SchedulerConfig
) -> tuple[tuple[int, Request, int], ...]:
    """A few requests, in bursts or one by one; some ids are used twice."""
    mean_ns = rng.choice([0, 500, 3_000, 20_000])
    time_ns, arrivals = 0, list[tuple[int, Request, int]]()
    for number in range(rng.choice([2, 5, 9, 16, 24])):
        time_ns += int(rng.expovariate(1 / mean_ns)) if mean_ns and rng.random() < 0.8 else 0
        name = number if rng.random() < 0.95 else rng.randrange(number + 1)
        request = draw_request(rng, f"r{name}", config)
        while find_rejection(request, config) and rng.random() < 0.9:
            request = draw_request(rng, f"r{name}", config)
        request = replace(
            request,
            ttft_ns=rng.choice([0, 0, 3_000, 30_000]),
            itl_ns=rng.choice([0, 0, 1_500, 4_000]),
            expected_tokens=rng.choice([0, 1, 4, 40]),
        )
        stop = rng.randrange(VOCAB_SIZE) if rng.random() < 0.15 else -1
        arrivals.append((time_ns, request, stop))
    return tuple(arrivals)


def _draw_faults(rng: random.Random, end_ns: int, deadline_ns: int | None) -> list[Fault]:
    rates = FaultRates(
        deaths=rng.choice([0, 0.5, 3]),
        hangs=0 if deadline_ns is None else rng.choice([0, 0.5, 2]),
        slowdowns=rng.choice([0, 0.5, 2]),
        jumps=rng.choice([0, 0.3, 2]),
    )
    faults = draw_faults(rng.randrange(1 << 30), 1, end_ns, rates)
    return [*faults, *(StepDies(rng.randint(1, 60), 0) for _ in range(rng.choice([0, 0, 1, 4])))]


def _draw_harms(rng: random.Random) -> dict[int, str]:
    return {rng.randint(1, 60): rng.choice(HARMS) for _ in range(rng.choice([0, 0, 1, 2, 5]))}
