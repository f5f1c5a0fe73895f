"""The official fakes of the engine's ports: an executor, a clock, and what tests run them on.

FakeExecutor keeps real KV: the token of each position, in the blocks a plan names. It draws the
next token from what the row's block table holds, never from the plan, so a wrong block table, a
missing copy or a block reused too early changes its output. A pending token it takes from what it
drew in the step before, whether that was answered or not. ManualClock moves when it is told to.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from twostroke.core.ports import Clock, ExecutorInfo, OnDone, StepAnswer
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    PENDING,
    BlockId,
    Row,
    RowResult,
    SamplingSpec,
    SchedulerConfig,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokenLogprob,
)
from twostroke.engine.clock import MonotonicClock
from twostroke.engine.loop import LoopPolicy
from twostroke.engine.service import EngineParts
from twostroke.errors import ExecutorLost
from twostroke.spec.model import LayerSpec, ModelSpec, RopeLayout, RopeSpec
from twostroke.spec.vocabulary import TokenType, Vocabulary, VocabularyKind
from twostroke.text.chat import ChatTemplate
from twostroke.text.tokenizer import Tokenizer
from twostroke.text.tokens import get_byte_letters

# tokens so far, sampling, index of the continuation → next token
NextToken = Callable[[Sequence[int], SamplingSpec, int], int]

EOS = 256
BOS = 257
VOCAB_SIZE = 264


class ManualClock:
    """A Clock that stands still until `advance`."""

    def __init__(self, start_ns: int = 1_000_000_000) -> None:
        self._now_ns = start_ns
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def now_ns(self) -> int:
        return self._now_ns

    def call_at(self, t_ns: int, fn: Callable[[], None]) -> None:
        heapq.heappush(self._due, (t_ns, next(self._order), fn))

    def advance(self, duration_ns: int) -> None:
        """Move on, running what falls due at its own time."""
        end_ns = self._now_ns + duration_ns
        while self._due and self._due[0][0] <= end_ns:
            due_ns, _, fn = heapq.heappop(self._due)
            self._now_ns = max(self._now_ns, due_ns)
            fn()
        self._now_ns = end_ns


def draw_by_hash(tokens: Sequence[int], sampling: SamplingSpec, index: int) -> int:
    """A letter that depends on all tokens, and when not greedy on seed and index too."""
    data = repr(tuple(tokens)).encode()
    if sampling.temperature > 0:
        data += f"{sampling.seed}/{index}".encode()
    return ord("a") + zlib.crc32(data) % 26


def draw_from(text: bytes, prompt_tokens: int) -> NextToken:
    """The bytes of `text` one after the other behind a prompt of so many tokens, then EOS."""

    def draw(tokens: Sequence[int], sampling: SamplingSpec, index: int) -> int:
        position = len(tokens) - prompt_tokens
        return text[position] if position < len(text) else EOS

    return draw


@dataclass
class HeldStep:
    """A step that FakeExecutor has not answered yet, and may have computed."""

    plan: StepPlan
    on_done: OnDone
    outcome: StepOutcome | None = None


class FakeExecutor:
    """An Executor whose answers a test scripts.

    `behave` says, per plan, how it answers; the behaviours are methods named `answer_…` and take
    (plan, on_done). Held steps wait in `held` for `release`. With `threaded`, answers come from a
    thread, as a real executor's do.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_tokens: int = 4,
        next_token: NextToken = draw_by_hash,
        step_ns: int = 1_000_000,
        pool: list[list[int]] | None = None,
    ) -> None:
        """pool: the KV of an executor that this one replaces."""
        self.pool = pool or [[-1] * block_tokens for _ in range(num_blocks)]
        self.next_token = next_token
        self.step_ns = step_ns
        self.behave: Callable[[StepPlan, OnDone], None] = self.answer_now
        self.held: deque[HeldStep] = deque()
        self.plans: list[StepPlan] = []
        self.drawn: dict[SequenceId, int] = {}  # by the step computed last
        self.drawn_step = -1
        self.is_dead = False
        self.is_closed = False
        self.is_busy = False  # a thread is computing a step

    # ---- Executor -------------------------------------------------------------------------------

    def describe(self) -> ExecutorInfo:
        return ExecutorInfo(
            device="fake",
            backend="fake",
            threads=1,
            num_blocks=len(self.pool),
            block_tokens=len(self.pool[0]),
            kv_bytes=len(self.pool) * len(self.pool[0]),
            weight_bytes=0,
            max_step_tokens=1 << 20,
        )

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        if self.is_closed or self.is_dead:
            on_done(ExecutorLost("the executor is closed" if self.is_closed else "it is dead"))
            return
        self.plans.append(plan)
        self.behave(plan, on_done)

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        return repr([self.pool[block] for block in blocks]).encode()

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        rows = handle.decode().strip("[]").split("], [")
        for block, row in zip(blocks, rows, strict=True):
            self.pool[block] = [int(token) for token in row.split(", ")]

    def close(self) -> None:
        self.is_closed = True
        while self.held:
            self.held.popleft().on_done(ExecutorLost("the executor was closed"))

    # ---- behaviours -----------------------------------------------------------------------------

    def answer_now(self, plan: StepPlan, on_done: OnDone) -> None:
        """Compute and answer inside `start`."""
        on_done(self.compute(plan))

    def answer_threaded(self, plan: StepPlan, on_done: OnDone) -> None:
        """Compute and answer from a thread."""
        self.is_busy = True

        def answer() -> None:
            outcome = self.compute(plan)
            self.is_busy = False
            on_done(outcome)

        threading.Thread(target=answer, daemon=True).start()

    def answer_held(self, plan: StepPlan, on_done: OnDone) -> None:
        """Wait for `release`, or for ever."""
        self.held.append(HeldStep(plan, on_done))

    def answer_lost(self, plan: StepPlan, on_done: OnDone) -> None:
        """Die of this step."""
        self.is_dead = True
        on_done(ExecutorLost("it died"))

    def answer_twice(self, plan: StepPlan, on_done: OnDone) -> None:
        """Break the protocol: the same answer two times."""
        outcome = self.compute(plan)
        on_done(outcome)
        on_done(outcome)

    def answer_malformed(self, plan: StepPlan, on_done: OnDone) -> None:
        """An outcome with a row missing."""
        outcome = self.compute(plan)
        on_done(replace(outcome, results=outcome.results[1:]))

    def answer_wrong_step(self, plan: StepPlan, on_done: OnDone) -> None:
        """The outcome of a step nobody planned."""
        on_done(replace(self.compute(plan), step=plan.step + 7))

    def answer_bad_token(self, plan: StepPlan, on_done: OnDone) -> None:
        """Every drawn token lies outside the vocabulary."""
        outcome = self.compute(plan)
        results = [replace(one, tokens=(10**6,) * len(one.tokens)) for one in outcome.results]
        on_done(replace(outcome, results=tuple(results)))

    # ---- work -----------------------------------------------------------------------------------

    def release(self) -> None:
        """Answer the oldest held step."""
        self.compute_held()
        step = self.held.popleft()
        assert step.outcome is not None
        step.on_done(step.outcome)

    def release_with(self, answer: StepAnswer) -> None:
        """Answer the oldest held step with this."""
        self.held.popleft().on_done(answer)

    def compute(self, plan: StepPlan) -> StepOutcome:
        """Run a plan over the KV, after those that were started before it."""
        self.compute_held()
        return self._compute(plan)

    def compute_held(self) -> None:
        """Run what is held, without answering it."""
        for step in self.held:
            if step.outcome is None:
                step.outcome = self._compute(step.plan)

    def _compute(self, plan: StepPlan) -> StepOutcome:
        for copy in plan.copies:
            self.pool[copy.target] = list(self.pool[copy.source])
        for row in plan.rows:
            for offset, token in enumerate(self._resolve(plan.step, row)):
                block, slot = divmod(row.start + offset, len(self.pool[0]))
                self.pool[row.blocks[block]][slot] = token
        results = tuple(self._answer_row(row) for row in plan.rows)
        self.drawn = {one.sequence: one.tokens[-1] for one in results if one.tokens}
        self.drawn_step = plan.step
        return StepOutcome(plan.step, results, self.step_ns)

    def _resolve(self, step: int, row: Row) -> tuple[int, ...]:
        """The row's tokens, none of them pending."""
        if row.tokens != (PENDING,):
            return row.tokens
        assert self.drawn_step == step - 1, "a token is pending that the step before did not draw"
        return (self.drawn[row.sequence],)

    def _answer_row(self, row: Row) -> RowResult:
        scored = tuple(_score(token, row.scored_top) for token in row.scored)
        if row.sampling is None:
            return RowResult(row.sequence, scored=scored)
        known = [token for block in row.blocks for token in self.pool[block]]
        known = known[: row.start + len(row.tokens)]
        token = self.next_token(known, row.sampling, row.sequence.index)
        top = row.sampling.logprobs
        logprobs = () if top is None else (_score(token, top),)
        return RowResult(row.sequence, (token,), 0, logprobs, scored)


