"""One engine, many ways to schedule it: the same load under each, on one executor.

A variant is a scheduler's config and policies by name; a load is requests with arrival times. The
executor with its packed weights is opened once and outlives the engines that run over it one after
another, so two variants differ in nothing but what they say. It is the real engine: its loop and
thread, text made of every token. What is kept of a run is what happened to every request and in
every step; judging it is the caller's affair.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

from twostroke.core.ports import ExecutorInfo, OnDone, StepAnswer
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import Ending, SchedulerConfig, StepOutcome, StepPlan
from twostroke.engine.clock import MonotonicClock
from twostroke.engine.metrics import EngineStats
from twostroke.engine.outputs import OutputDelta, RequestTimings
from twostroke.engine.params import SamplingParams
from twostroke.engine.service import EngineParts, EngineService
from twostroke.errors import EngineError
from twostroke.exec.build import build_executor
from twostroke.exec.local import LocalExecutor, RunnerSizes
from twostroke.policies.names import PolicyChoice, build_policies
from twostroke.spec.cost import StepCost
from twostroke.spec.model import ModelSpec
from twostroke.text.tokenizer import Tokenizer, build_tokenizer
from twostroke.weights.catalog import get_cache_dir, resolve
from twostroke.weights.load import OpenModel, open_model

_LONGEST_S = 600.0  # a load that takes longer has hung


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load: when it comes, in seconds, its prompt, and how many tokens it wants.

    Tokens are drawn greedily and stop ids are ignored, so the answer is as long as asked.
    """

    at_s: float
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How the engine schedules: fields of SchedulerConfig, 0 for as large as the executor has it.

    policies: order, pace and drafts by name. has_prefix_cache: whether blocks are shared by prefix.
    """

    name: str
    policies: PolicyChoice = field(default_factory=PolicyChoice)
    step_tokens: int = 0
    max_rows: int = 64
    num_blocks: int = 0
    reserve_tokens: int = 0
    watermark_blocks: int = 0
    has_prefix_cache: bool = False


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step: when it began on the run's clock, how long it took, what it computed.

    prompt_tokens: of `tokens`, those of rows that are not one decode. drafts and accepted: tokens
    guessed, and how many of them were right. held_blocks: of the pool when it began, of which
    filled_tokens positions hold keys and values, shared ones counted for each that shares them.
    """

    begin_s: float
    seconds: float
    rows: int
    tokens: int
    prompt_tokens: int
    drafts: int
    accepted: int
    held_blocks: int
    filled_tokens: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request: its arrival, when its tokens came (seconds on the run's clock), and its fate."""

    arrived_s: float
    token_s: tuple[float, ...]
    tokens: tuple[int, ...]
    timings: RequestTimings
    ending: Ending

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token."""
        return self.token_s[0] - self.arrived_s

    @property
    def ended_s(self) -> float:
        """When its last token came."""
        return self.token_s[-1]

    @property
    def tpot_s(self) -> float:
        """Mean time of the tokens behind the first; 0 with one token only."""
        return (self.token_s[-1] - self.token_s[0]) / max(1, len(self.token_s) - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens; those that came together have none between them."""
        return [
            later - earlier
            for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)
            if later > earlier
        ]


@dataclass(frozen=True, slots=True)
class VariantRun:
    """What happened under one variant: requests in order of the load, steps in order.

    seconds: from the first arrival to the last token. stats: the engine's own counts.
    """

    variant: Variant
    requests: tuple[RequestRecord, ...]
    steps: tuple[StepRecord, ...]
    seconds: float
    stats: EngineStats
    block_tokens: int

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """The tokens of every request: equal between variants that are exact."""
        return [one.tokens for one in self.requests]

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all requests over the time of the run."""
        return sum(len(one.tokens) for one in self.requests) / self.seconds

    @property
    def filled_share(self) -> float:
        """Of the KV positions held over the run, how many held keys and values, by step time."""
        held = sum(step.held_blocks * step.seconds for step in self.steps) * self.block_tokens
        filled = sum(step.filled_tokens * step.seconds for step in self.steps)
        return filled / held if held else 0.0

    @property
    def mean_rows(self) -> float:
        """Sequences a step computes, on average over steps."""
        return sum(step.rows for step in self.steps) / max(1, len(self.steps))


class VariantBench:
    """An open model whose executor runs loads under variants, one at a time; a context manager."""

    def __init__(
        self,
        model: str,
        sizes: RunnerSizes,
        make_executor: Callable[[OpenModel, RunnerSizes], LocalExecutor] | None = None,
    ) -> None:
        """Open `model` by name or path; make_executor: in place of the CPU's usual one.

        Raises UnknownModel, CorruptModel, DeviceError.
        """
        with contextlib.ExitStack() as undo:
            opened = undo.enter_context(open_model(resolve(model)))
            self.spec: ModelSpec = opened.spec
            self.tokenizer: Tokenizer = build_tokenizer(opened.vocabulary)
            make = make_executor or _make_executor
            self.executor: LocalExecutor = make(opened, sizes)
            undo.callback(self.executor.close)
            self.sizes = sizes
            self._name = model
            self._resources = undo.pop_all()

    def run(
        self, variant: Variant, load: Sequence[Arrival], cost: StepCost | None = None
    ) -> VariantRun:
        """Run `load` in real time from an empty engine; returns when every request has ended.

        cost: predicts steps, for policies that need it. Raises InvalidRequest where the variant
        cannot serve a request of the load, and InvalidParameter for what the policies refuse.
        """
        scheduler = self._make_scheduler(variant, cost)
        recorder = _Recorder(self.executor, scheduler)
        service = EngineService(
            EngineParts(
                spec=self.spec,
                tokenizer=self.tokenizer,
                chat_template=None,
                scheduler=scheduler,
                executor=recorder,
                clock=MonotonicClock(),
                model_name=self._name,
            )
        )
        try:
            requests, begin_s = _play(service, load)
            stats = service.get_stats()
        finally:
            service.close()
        last_s = max(one.ended_s for one in requests)
        return VariantRun(
            variant,
            tuple(requests),
            tuple(recorder.take_steps(begin_s)),
            last_s - min(one.arrived_s for one in requests),
            stats,
            self.sizes.block_tokens,
        )

    def close(self) -> None:
        """Let go of executor and model."""
        self._resources.close()

    def __enter__(self) -> VariantBench:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _make_scheduler(self, variant: Variant, cost: StepCost | None) -> Scheduler:
        step_tokens = variant.step_tokens or self.sizes.max_step_tokens
        config = SchedulerConfig(
            num_blocks=variant.num_blocks or self.sizes.num_blocks,
            block_tokens=self.sizes.block_tokens,
            step_tokens=step_tokens,
            max_rows=variant.max_rows,
            context_tokens=self.spec.context_tokens,
            vocab_size=self.spec.vocab_size,
            reserve_tokens=variant.reserve_tokens,
            watermark_blocks=variant.watermark_blocks,
            cache_seed=self._name if variant.has_prefix_cache else "",
        )
        policies = build_policies(variant.policies, step_tokens=step_tokens, cost=cost)
        return Scheduler(config, policies)


def _make_executor(model: OpenModel, sizes: RunnerSizes) -> LocalExecutor:
    return build_executor(model, "cpu", sizes, get_cache_dir() / "packed")


class _Following:
    """What arrives of one request, on the engine's thread; `ended` is told when it has ended."""

    def __init__(self, ended: threading.Semaphore) -> None:
        self._ended = ended
        self.tokens: list[int] = []
        self.token_s: list[float] = []
        self.ending: Ending | None = None

    def take(self, deltas: Sequence[OutputDelta], is_over: bool) -> None:
        now_s = time.monotonic()
        for delta in deltas:
            self.tokens.extend(delta.tokens)
            self.token_s.extend([now_s] * len(delta.tokens))
            self.ending = delta.ending or self.ending
        if is_over:
            self._ended.release()


