"""A hypothesis state machine over the scheduler's seven inputs.

After every input the invariants are checked; every row is run on a model of KV contents, and every
output compared with the request computed alone (see scheduler_model.py). At the end everything is
driven to its end. `--hypothesis-profile=fuzz` makes thousands of runs.
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from scheduler_fuzz import FakeAccounts, FakePace, FewestLeft
from scheduler_model import Driver, RandomDrafter
from twostroke.core.policy import Policies, PriorityThenArrival
from twostroke.core.types import Finished, Idle, Request, SamplingSpec, SchedulerConfig

VOCAB_SIZE = 17
IDS = st.sampled_from([f"r{number}" for number in range(8)])

configs = st.builds(
    SchedulerConfig,
    num_blocks=st.integers(1, 14),
    block_tokens=st.integers(1, 5),
    step_tokens=st.integers(1, 40),
    max_rows=st.integers(1, 7),
    context_tokens=st.integers(2, 32),
    vocab_size=st.just(VOCAB_SIZE),
    host_blocks=st.sampled_from([0, 3, 9]),
    watermark_blocks=st.sampled_from([0, 2]),
    cache_seed=st.sampled_from(["", "model"]),
    plans_ahead=st.booleans(),
)
choices = st.builds(
    Policies,
    order=st.builds(PriorityThenArrival) | st.builds(FewestLeft),
    accounts=st.none() | st.builds(FakeAccounts),
    pace=st.none() | st.builds(FakePace),
    prefers_swap=st.sampled_from([lambda tokens, blocks: True, lambda tokens, blocks: False]),
)
requests = st.builds(
    Request,
    id=IDS,
    prompt=st.lists(st.integers(0, VOCAB_SIZE), max_size=20).map(tuple)
    | st.integers(1, 20).map(lambda length: tuple(range(length))).filter(len),
    max_new_tokens=st.integers(0, 30),
    sampling=st.builds(
        SamplingSpec,
        presence_penalty=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 9),
        logprobs=st.sampled_from([None, 2]),
    ),
    n=st.integers(1, 4),
    stop_tokens=st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=2),
    min_new_tokens=st.integers(0, 3),
    prompt_logprobs=st.sampled_from([None, 1]),
    priority=st.integers(-1, 1),
    tenant=st.sampled_from(["", "a"]),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Any inputs in any order; the driver's checks are the laws."""

    driver: Driver

    @initialize(config=configs, policies=choices, drafts=st.booleans())
    def start(self, config: SchedulerConfig, policies: Policies, drafts: bool) -> None:
        drafter = RandomDrafter(config) if drafts else None
        self.driver = Driver(config, replace(policies, drafter=drafter))

    @rule(request=requests)
    def submit(self, request: Request) -> None:
        self.driver.submit(request)

    @rule(id=IDS)
    def cancel(self, id: str) -> None:
        self.driver.cancel(id)

    @rule(id=IDS, index=st.integers(0, 3))
    def stop_one(self, id: str, index: int) -> None:
        self.driver.cancel(id, index, Finished("stop"))

    @rule(ahead=st.booleans(), iterations=st.sampled_from([1, 1, 3, 50]))
    def plan(self, ahead: bool, iterations: int) -> None:
        self.driver.plan(iterations)
        if ahead:
            self.driver.run_ahead()

    @rule()
    def commit(self) -> None:
        if self.driver.flights:
            self.driver.commit()

    @rule(steps=st.integers(1, 6), kept=st.sampled_from([0, 0, 1]))
    def advance(self, steps: int, kept: int) -> None:
        for _ in range(steps):
            if isinstance(self.driver.plan(), Idle):
                kept = 0
            while len(self.driver.flights) > kept:
                self.driver.commit()

    @rule(place=st.integers(0, 1), damages=st.tuples(st.integers(0, 2), st.integers(0, 2)))
    def lose(self, place: int, damages: tuple[int, int]) -> None:
        if self.driver.flights:
            self.driver.lose(min(place, len(self.driver.flights) - 1), damages)

    @rule(id=IDS, share=st.floats(0, 1))
    def reserve(self, id: str, share: float) -> None:
        live = [key for key in self.driver.get_live() if key.request == id and key.index == 0]
        if live and id not in self.driver.reserved:
            self.driver.reserve(id, round(share * len(self.driver.told[live[0]].tokens)))

    @rule(share=st.floats(0, 1))
    def attach(self, share: float) -> None:
        if self.driver.reserved:
            id = min(self.driver.reserved)
            self.driver.attach(id, round(share * len(self.driver.reserved[id][1])))

    @rule(id=IDS)
    def release(self, id: str) -> None:
        self.driver.release(id)

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=max(250, settings.default.max_examples), stateful_step_count=40, deadline=None
)
