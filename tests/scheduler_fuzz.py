"""Random inputs for the scheduler, from one seed: shared by the fuzz tests and the digest test."""

from __future__ import annotations

import random

from scheduler_model import Driver
from twostroke.core.types import Finished, Idle, Request, SamplingSpec, SchedulerConfig

VOCAB_SIZE = 17


def draw_config(rng: random.Random) -> SchedulerConfig:
    """Small sizes, so that every limit is met often."""
    return SchedulerConfig(
        num_blocks=rng.randint(2, 14),
        block_tokens=rng.randint(1, 5),
        step_tokens=rng.choice([1, 2, 5, 8, 16, 64]),
        max_rows=rng.randint(1, 7),
        context_tokens=rng.randint(3, 32),
        vocab_size=VOCAB_SIZE,
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
        prompt=tuple(rng.randrange(VOCAB_SIZE) for _ in range(length)),
        max_new_tokens=rng.choice([1, 2, 5, 12, 1000, 1000]),
        sampling=sampling,
        n=rng.choice([1, 1, 1, 2, 3, 5]),
        stop_tokens=frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 1, 3]))),
        min_new_tokens=rng.choice([0, 0, 1, 4]),
        prompt_logprobs=rng.choice([None, None, 3]),
        priority=rng.choice([0, 0, 0, -1, 1]),
    )


class RandomRun:
    """A driver fed with random inputs."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.driver = Driver(draw_config(self.rng))
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