def _play(service: EngineService, load: Sequence[Arrival]) -> tuple[list[RequestRecord], float]:
    """Submit the load as it arrives and wait for all; returns records, and when the run began."""
    ended = threading.Semaphore(0)
    order = sorted(range(len(load)), key=lambda index: load[index].at_s)
    prepared = {}
    for index in order:
        own = SamplingParams(temperature=0.0, max_tokens=load[index].new_tokens, ignore_eos=True)
        following = _Following(ended)
        request = service.make_request(own, f"variant-{index}", load[index].prompt)
        prepared[index] = (service.make_state(request, own, following.take), following)
    begin_s = time.monotonic()
    # Those of one moment are handed over together: each hand-over waits for the step in progress.
    for at_s, those in itertools.groupby(order, lambda index: load[index].at_s):
        if (left_s := begin_s + at_s - time.monotonic()) > 0:
            time.sleep(left_s)
        service.submit([prepared[index][0] for index in those]).result()
    for _ in load:
        if not ended.acquire(timeout=_LONGEST_S):
            raise EngineError("a load under measurement did not end")
    records = []
    for index, arrival in enumerate(load):
        state, following = prepared[index]
        assert following.ending is not None
        if not following.tokens:
            raise EngineError(f"request {index} of a load ended as {following.ending}")
        records.append(
            RequestRecord(
                arrival.at_s,
                tuple(at_s - begin_s for at_s in following.token_s),
                tuple(following.tokens),
                state.timings,
                following.ending,
            )
        )
    return records, begin_s


class _Recorder:
    """An Executor over another that notes its steps, and does not close it."""

    def __init__(self, executor: LocalExecutor, scheduler: Scheduler) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._steps: list[tuple[float, StepPlan, StepOutcome, int, int]] = []
        self.run_pending = executor.run_pending
        self.read_kv = executor.read_kv
        self.write_kv = executor.write_kv

    def describe(self) -> ExecutorInfo:
        return self._executor.describe()

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        scheduler = self._scheduler
        held = scheduler.config.num_blocks - scheduler.num_free_blocks
        filled = scheduler.num_held_tokens
        note = partial(self._note, plan, on_done, held, filled)
        self._executor.start(plan, note)

    def close(self) -> None:
        """Leaves the executor open: the next variant runs on it."""

    def take_steps(self, begin_s: float) -> list[StepRecord]:
        """What was noted, with times from `begin_s` on the monotonic clock."""
        return [
            _to_record(ended_s - begin_s, plan, outcome, held, filled)
            for ended_s, plan, outcome, held, filled in self._steps
        ]

    def _note(
        self, plan: StepPlan, on_done: OnDone, held: int, filled: int, answer: StepAnswer
    ) -> None:
        if isinstance(answer, StepOutcome):
            self._steps.append((time.monotonic(), plan, answer, held, filled))
        on_done(answer)


def _to_record(
    ended_s: float, plan: StepPlan, outcome: StepOutcome, held: int, filled: int
) -> StepRecord:
    seconds = outcome.duration_ns / 1e9
    prompt = sum(len(row.tokens) for row in plan.rows if len(row.tokens) - row.drafts > 1)
    return StepRecord(
        begin_s=ended_s - seconds,
        seconds=seconds,
        rows=len(plan.rows),
        tokens=plan.num_tokens,
        prompt_tokens=prompt,
        drafts=sum(row.drafts for row in plan.rows),
        accepted=sum(result.accepted_drafts for result in outcome.results),
        held_blocks=held,
        filled_tokens=filled,
    )
