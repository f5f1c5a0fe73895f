"""Random inputs for the scheduler, from one seed: shared by the fuzz tests and the digest test."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler_model import Driver, RandomDrafter
from twostroke.core.policy import Load, Policies, PriorityThenArrival
from twostroke.core.types import (
    Finished,
    Idle,
    Request,
    SamplingSpec,
    SchedulerConfig,
    StepOutcome,
    StepPlan,
)

VOCAB_SIZE = 17


def draw_config(rng: random.Random) -> SchedulerConfig:
    """Small sizes, so that every limit is met often."""
    num_blocks, block_tokens = rng.randint(2, 14), rng.randint(1, 5)
    reserve_tokens = min(rng.choice([0, 0, 0, 4]), num_blocks * block_tokens)
    return SchedulerConfig(
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        step_tokens=rng.choice([1, 2, 5, 8, 16, 64]),
        max_rows=rng.randint(1, 7),
        context_tokens=rng.randint(3, 32),
        vocab_size=VOCAB_SIZE,
        host_blocks=rng.choice([0, 0, 3, 12]),
        watermark_blocks=rng.choice([0, 0, 1, 4]),
        reserve_tokens=reserve_tokens,
        cache_seed="" if reserve_tokens else rng.choice(["", "model"]),
        plans_ahead=rng.random() < 0.6,
    )


class FakeAccounts:
    """Counts what each tenant had."""

    def __init__(self) -> None:
        self.debts: dict[str, int] = {}

    def lift(self, tenant: str, waiting: Iterable[str]) -> None:
        others = [self.debts.get(one, 0) for one in waiting if one != tenant]
        self.debts[tenant] = max(self.debts.get(tenant, 0), min(others, default=0))

    def get_debt(self, tenant: str) -> int:
        return self.debts[tenant]

    def charge(self, tenant: str, prompt_tokens: int, new_tokens: int) -> None:
        self.debts[tenant] = self.debts.get(tenant, 0) + prompt_tokens + 2 * new_tokens


class FewestLeft:
    """An order whose ranks change with every token and now and then with time."""

    changes = True

    def rank(self, request: Request, computed: int, new_tokens: int, now: int) -> tuple[int, ...]:
        return (now // 40_000 * request.priority, request.max_new_tokens - new_tokens, -computed)

    def end(self, request: Request, new_tokens: int) -> None:
        assert 0 <= new_tokens <= request.max_new_tokens


@dataclass
class FakeRoom:
    """So many prompt tokens, each row cut to a length that depends on where it starts."""

    newcomers: int
    left: int
    wake_ns: int = 0

    def get_tokens(self, start: int, wanted: int) -> int:
        return max(0, min(wanted, self.left, 1 + start % 3))

    def add(self, start: int, tokens: int) -> None:
        self.left -= tokens


class FakePace:
    """A room that shrinks with the load, but never to nothing when nobody else would proceed."""

    def open_step(self, load: Load, now: int) -> FakeRoom:
        busy = len(load.decodes)
        assert load.waiting == 0 or load.head is not None
        alone = not busy and not load.prefills
        return FakeRoom(1 if alone else now // 1000 % 3, 1 if busy % 2 else 6)

    def note_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        assert plan.step == outcome.step


def draw_policies(rng: random.Random, config: SchedulerConfig) -> Policies:
    """Any mixture of choices."""
    return Policies(
        order=rng.choice([PriorityThenArrival, FewestLeft])(),
        accounts=rng.choice([None, FakeAccounts()]),
        pace=rng.choice([None, FakePace()]),
        drafter=rng.choice([None, None, RandomDrafter(config)]),
        prefers_swap=lambda tokens, blocks: tokens % 3 > 0,
    )


def draw_request(rng: random.Random, id: str, config: SchedulerConfig) -> Request:
    """Mostly sound requests; now and then one that must be rejected."""
    length = rng.randint(1, config.context_tokens)
    sampling = SamplingSpec(
        temperature=1.0,
        presence_penalty=rng.choice([0.0, 0.5]),
        seed=rng.randrange(1 << 30),
        logprobs=rng.choice([None, None, 2]),
    )
    return Request(
        id=id,
        prompt=draw_prompt(rng, length),
        max_new_tokens=rng.choice([1, 2, 5, 12, 1000, 1000]),
        sampling=sampling,
        n=rng.choice([1, 1, 1, 2, 3, 5]),
        stop_tokens=frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 1, 3]))),
        min_new_tokens=rng.choice([0, 0, 1, 4]),
        prompt_logprobs=rng.choice([None, None, 3]),
        priority=rng.choice([0, 0, 0, -1, 1]),
        tenant=rng.choice(["", "a", "b"]),
        cache_scope=rng.choice(["", "", "salt"]),
    )


def draw_prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    """Often a beginning that others have too, and then something of its own."""
    shared = rng.choice([0, length // 2, length])
    start = rng.choice([3, 8])
    own = [rng.randrange(VOCAB_SIZE) for _ in range(length - shared)]
    return (*((start + place) % VOCAB_SIZE for place in range(shared)), *own)


class RandomRun:
    """A driver fed with random inputs."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        config = draw_config(self.rng)
        self.driver = Driver(config, draw_policies(self.rng, config))
        self.num_requests = 0

    def step(self) -> None:
        """One random input."""
        rng, driver = self.rng, self.driver
        choice = rng.random()
        if choice < 0.12:
            self._submit()
        elif choice < 0.16:
            self._cancel()
        elif choice < 0.52:
            driver.plan(rng.choice([1, 1, 2, 7, 100]))
            if driver.config.plans_ahead:
                driver.plan()
            if rng.random() < 0.3:
                driver.run_ahead()
        elif choice < 0.90:
            if driver.flights:
                driver.commit()
        elif choice < 0.94:
            if driver.flights:
                place = rng.randrange(len(driver.flights))
                driver.lose(place, [rng.randrange(3), rng.randrange(3)])
        elif choice < 0.97:
            self._transfer()
        elif choice < 0.975:
            self.driver.release(self._pick())

    def _submit(self) -> None:
        # Now and then an id is used again, while it is live or after it ended.
        fresh = not self.num_requests or self.rng.random() < 0.9
        number = self.num_requests if fresh else self.rng.randrange(self.num_requests)
        self.num_requests += fresh
        self.driver.submit(draw_request(self.rng, f"r{number}", self.driver.config))

    def _pick(self) -> str:
        live = self.driver.get_live()
        return self.rng.choice(live).request if live else "nobody"

    def _cancel(self) -> None:
        if self.rng.random() < 0.5:
            self.driver.cancel(self._pick())
        else:
            self.driver.cancel(self._pick(), self.rng.randrange(3), Finished("stop"))

    def _transfer(self) -> None:
        driver, rng = self.driver, self.rng
        if driver.reserved and rng.random() < 0.7:
            id = rng.choice(list(driver.reserved))
            most = len(driver.reserved[id][1])
            driver.attach(id, rng.choice([0, most, rng.randint(0, most)]))
            return
        live = [key for key in driver.get_live() if key.index == 0]
        if live:
            key = rng.choice(live)
            driver.reserve(key.request, rng.randint(1, len(driver.told[key].tokens)))


def run_random(seed: int, num_inputs: int = 120) -> Driver:
    """A whole random run, driven to its end; returns its driver."""
    run = RandomRun(seed)
    for _ in range(num_inputs):
        run.step()
    run.driver.drain()
    assert isinstance(run.driver.plan(), Idle)
    return run.driver
