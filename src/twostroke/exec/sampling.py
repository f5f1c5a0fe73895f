"""From a plan's rows to the arrays of the samplers, and from their answers to row results.

Owns which positions of a step need logits and in what order they are answered: the positions that
draw a token, row after row, and apart from them the positions that score a known next token, so
that logits may be computed a few rows at a time. It does no arithmetic on logits.

A row with d drafts draws at its last d + 1 positions. The draw is data (seed, sequence index,
position), so a draft is accepted exactly when it is the token that would have been drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from twostroke.core.types import Row, RowResult, StepPlan, Token, TokenLogprob
from twostroke.kernels.ops import I32, Drawn, SamplingArrays

_SEED_MASK = 2**64 - 1
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class LogitChunk:
    """Logits to compute together.

    positions (C,) int32: ascending indices into the step's tokens. They are draws `start` and on
    of the step, or scores when `draws` is False.
    """

    positions: I32
    start: int
    draws: bool

    @property
    def part(self) -> slice:
        """Which of the step's draws, or scores, these are."""
        return slice(self.start, self.start + self.positions.size)


@dataclass(frozen=True, slots=True)
class LogitLayout:
    """The logits one step needs.

    sampled (N,): ascending int32 indices of the tokens that draw, in the order of the rows, with
    how each is drawn in `arrays`. scored (S,): those whose next token is known, with that token in
    targets (S,) and the number of alternatives to report in top (S,).
    """

    sampled: I32
    arrays: SamplingArrays
    scored: I32
    targets: I32
    top: I32

    def get_chunks(self, limit: int) -> Iterator[LogitChunk]:
        """What to compute, at most `limit` positions at a time: draws first, then scores."""
        for positions, draws in ((self.sampled, True), (self.scored, False)):
            for start in range(0, positions.size, limit):
                yield LogitChunk(positions[start : start + limit], start, draws)

    def take_arrays(self, part: slice) -> SamplingArrays:
        """How the draws of `part` are drawn."""
        if part.start == 0 and part.stop >= self.sampled.size:
            return self.arrays
        return _take_draws(self.arrays, part.start, part.stop)


def build_logit_layout(plan: StepPlan) -> LogitLayout:
    """The logits a step needs. Entry i of a row's `scored` belongs to the row's token i."""
    sampled, scored = _find_positions(plan.rows)
    targets = list(chain.from_iterable(row.scored for row in plan.rows))
    top = [row.scored_top for row in plan.rows for _ in row.scored]
    return LogitLayout(
        sampled,
        build_sampling_arrays(plan.rows),
        scored,
        np.array(targets, np.int32),
        np.array(top, np.int32),
    )


def build_sampling_arrays(rows: Sequence[Row]) -> SamplingArrays:
    """How every drawing position of these rows is sampled, in the order of the layout.

    A seed is taken modulo 2^64. Rows without sampling are passed over.
    """
    draws = [
        (row, row.sampling, back)
        for row in rows
        if row.sampling is not None
        for back in range(row.drafts, -1, -1)
    ]
    specs = [spec for _, spec, _ in draws]
    biases = [spec.logit_bias for spec in specs]
    histories = [_get_history(row, back) for row, _, back in draws]
    masks = [row.mask for row, _, _ in draws]
    counter = [(row.start + len(row.tokens) - back, row.sequence.index) for row, _, back in draws]
    return SamplingArrays(
        temperature=np.array([spec.temperature for spec in specs], np.float32),
        top_k=np.array([min(spec.top_k, _INT32_MAX) for spec in specs], np.int32),
        top_p=np.array([spec.top_p for spec in specs], np.float32),
        min_p=np.array([spec.min_p for spec in specs], np.float32),
        repetition=np.array([spec.repetition_penalty for spec in specs], np.float32),
        presence=np.array([spec.presence_penalty for spec in specs], np.float32),
        frequency=np.array([spec.frequency_penalty for spec in specs], np.float32),
        seed=np.array([spec.seed & _SEED_MASK for spec in specs], np.uint64),
        counter=np.array(counter, np.uint64).reshape(len(draws), 2),
        bias_offsets=_get_offsets(biases),
        bias_tokens=np.array([token for bias in biases for token, _ in bias], np.int32),
        bias_values=np.array([addend for bias in biases for _, addend in bias], np.float32),
        history_offsets=_get_offsets(histories),
        history_tokens=np.fromiter(chain.from_iterable(histories), np.int32),
        history_prompt=np.array([row.history_prompt for row, _, _ in draws], np.int32),
        mask_offsets=_get_offsets(masks),
        mask_bytes=np.frombuffer(b"".join(masks), np.uint8),
        top=np.array([-1 if spec.logprobs is None else spec.logprobs for spec in specs], np.int32),
    )


