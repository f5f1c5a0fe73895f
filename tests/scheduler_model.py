"""A fake executor for the scheduler that models KV contents, and a driver that checks everything.

A KV cell holds a chain: a number that stands for a token and everything before it. A row is right
only if every position of its block table, up to its own end, holds the chain of its sequence's
tokens; so any block reused, shared, copied or kept wrongly shows as a wrong chain. Tokens are drawn
from the chain alone, so what a request yields cannot depend on how it was scheduled, and the driver
compares it with the same request computed alone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twostroke.core.policy import Policies
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    PENDING,
    Accepted,
    BlockId,
    Cancelled,
    Ending,
    Finished,
    Idle,
    Preempted,
    Rejected,
    Request,
    Row,
    RowResult,
    SchedulerConfig,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    Token,
    TokenLogprob,
    TokensEmitted,
    Update,
)
from twostroke.errors import InvalidParameter
from twostroke.sim.invariants import check

MODULUS = (1 << 61) - 1
GARBAGE = -1


def extend_chain(chain: list[int], tokens: Sequence[Token]) -> None:
    """Append the chain numbers of `tokens`."""
    last = chain[-1] if chain else 7
    for token in tokens:
        last = (last * 1_000_003 + token + 1) % MODULUS
        chain.append(last)


def draw_token(request: Request, index: int, chain: int, vocab_size: int) -> Token:
    """The token that follows a chain: data in, data out, as with the real counter-based draw."""
    return (chain ^ (request.sampling.seed * 7919 + index * 104_729)) * 48_271 % 9973 % vocab_size


def score(chain: int) -> float:
    """A log-probability that tells positions apart."""
    return -float(chain % 10_007)


def compute_alone(
    request: Request, index: int, config: SchedulerConfig
) -> tuple[list[Token], Finished]:
    """What continuation `index` yields by itself, and how it finishes."""
    chain: list[int] = []
    extend_chain(chain, request.prompt)
    tokens: list[Token] = []
    pool_tokens = config.num_blocks * config.block_tokens
    while True:
        tokens.append(draw_token(request, index, chain[-1], config.vocab_size))
        extend_chain(chain, tokens[-1:])
        if tokens[-1] in request.stop_tokens and len(tokens) >= request.min_new_tokens:
            return tokens, Finished("stop")
        is_full = len(chain) >= config.context_tokens or len(chain) > pool_tokens
        if is_full or len(tokens) >= request.max_new_tokens:
            return tokens, Finished("length")


@dataclass(slots=True)
class Told:
    """What the driver knows of one sequence from the scheduler's updates alone."""

    request: Request
    index: int
    tokens: list[Token]
    chain: list[int]
    emitted: int = 0
    ending: Ending | None = None
    got_scored: bool = False


@dataclass(slots=True)
class Running:
    """A step in flight: what is known of each row's sequence, and the outcome once computed."""

    plan: StepPlan
    told: list[Told]
    outcome: StepOutcome | None = None


