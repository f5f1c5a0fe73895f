"""Laws of logit layouts: every row is answered with its own draws and scores, in any chunking."""

from __future__ import annotations

import numpy as np
import pytest

from twostroke.core.types import Row, SamplingSpec, SequenceId, StepPlan, Token, TokenLogprob
from twostroke.exec.sampling import build_logit_layout, build_results, build_sampling_arrays
from twostroke.kernels.ops import F32
from twostroke.kernels.reference import sampling as reference

VOCAB = 50
GREEDY = SamplingSpec()


def make_row(name: str, tokens: tuple[Token, ...], start: int = 0, **others) -> Row:
    others.setdefault("sampling", None)
    return Row(SequenceId(name, 0), tokens, start, (0,), **others)


def make_logits(plan: StepPlan) -> F32:
    """Logits of every token of the step; they depend on the row's name and the position only."""
    rows = [
        np.random.default_rng([ord(row.sequence.request[0]), row.start + at]).normal(size=VOCAB)
        for row in plan.rows
        for at in range(len(row.tokens))
    ]
    return np.array(rows, np.float32)


def answer(plan: StepPlan, limit: int = 64):
    logits = make_logits(plan)
    layout = build_logit_layout(plan)
    drawn, scored = [], []
    for chunk in layout.get_chunks(limit):
        assert 0 < len(chunk.positions) <= limit
        rows = logits[chunk.positions]
        if chunk.draws:
            drawn.append(reference.sample(rows, layout.take_arrays(chunk.part)))
        else:
            targets, top = layout.targets[chunk.part], layout.top[chunk.part]
            scored.append(reference.score(rows, targets, top))
    return build_results(plan.rows, drawn, scored)


MIXED = StepPlan(
    0,
    (
        make_row("a", (5,), 9, sampling=SamplingSpec(temperature=1.0, seed=1, logprobs=2)),
        make_row("b", (1, 2, 3), 0, scored=(2, 3, 4), scored_top=3),
        make_row("c", (7, 8, 9), 4, sampling=GREEDY, scored=(8, 9), scored_top=0),
        make_row("d", (1, 2)),
        make_row(
            "e",
            (6,),
            30,
            sampling=SamplingSpec(temperature=0.7, repetition_penalty=1.5, logit_bias=((3, 1.0),)),
            history=(4, 4, 6),
            history_prompt=1,
        ),
    ),
)


def test_rows_are_answered_in_order_with_what_they_asked() -> None:
    a, b, c, d, e = answer(MIXED)
    assert [r.sequence.request for r in (a, b, c, d, e)] == list("abcde")
    assert [len(r.tokens) for r in (a, b, c, d, e)] == [1, 0, 1, 0, 1]
    assert [len(r.logprobs) for r in (a, b, c, d, e)] == [1, 0, 0, 0, 0]
    assert len(a.logprobs[0].top) == 2
    assert [entry.token for entry in b.scored] == [2, 3, 4]
    assert [len(entry.top) for entry in b.scored] == [3, 3, 3]
    assert [entry.token for entry in c.scored] == [8, 9]
    assert [entry.top for entry in c.scored] == [(), ()]
    assert d.scored == e.scored == ()


def test_results_hold_plain_python_numbers() -> None:
    for result in answer(MIXED):
        assert all(type(token) is int for token in result.tokens)
        for entry in (*result.logprobs, *result.scored):
            assert type(entry.logprob) is float
            assert all(type(token) is int for token, _ in entry.top)


@pytest.mark.parametrize("limit", [1, 2, 3, 64])
def test_chunking_changes_no_answer(limit: int) -> None:
    assert answer(MIXED, limit) == answer(MIXED)


def test_a_row_is_answered_alike_in_any_company() -> None:
    together = answer(MIXED)
    for row, result in zip(MIXED.rows, together, strict=True):
        assert answer(StepPlan(0, (row,))) == (result,)


def test_scores_are_the_log_softmax_at_their_own_position() -> None:
    (result,) = answer(StepPlan(0, (MIXED.rows[1],)))
    logits = make_logits(StepPlan(0, (MIXED.rows[1],)))
    for at, entry in enumerate(result.scored):
        expected = reference.get_log_softmax(logits[at])
        best = int(np.argmax(expected))
        assert entry == TokenLogprob(entry.token, float(expected[entry.token]), entry.top)
        assert entry.top[0] == (best, float(expected[best]))


def test_positions_ascend_and_are_named_once() -> None:
    layout = build_logit_layout(MIXED)
    assert layout.sampled.tolist() == [0, 6, 9]
    assert layout.scored.tolist() == [1, 2, 3, 4, 5]


def test_a_step_without_logits_has_no_chunks() -> None:
    plan = StepPlan(0, (make_row("d", (1, 2)),))
    assert list(build_logit_layout(plan).get_chunks(64)) == []
    assert answer(plan)[0].tokens == ()


def test_counters_are_the_new_tokens_positions() -> None:
    arrays = build_sampling_arrays(MIXED.rows)
    assert arrays.counter.tolist() == [[10, 0], [7, 0], [31, 0]]
    assert arrays.history_offsets.tolist() == [0, 0, 0, 3]
    assert arrays.bias_tokens.tolist() == [3]
    assert arrays.top.tolist() == [2, -1, -1]


@pytest.mark.parametrize("wrong_at", [0, 1, 2, 3])
def test_drafts_are_accepted_up_to_the_first_that_would_not_be_drawn(wrong_at: int) -> None:
    spec = SamplingSpec(temperature=1.0, frequency_penalty=1.5, seed=9, logprobs=0)

    def decode(count: int) -> list[Token]:
        """The row's next tokens, one step each."""
        known = [5]
        for _ in range(count):
            row = make_row("a", (known[-1],), 10 + len(known), sampling=spec, history=tuple(known))
            known.extend(answer(StepPlan(0, (row,)))[0].tokens)
        return known[1:]

    expected = decode(4)
    drafts = [(token + (at == wrong_at)) % VOCAB for at, token in enumerate(expected[:3])]
    row = make_row("a", (5, *drafts), 11, sampling=spec, history=(5,), drafts=3)
    (result,) = answer(StepPlan(0, (row,)), limit=3)
    assert result.accepted_drafts == wrong_at
    assert list(result.tokens) == expected[: wrong_at + 1]
    assert len(result.logprobs) == wrong_at + 1
