"""Laws of the virtual token counter, above all the bound of its paper, on a simple server."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.errors import InvalidParameter
from twostroke.policies.accounts import VirtualTokenCounter

INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2


@dataclass(slots=True)
class Job:
    """A request of the simple server: its prompt, the tokens still to come, and those it has."""

    tenant: str
    prompt: int
    left: int
    held: int = 0


@dataclass(slots=True)
class Server:
    """Continuous batching as the paper has it: admit the least served while its request fits.

    served: weighted tokens each tenant has had, counted apart from the accounts under test.
    """

    accounts: VirtualTokenCounter
    most_held: int
    lines: dict[str, deque[Job]] = field(default_factory=dict)
    running: list[Job] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)

    def submit(self, job: Job) -> None:
        """A request joins its tenant's line."""
        self.served.setdefault(job.tenant, 0)
        if not self.lines.get(job.tenant):
            self.accounts.lift(job.tenant, [name for name, line in self.lines.items() if line])
        self.lines.setdefault(job.tenant, deque()).append(job)

    def step(self) -> None:
        """Admit what fits, then one token for each that runs."""
        held = sum(job.held for job in self.running)
        while any(self.lines.values()):
            waiting = [name for name, line in self.lines.items() if line]
            tenant = min(waiting, key=self.accounts.get_debt)
            job = self.lines[tenant][0]
            if held + job.prompt + job.left > self.most_held:
                break
            self.running.append(self.lines[tenant].popleft())
            job.held = job.prompt + job.left
            held += job.held
            self.accounts.charge(tenant, job.prompt, 0)
            self.served[tenant] += INPUT_WEIGHT * job.prompt
        for job in self.running:
            job.left -= 1
            self.accounts.charge(job.tenant, 0, 1)
            self.served[job.tenant] += OUTPUT_WEIGHT
        self.running = [job for job in self.running if job.left]


def find_widest(differences: list[int]) -> int:
    """The most that two running sums drift apart over any span of time."""
    return max(differences) - min(differences)


lengths = st.tuples(st.integers(1, 60), st.integers(1, 40))


@given(
    tenants=st.lists(st.lists(lengths, min_size=1, max_size=5), min_size=2, max_size=4),
    most_held=st.integers(100, 200),
)
@settings(max_examples=200, deadline=None)
def test_backlogged_tenants_stay_within_the_bound_of_the_paper(
    tenants: list[list[tuple[int, int]]], most_held: int
) -> None:
    server = Server(VirtualTokenCounter(INPUT_WEIGHT, OUTPUT_WEIGHT), most_held)
    names = [f"t{index}" for index in range(len(tenants))]
    sent = dict.fromkeys(names, 0)
    history: list[dict[str, int]] = []
    for _ in range(150):
        for name, kinds in zip(names, tenants, strict=True):
            # More than one step can admit, so nobody's line runs empty.
            while len(server.lines.get(name, ())) <= most_held // 2:
                prompt, new = kinds[sent[name] % len(kinds)]
                server.submit(Job(name, prompt, new))
                sent[name] += 1
        server.step()
        history.append(dict(server.served))
    longest = max(prompt for kinds in tenants for prompt, _ in kinds)
    bound = 2 * max(INPUT_WEIGHT * longest, OUTPUT_WEIGHT * most_held)
    for f in names:
        for g in names:
            assert find_widest([each[f] - each[g] for each in history]) <= bound


def test_ten_times_the_requests_bring_no_more_service() -> None:
    server = Server(VirtualTokenCounter(), 300)
    for _ in range(200):
        server.submit(Job("greedy", 20, 20))
    for _ in range(20):
        server.submit(Job("modest", 20, 20))
    while server.lines["modest"]:
        server.step()
    assert abs(server.served["greedy"] - server.served["modest"]) <= 2 * 2 * 300


def test_staying_away_saves_up_nothing() -> None:
    accounts = VirtualTokenCounter()
    accounts.lift("busy", [])
    accounts.charge("busy", 0, 5_000)
    accounts.lift("back", ["busy"])
    assert accounts.get_debt("back") == accounts.get_debt("busy") == 10_000


def test_who_joins_an_empty_line_is_lifted_to_the_last_that_left_it() -> None:
    accounts = VirtualTokenCounter()
    accounts.lift("first", [])
    accounts.charge("first", 100, 0)
    accounts.lift("second", [])
    assert accounts.get_debt("second") == 100


def test_a_lift_never_lowers_a_counter() -> None:
    accounts = VirtualTokenCounter()
    accounts.lift("heavy", [])
    accounts.charge("heavy", 70, 0)
    accounts.lift("light", ["heavy"])
    accounts.charge("heavy", 0, 50)
    accounts.lift("heavy", ["light"])
    assert (accounts.get_debt("light"), accounts.get_debt("heavy")) == (70, 170)


def test_the_least_of_those_who_wait_decides() -> None:
    accounts = VirtualTokenCounter()
    for name, debt in (("a", 30), ("b", 20), ("c", 40)):
        accounts.charge(name, debt, 0)
    accounts.lift("new", ["a", "b", "c"])
    assert accounts.get_debt("new") == 20


def test_prompts_and_new_tokens_have_their_weights() -> None:
    accounts = VirtualTokenCounter(3, 5)
    accounts.charge("a", 10, 2)
    assert accounts.get_debt("a") == 40


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=60))
def test_forgetting_changes_no_debt_that_counts(calls: list[tuple[int, int]]) -> None:
    # One forgets as early as it can, the other never; both say the same of whoever joins.
    hasty, keeper = VirtualTokenCounter(), VirtualTokenCounter()
    for tenant, tokens in calls:
        name = f"t{tenant}"
        for accounts in (hasty, keeper):
            accounts.lift(name, [])
            accounts.charge(name, tokens + 1, 0)
        hasty._away = {k: v for k, v in (hasty._away | hasty._near).items() if v > hasty._level}
        hasty._near = {}
        hasty.lift("probe", [])
        keeper.lift("probe", [])
        assert hasty.get_debt("probe") == keeper.get_debt("probe")


def test_tenants_long_gone_are_forgotten() -> None:
    accounts = VirtualTokenCounter()
    for index in range(20_000):
        accounts.lift(f"t{index}", [])
        accounts.charge(f"t{index}", 10, 10)
    assert len(accounts._near) + len(accounts._away) <= 3 * 1_024


def test_memory_is_bounded_even_when_nobody_falls_below_the_level() -> None:
    accounts = VirtualTokenCounter()
    for index in range(80_000):
        accounts.charge(f"t{index}", 0, 10)
    assert len(accounts._near) + len(accounts._away) <= 65 * 1_024 + 1


def test_weights_that_count_nothing_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="weights: must be at least 0 and not both 0"):
        VirtualTokenCounter(0, 0)