class FakeExecutor:
    """KV cells, and steps run on them in order."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.cells = [[GARBAGE] * config.block_tokens for _ in range(config.num_blocks)]
        self.host = [[GARBAGE] * config.block_tokens for _ in range(config.host_blocks)]
        self.last_step = -1
        self.last_drawn: dict[SequenceId, Token] = {}  # by that step, and no other

    def write(self, blocks: Sequence[BlockId], start: int, chain: Sequence[int]) -> None:
        """Put chain numbers at positions from `start` on."""
        for position, value in enumerate(chain, start):
            block, offset = divmod(position, self.config.block_tokens)
            self.cells[blocks[block]][offset] = value

    def run(self, step: Running, made: int = 0) -> StepOutcome:
        """Move blocks, write every row's KV, then check all that every row can see.

        made: iterations; 0 leaves their number to the executor, which may make fewer than asked.
        """
        plan = step.plan
        for move in plan.swaps_out:
            self.host[move.host] = list(self.cells[move.block])
        for move in plan.swaps_in:
            self.cells[move.block] = list(self.host[move.host])
        for copy in plan.copies:
            self.cells[copy.target] = list(self.cells[copy.source])
        rows = list(zip(plan.rows, step.told, strict=True))
        chains = [self._get_chain(plan.step, row, told) for row, told in rows]
        for (row, _), chain in zip(rows, chains, strict=True):
            extend_chain(chain, row.tokens[len(row.tokens) - row.drafts :])
            self.write(row.blocks, row.start, chain[row.start :])
        results = [
            self._answer(row, told, chain) for (row, told), chain in zip(rows, chains, strict=True)
        ]
        made = made or 1 + plan.step % plan.iterations
        for _ in range(made - 1):
            for place, ((row, told), chain) in enumerate(zip(rows, chains, strict=True)):
                extend_chain(chain, results[place].tokens[-1:])
                self.write(row.blocks, len(chain) - 1, chain[-1:])
                more = self._answer(replace(row, scored=()), told, chain)
                last = results[place]
                results[place] = replace(
                    last, tokens=last.tokens + more.tokens, logprobs=last.logprobs + more.logprobs
                )
        self.last_step = plan.step
        self.last_drawn = {one.sequence: one.tokens[-1] for one in results if one.tokens}
        times = (1000,) * made if plan.iterations > 1 else ()
        step.outcome = StepOutcome(plan.step, tuple(results), 1000 * made, times)
        return step.outcome

    def damage(self, step: Running) -> None:
        """Leave rubbish wherever the step was allowed to write."""
        rubbish = [GARBAGE] * self.config.block_tokens
        for move in step.plan.swaps_out:
            self.host[move.host] = list(rubbish)
        for block in (
            *(move.block for move in step.plan.swaps_in),
            *(copy.target for copy in step.plan.copies),
        ):
            self.cells[block] = list(rubbish)
        for row in step.plan.rows:
            tokens = len(row.tokens) + step.plan.iterations - 1
            self.write(row.blocks, row.start, [GARBAGE] * tokens)

    def _get_chain(self, step: int, row: Row, told: Told) -> list[int]:
        """The chain of a row's tokens but the drafts; one pending is taken from the step before."""
        if row.tokens != (PENDING,):
            return told.chain[: row.start + len(row.tokens) - row.drafts]
        assert self.last_step == step - 1, f"{row.sequence}: its token is not of the step before"
        chain = told.chain[: row.start]
        assert len(chain) == row.start, f"{row.sequence}: two tokens ahead"
        extend_chain(chain, [self.last_drawn[row.sequence]])
        return chain

    def _answer(self, row: Row, told: Told, chain: list[int]) -> RowResult:
        """What a row draws, whose tokens so far are those of `chain`."""
        end, block_tokens = len(chain), self.config.block_tokens
        seen = [value for block in row.blocks for value in self.cells[block]][:end]
        assert len(row.blocks) * block_tokens >= end, f"{row.sequence}: too few blocks"
        assert seen == chain, f"{row.sequence}: its blocks do not hold its tokens"
        scored = tuple(
            TokenLogprob(token, score(chain[position]))
            for position, token in enumerate(row.scored, row.start)
        )
        if row.sampling is None:
            return RowResult(row.sequence, scored=scored)
        drafts = row.tokens[len(row.tokens) - row.drafts :]
        tokens: list[Token] = []
        for place in range(row.drafts + 1):
            at = end - 1 - row.drafts + place
            tokens.append(draw_token(told.request, told.index, chain[at], self.config.vocab_size))
            if place < row.drafts and tokens[-1] != drafts[place]:
                break
        wanted = row.sampling.logprobs is not None
        logprobs = tuple(TokenLogprob(token, -1.0) for token in tokens) if wanted else ()
        return RowResult(row.sequence, tuple(tokens), len(tokens) - 1, logprobs, scored)