def _score(token: int, top: int) -> TokenLogprob:
    others = tuple((other, -1.0 - other) for other in range(top))
    return TokenLogprob(token, -math.log(2 + token), others)


def make_spec(context_tokens: int = 128) -> ModelSpec:
    """A model small enough to print."""
    return ModelSpec(
        family="llama",
        name="fake",
        width=8,
        ffn_width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=VOCAB_SIZE,
        context_tokens=context_tokens,
        norm_eps=1e-5,
        attention_scale=0.5,
        rope_layout=RopeLayout.HALF,
        layers=(LayerSpec(RopeSpec(10_000.0)),),
    )


def make_config(executor: FakeExecutor, **changes: int) -> SchedulerConfig:
    """Sizes that fit the executor; `changes` replace fields."""
    info = executor.describe()
    config = SchedulerConfig(
        num_blocks=info.num_blocks,
        block_tokens=info.block_tokens,
        step_tokens=32,
        max_rows=16,
        context_tokens=128,
        vocab_size=VOCAB_SIZE,
    )
    return replace(config, **changes)


def make_parts(
    executor: FakeExecutor,
    *,
    clock: Clock | None = None,
    chat_template: ChatTemplate | None = None,
    policy: LoopPolicy | None = None,
    **sizes: int,
) -> EngineParts:
    """An engine over `executor` with a real scheduler and tokenizer; `sizes` as in make_config."""
    config = make_config(executor, **sizes)
    return EngineParts(
        spec=make_spec(config.context_tokens),
        tokenizer=Tokenizer.from_vocabulary(make_vocabulary()),
        chat_template=chat_template,
        scheduler=Scheduler(config),
        executor=executor,
        clock=clock or MonotonicClock(),
        model_name="fake",
        policy=policy or LoopPolicy(),
    )


def make_vocabulary() -> Vocabulary:
    """A token is a byte, but for the end token 256, the begin token 257 and three more.

    258 is "the", 259 the first two bytes of "€", 260 its last byte and an "x".
    """
    letters = {byte: letter for letter, byte in get_byte_letters().items()}
    euro = [letters[byte] for byte in "€".encode()]
    tokens = [letters[byte] for byte in range(256)]
    tokens += ["<eos>", "<bos>", "the", euro[0] + euro[1], euro[2] + "x"]
    types = [int(TokenType.NORMAL)] * len(tokens)
    types[EOS] = types[BOS] = int(TokenType.CONTROL)
    return Vocabulary(
        kind=VocabularyKind.BYTE_BPE,
        tokens=tokens,
        types=types,
        pre="gpt-2",
        bos=BOS,
        eos=EOS,
        stop_tokens=frozenset({EOS}),
        add_bos=True,
    )
