"""Laws of constraints: what grammars allow, put into plans, over a library of a few tokens."""

from __future__ import annotations

import random

import pytest

from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Cancelled,
    Finished,
    Idle,
    Request,
    RowResult,
    SamplingSpec,
    SchedulerConfig,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
)
from twostroke.engine.constraints import Constraints
from twostroke.text.grammar import GrammarCompiler, StructuredOutputs
from twostroke.text.tokenizer import build_tokenizer
from vocabularies import make_byte_bpe

CONFIG = SchedulerConfig(
    num_blocks=12, block_tokens=4, step_tokens=16, max_rows=4, context_tokens=40, vocab_size=258
)
DIGITS = StructuredOutputs(regex="[0-9]{3}-[0-9]{2,6}").text
STOP = 1


@pytest.fixture(scope="module")
def constraints():
    made = Constraints(GrammarCompiler(build_tokenizer(make_byte_bpe(words=()))))
    yield made
    made.close()


def make_request(id: str, **fields) -> Request:
    sampling = fields.pop("sampling", SamplingSpec(grammar=DIGITS))
    return Request(id, (5, 6, 7), 12, sampling=sampling, stop_tokens=frozenset([STOP]), **fields)


def read_mask(mask: bytes) -> list[int]:
    return [token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1]


def draw(plan: StepPlan, seed: int) -> StepOutcome:
    """Draws from each row's mask, by position: what a row draws depends on itself alone."""
    results = []
    for row in plan.rows:
        if row.sampling is None:
            results.append(RowResult(row.sequence))
            continue
        allowed = read_mask(row.mask) or list(range(1, 200))
        position = row.start + len(row.tokens)
        pick = random.Random(f"{seed} {row.sequence} {position}").choice(allowed)
        results.append(RowResult(row.sequence, (pick,)))
    return StepOutcome(plan.step, tuple(results), 1)


def run(constraints: Constraints, requests: list[Request], seed: int, losses: float = 0.0):
    """Every sequence's tokens, and how each ended."""
    scheduler, outputs, endings = Scheduler(CONFIG), {}, {}
    random_losses = random.Random(seed)

    def note(updates) -> None:
        constraints.note(updates)
        for update in updates:
            if isinstance(update, SequenceEnded):
                endings[update.sequence] = update.ending
            elif hasattr(update, "tokens"):
                outputs.setdefault(update.sequence, []).extend(update.tokens)

    for request in requests:
        assert scheduler.submit(request, 0)
        if request.sampling.grammar:
            constraints.open(request, constraints.compile(request.sampling.grammar).result())
    while not isinstance(plan := scheduler.plan(0), Idle):
        masked, broken = constraints.apply(plan)
        assert not broken
        if random_losses.random() < losses:
            note(scheduler.lose(plan.step, "lost", 0))
            continue
        note(scheduler.commit(draw(masked, seed), 0))
    return outputs, endings, scheduler


def spell(tokens: list[int]) -> str:
    return "".join(chr(token - 2) for token in tokens if token >= 2)


def test_what_is_drawn_matches_the_grammar_and_ends_with_stop(constraints) -> None:
    outputs, endings, _ = run(constraints, [make_request("a"), make_request("b", n=2)], 3)
    assert len(outputs) == 3
    for sequence, tokens in outputs.items():
        head, _, tail = spell(tokens).partition("-")
        assert (head + tail).isdigit()
        assert len(head) == 3
        assert endings[sequence] == Finished("stop")


def test_a_step_that_was_lost_asks_for_the_same_masks_again(constraints) -> None:
    requests = [make_request("a"), make_request("b", n=2)]
    undisturbed = run(constraints, requests, 5)
    for seed in range(5):
        print(f"seed {seed}")
        assert run(constraints, requests, 5, losses=0.3)[:2] == undisturbed[:2]


def test_a_preempted_continuation_is_matched_anew_from_its_tokens(constraints) -> None:
    requests = [make_request(f"r{at}", n=2) for at in range(4)]
    alone = {}
    for request in requests:
        alone.update(run(constraints, [request], 9)[0])
    together, _, scheduler = run(constraints, requests, 9)
    assert scheduler.memory.num_preemptions > 0
    assert together == alone


def test_a_resumed_continuation_goes_on_where_it_stopped(constraints) -> None:
    whole = run(constraints, [make_request("a")], 4)[0][SequenceId("a", 0)]
    for count in range(1, len(whole)):
        resumed = make_request("a", resumed=(tuple(whole[:count]),))
        assert run(constraints, [resumed], 4)[0][SequenceId("a", 0)] == whole[count:]


def test_rows_without_a_grammar_are_left_alone(constraints) -> None:
    scheduler = Scheduler(CONFIG)
    free = make_request("free", sampling=SamplingSpec(presence_penalty=1.0))
    bound = make_request("bound")
    scheduler.submit(free, 0)
    scheduler.submit(bound, 0)
    constraints.open(bound, constraints.compile(DIGITS).result())
    plan = scheduler.plan(0)
    assert isinstance(plan, StepPlan)
    masked, _ = constraints.apply(plan)
    constraints.note(scheduler.cancel("bound", 0))
    assert masked.rows[0] is plan.rows[0]
    assert masked.rows[0].history
    assert not masked.rows[1].history
    assert [spell([token]) for token in read_mask(masked.rows[1].mask)] == list("0123456789")


def test_a_token_the_grammar_forbids_breaks_its_continuation_alone(constraints) -> None:
    scheduler = Scheduler(CONFIG)
    for name in ("good", "bad"):
        request = make_request(name)
        scheduler.submit(request, 0)
        constraints.open(request, constraints.compile(DIGITS).result())
    plan = scheduler.plan(0)
    assert isinstance(plan, StepPlan)
    answers = tuple(
        RowResult(row.sequence, (2 + ord("7" if row.sequence.request == "good" else "x"),))
        for row in plan.rows
    )
    constraints.note(scheduler.commit(StepOutcome(plan.step, answers, 1), 0))
    again = scheduler.plan(0)
    assert isinstance(again, StepPlan)
    masked, broken = constraints.apply(again)
    assert [sequence for sequence, _ in broken] == [SequenceId("bad", 0)]
    assert "refused a token" in broken[0][1]
    assert masked.rows[0].mask
    for name in ("good", "bad"):
        constraints.note(scheduler.cancel(name, 0, ending=Cancelled()))


def test_an_ended_request_is_forgotten(constraints) -> None:
    run(constraints, [make_request("a", n=2), make_request("b")], 1)
    assert not constraints._matchers
    assert not constraints._grammars
    assert not constraints._live