class RandomDrafter:
    """Drafts by a hash of what it is shown: often right, since it knows how tokens are drawn."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.requests: dict[str, Request] = {}
        self.counts: dict[SequenceId, tuple[int, int]] = {}

    def propose(self, id: SequenceId, tokens: Sequence[Token], most: int) -> tuple[Token, ...]:
        chain: list[int] = []
        extend_chain(chain, tokens)
        drafts: list[Token] = []
        while len(drafts) < min(most, chain[-1] % 5):
            right = chain[-1] % 7 < 5
            request = self.requests[id.request]
            token = draw_token(request, id.index, chain[-1], self.config.vocab_size)
            drafts.append(token if right else chain[-1] % self.config.vocab_size)
            extend_chain(chain, drafts[-1:])
        return tuple(drafts)

    def settle(self, id: SequenceId, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted
        before = self.counts.get(id, (0, 0))
        self.counts[id] = before[0] + drafted, before[1] + accepted

    def forget(self, id: SequenceId) -> None:
        self.counts.pop(id, None)


class Driver:
    """A scheduler and a fake executor behind one set of inputs; every answer is checked.

    Steps run when they are committed, the latest moment, unless `run_ahead` runs them earlier.
    """

    def __init__(self, config: SchedulerConfig, policies: Policies | None = None) -> None:
        self.config = config
        self.scheduler = Scheduler(config, policies)
        self.executor = FakeExecutor(config)
        self.policies = policies
        self.told: dict[SequenceId, Told] = {}
        self.flights: deque[Running] = deque()
        self.reserved: dict[str, tuple[tuple[BlockId, ...], list[int]]] = {}
        self.num_ended = 0
        self.num_sequences = 0
        self.plans: list[StepPlan] = []
        self.now = 0
        self._digest = hashlib.sha256()

    # ---- inputs ---------------------------------------------------------------------------------

    def submit(self, request: Request) -> Accepted | Rejected:
        answer = self.scheduler.submit(request, self._tick())
        if isinstance(answer, Accepted):
            if self.policies is not None and isinstance(self.policies.drafter, RandomDrafter):
                self.policies.drafter.requests[request.id] = request
            self.num_sequences += request.num_open
            for index in range(request.n):
                if request.resumed and request.resumed[index] is None:
                    continue
                chain: list[int] = []
                tokens = [*request.prompt, *request.get_resumed(index)]
                extend_chain(chain, tokens)
                told = Told(request, index, tokens, chain)
                self.told[SequenceId(request.id, index)] = told
        self._checked(answer)
        return answer

    def cancel(
        self, id: str, index: int | None = None, ending: Ending | None = None
    ) -> tuple[Update, ...]:
        ending = ending or Cancelled()
        expected = [key for key in self.get_live() if key.request == id]
        expected = [key for key in expected if index in (None, key.index)]
        updates = self.scheduler.cancel(id, self._tick(), index=index, ending=ending)
        self._hear(updates)
        assert [self.told[key].ending for key in expected] == [ending] * len(expected)
        return updates

    def plan(self, iterations: int = 1) -> StepPlan | Idle:
        plan = self.scheduler.plan(self._tick(), iterations)
        assert not isinstance(plan, StepPlan) or plan.iterations <= iterations
        if isinstance(plan, StepPlan):
            self.plans.append(plan)
            self.flights.append(Running(plan, [self.told[row.sequence] for row in plan.rows]))
            check_plan(self.flights, self.told, self.config)
        else:
            assert plan.in_flight == len(self.flights)
        self._checked(plan)
        return plan

    def run_ahead(self) -> None:
        """Run every step in flight now, before its commit."""
        for step in self.flights:
            if step.outcome is None:
                self.executor.run(step)

    def commit(self) -> tuple[Update, ...]:
        """Commit the oldest step in flight."""
        step = self.flights[0]
        outcome = step.outcome or self.executor.run(step)
        updates = self.scheduler.commit(outcome, self._tick())
        self.flights.popleft()
        self._hear(updates)
        return updates

    def lose(self, place: int, damages: Sequence[int]) -> tuple[Update, ...]:
        """Lose the step at `place` in flight; damages: 0 not run, 1 run, 2 rubbish, per step."""
        lost = [self.flights.pop() for _ in range(len(self.flights) - place)][::-1]
        ran = all(step.outcome is not None for step in self.flights)
        for step, damage in zip(lost, damages, strict=False):
            if ran and step.outcome is None and damage == 1:
                self.executor.run(step)
            elif damage == 2:
                self.executor.damage(step)
            ran = ran and damage == 1
        updates = self.scheduler.lose(lost[0].plan.step, "lost", self._tick())
        self._hear(updates)
        return updates

    def reserve(self, id: str, tokens: int) -> bool:
        """The first call of attach; False when it is refused or the pool has no room."""
        try:
            blocks = self.scheduler.attach(id, (), tokens)
        except InvalidParameter:
            blocks = ()
        if blocks:
            chain = self.told[SequenceId(id, 0)].chain[:tokens]
            self.reserved[id] = (blocks, chain)
        self._checked(blocks)
        return bool(blocks)

    def attach(self, id: str, tokens: int | None = None) -> None:
        """The second call of attach, after a transfer that writes at the last moment."""
        blocks, chain = self.reserved.pop(id)
        self.executor.write(blocks, 0, chain)
        self._checked(self.scheduler.attach(id, blocks, len(chain) if tokens is None else tokens))

    def release(self, id: str) -> None:
        self.reserved.pop(id, None)
        self.scheduler.release(id)
        for key in [key for key in self.told if key.request == id]:
            self.num_ended += self.told[key].ending is None
            del self.told[key]
        self._checked(())

    def drain(self) -> None:
        """Run until everything has ended; fails when that does not happen."""
        for _ in range(200 + 60 * len(self.get_live()) * self.config.context_tokens):
            for id in list(self.reserved):
                self.attach(id)
            if not self.get_live() and not self.flights:
                break
            is_idle = isinstance(self.plan(), Idle)
            assert self.flights, "idle with live requests and nothing in flight"
            kept = 1 if self.config.plans_ahead and not is_idle else 0
            while len(self.flights) > kept:
                self.commit()
        assert not self.get_live(), f"never ended: {self.get_live()}"
        assert self.scheduler.num_free_blocks == self.config.num_blocks, "blocks leaked"
        assert self.num_ended == self.num_sequences, "a sequence ended more or less than once"

    # ---- what was said --------------------------------------------------------------------------

    def get_live(self) -> list[SequenceId]:
        """Sequences accepted and not ended."""
        return [key for key, told in self.told.items() if told.ending is None]

    def get_digest(self) -> str:
        """SHA-256 of every answer so far."""
        return self._digest.hexdigest()

    def get_output(self, id: str, index: int = 0) -> list[Token]:
        """Tokens emitted for one continuation."""
        told = self.told[SequenceId(id, index)]
        return told.tokens[len(told.request.prompt) :]

    def _tick(self) -> int:
        self.now += 1000
        return self.now

    def _checked(self, answer: object) -> None:
        self._digest.update(repr(answer).encode())
        check(self.scheduler)

    def _hear(self, updates: tuple[Update, ...]) -> None:
        for update in updates:
            told = self.told[update.sequence]
            assert told.ending is None, f"{update.sequence}: spoken of after its end"
            if isinstance(update, TokensEmitted):
                hear_tokens(told, update)
            elif isinstance(update, SequenceEnded):
                told.ending = update.ending
                self.num_ended += 1
                tokens, ending = compute_alone(told.request, told.index, self.config)
                drawn = told.tokens[len(told.request.prompt) :]
                assert drawn == tokens[: len(drawn)], f"{update.sequence}: other tokens than alone"
                if len(drawn) == len(tokens):
                    assert told.ending == ending
            else:
                assert isinstance(update, Preempted)
        self._checked(updates)


def check_plan(
    flights: Sequence[Running], told_of: Mapping[SequenceId, Told], config: SchedulerConfig
) -> None:
    """The last plan of `flights` keeps the budgets, and asks what is known of each sequence."""
    plan = flights[-1].plan
    assert 0 < len(plan.rows) <= config.max_rows
    assert 0 < plan.num_tokens <= config.step_tokens
    assert len({row.sequence for row in plan.rows}) == len(plan.rows)
    for row in plan.rows:
        told, end = told_of[row.sequence], row.start + len(row.tokens)
        request = told.request
        assert told.ending is None, f"{row.sequence}: planned after its end"
        end -= row.drafts
        if row.tokens == (PENDING,):
            check_ahead(flights, row, told, config)
            continue
        assert list(row.tokens[: end - row.start]) == told.tokens[row.start : end]
        samples = end == len(told.tokens)
        assert samples or not row.drafts
        assert row.sampling == (request.sampling if samples else None)
        needs = samples and request.sampling.needs_history
        assert row.history == (tuple(told.tokens) if needs else ())
        assert row.history_prompt == (len(request.prompt) if needs else 0)
        if row.scored:
            assert request.prompt_logprobs == row.scored_top
            assert row.scored == request.prompt[row.start + 1 : end + 1]


def check_ahead(flights: Sequence[Running], row: Row, told: Told, config: SchedulerConfig) -> None:
    """A row whose token is drawn in the step before, and cannot be the last."""
    request = told.request
    before, plan = flights[-2].plan, flights[-1].plan
    assert config.plans_ahead
    assert before.step == plan.step - 1
    assert before.iterations == plan.iterations == 1
    (drawn,) = (one for one in before.rows if one.sequence == row.sequence)
    assert drawn.sampling is not None
    assert not drawn.drafts
    assert row.start == drawn.start + len(drawn.tokens) == len(told.tokens)
    assert row == Row(row.sequence, (PENDING,), row.start, row.blocks, request.sampling)
    assert not request.sampling.needs_history
    assert row.start + 1 < len(request.prompt) + request.max_new_tokens
    assert row.start + 1 < config.context_tokens
    assert row.start < config.num_blocks * config.block_tokens


def hear_tokens(told: Told, update: TokensEmitted) -> None:
    """Note new tokens; they come with all that was asked beside them, once."""
    request = told.request
    assert update.tokens
    wanted = request.sampling.logprobs is not None
    assert len(update.logprobs) == (len(update.tokens) if wanted else 0)
    if request.prompt_logprobs is not None and told.index == 0 and not told.got_scored:
        expected = tuple(
            TokenLogprob(token, score(chain))
            for token, chain in zip(request.prompt[1:], told.chain, strict=False)
        )
        assert update.prompt_scored == expected
        told.got_scored = True
    else:
        assert update.prompt_scored == ()
    told.tokens.extend(update.tokens)
    extend_chain(told.chain, update.tokens)


def build_driver(**sizes: int) -> Driver:
    """A driver with roomy sizes but for those given."""
    defaults = {"num_blocks": 64, "block_tokens": 4, "step_tokens": 64, "max_rows": 16}
    config = {**defaults, "context_tokens": 128, "vocab_size": 1000, **sizes}
    return Driver(SchedulerConfig(**config))


def build_request(id: str, prompt_tokens: int, max_new_tokens: int = 4, **rest: Any) -> Request:
    """A request whose prompt is told from others' by its id."""
    prompt = tuple((sum(id.encode()) * 31 + place) % 1000 for place in range(prompt_tokens))
    return Request(id, prompt, max_new_tokens, **rest)