def build_results(
    rows: Sequence[Row], drawn: Sequence[Drawn], scored: Sequence[Drawn]
) -> tuple[RowResult, ...]:
    """One result per row, in order; drawn and scored answer the layout's positions, in parts."""
    tokens: list[Token] = []
    for part in drawn:
        tokens += part.tokens.tolist()
    draws: list[TokenLogprob] | None = None  # made when the first row asks for them
    scores = iter(_get_entries(scored)) if scored else iter(())
    results = []
    at = 0
    for row in rows:
        spec = row.sampling
        known: tuple[TokenLogprob, ...] = ()
        if row.scored:
            known = tuple([_cut(next(scores), row.scored_top) for _ in row.scored])
        if spec is None:
            results.append(RowResult(row.sequence, scored=known))
            continue
        accepted = _count_accepted(row, tokens, at) if row.drafts else 0
        end = at + accepted + 1
        logprobs: tuple[TokenLogprob, ...] = ()
        if spec.logprobs is not None:
            draws = draws or _get_entries(drawn)
            logprobs = tuple([_cut(entry, spec.logprobs) for entry in draws[at:end]])
        results.append(RowResult(row.sequence, tuple(tokens[at:end]), accepted, logprobs, known))
        at += row.drafts + 1
    assert at == len(tokens), "the draws do not belong to these rows"
    return tuple(results)


def _take_draws(arrays: SamplingArrays, start: int, stop: int) -> SamplingArrays:
    """Draws start … stop - 1 of `arrays`."""
    part = slice(start, stop)
    bias = arrays.bias_offsets[start : stop + 1]
    history = arrays.history_offsets[start : stop + 1]
    mask = arrays.mask_offsets[start : stop + 1]
    return SamplingArrays(
        temperature=arrays.temperature[part],
        top_k=arrays.top_k[part],
        top_p=arrays.top_p[part],
        min_p=arrays.min_p[part],
        repetition=arrays.repetition[part],
        presence=arrays.presence[part],
        frequency=arrays.frequency[part],
        seed=arrays.seed[part],
        counter=arrays.counter[part],
        bias_offsets=bias - bias[0],
        bias_tokens=arrays.bias_tokens[bias[0] : bias[-1]],
        bias_values=arrays.bias_values[bias[0] : bias[-1]],
        history_offsets=history - history[0],
        history_tokens=arrays.history_tokens[history[0] : history[-1]],
        history_prompt=arrays.history_prompt[part],
        mask_offsets=mask - mask[0],
        mask_bytes=arrays.mask_bytes[mask[0] : mask[-1]],
        top=arrays.top[part],
    )


def _find_positions(rows: Sequence[Row]) -> tuple[I32, I32]:
    """The layout's sampled and scored indices."""
    sampled: list[int] = []
    scored: list[int] = []
    end = 0
    for row in rows:
        start, end = end, end + len(row.tokens)
        if row.sampling is not None:
            sampled.extend(range(end - row.drafts - 1, end))
        scored.extend(range(start, start + len(row.scored)))
    return np.array(sampled, np.int32), np.array(scored, np.int32)


def _get_history(row: Row, back: int) -> tuple[Token, ...]:
    """Tokens before the draw that is `back` positions before the row's last."""
    if not row.drafts or not row.history:
        return row.history
    return row.history + row.tokens[len(row.tokens) - row.drafts : len(row.tokens) - back]


def _get_offsets(lists: Sequence[Sequence[object]]) -> I32:
    return np.fromiter(accumulate(map(len, lists), initial=0), np.int32, len(lists) + 1)


def _get_entries(parts: Sequence[Drawn]) -> list[TokenLogprob]:
    """Each row of the parts with all alternatives its arrays hold, as Python values."""
    entries: list[TokenLogprob] = []
    for part in parts:
        tokens, logprobs = part.tokens.tolist(), part.logprobs.tolist()
        if not part.top_tokens.shape[1]:
            entries.extend(map(TokenLogprob, tokens, logprobs))
            continue
        tops = zip(part.top_tokens.tolist(), part.top_logprobs.tolist(), strict=True)
        entries.extend(
            TokenLogprob(token, logprob, tuple(zip(best, values, strict=True)))
            for token, logprob, (best, values) in zip(tokens, logprobs, tops, strict=True)
        )
    return entries


def _cut(entry: TokenLogprob, count: int) -> TokenLogprob:
    """The entry with its `count` best alternatives."""
    if len(entry.top) <= count:
        return entry
    return TokenLogprob(entry.token, entry.logprob, entry.top[:count])


def _count_accepted(row: Row, tokens: list[Token], at: int) -> int:
    """How many leading drafts of a row are the tokens drawn in their places."""
    drafts = row.tokens[len(row.tokens) - row.drafts :]
    for index, draft in enumerate(drafts):
        if tokens[at + index] != draft:
            return index
    return row.drafts
