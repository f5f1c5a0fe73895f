"""Drafts from the sequence's own text: prompt-lookup decoding (Saxena 2023).

The last tokens of a sequence often occurred before: in the prompt it quotes, or in what it wrote
already. What followed them then is proposed as what follows now. Owns an index of every sequence it
was asked about, extended by each new token once, and an estimate of how often its drafts are right;
both are dropped when the sequence ends. The index takes about 400 bytes a token, a fiftieth of what
keys and values of a small model take.

A draft never changes a token, only when it is computed. A proposal depends on the calls before it
alone, and asking again without a `settle` between gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from twostroke.core.types import SequenceId, Token
from twostroke.spec.cost import StepCost
from twostroke.spec.work import StepTotals, grow_totals

# Longest first. Measured on 48 answers of two small models (chat, code, quoting), the gain in steps
# saved: three and two tokens beat either alone, one token costs more than it brings, four or five
# bring nothing more; the latest earlier occurrence beats the first by a tenth.
SIZES = (3, 2)
MAX_DRAFTS = 16

# Without a cost model a drafted token is taken to add so many parts of a step's time. Measured on
# two cores: 0.16 for SmolLM2-135M, 0.07 for Gemma3-270M; more is careful with large batches.
DRAFT_PARTS, STEP_PARTS = 1, 4

# Every draft starts as right three times of four, which is worth one trial and soon corrected; a
# trial counts an eighth less with each later one, so that a change of subject is noticed.
_PRIOR_HITS, _PRIOR_TRIALS = 1.5, 2.0
_KEPT = 7 / 8
_FIRST_WAIT_TOKENS, _LONGEST_WAIT_TOKENS = 16, 1_024


class _Draftee:
    """What is known of one sequence.

    follows: of each run of SIZES tokens where its latest occurrence ended. hits of trials: drafted
    tokens that were right, and those that were checked. choice: how many to draft, made under
    circumstances `key`. retry_at: number of known tokens at which drafting is tried again.
    """

    __slots__ = ("choice", "follows", "hits", "indexed", "key", "retry_at", "trials", "wait")

    def __init__(self) -> None:
        self.follows: dict[tuple[Token, ...], int] = {}
        self.indexed = 0
        self.hits, self.trials = _PRIOR_HITS, _PRIOR_TRIALS
        self.choice = 0
        self.key = (-1, -1)
        self.retry_at = 0
        self.wait = _FIRST_WAIT_TOKENS

    def index(self, tokens: Many[Token]) -> None:
        """Note all runs that end before the last token: what follows them is known."""
        first, end = self.indexed, len(tokens) - 1
        if end > first:
            for size in SIZES:
                for last in range(max(first, size - 1), end):
                    self.follows[tuple(tokens[last + 1 - size : last + 1])] = last + 1
            self.indexed = end

    def find(self, tokens: Many[Token]) -> int:
        """Where the tokens begin that followed the last ones before; 0 for nowhere."""
        known = len(tokens)
        for size in SIZES:
            if known > size:
                follows = self.follows.get(tuple(tokens[known - size :]), 0)
                if follows:
                    return follows
        return 0


class PromptLookup:
    """A `Drafter` of core/policy.py that costs no model.

    It drafts as many tokens as make the expected tokens a step (Leviathan et al. 2023, eq. 1) per
    predicted time the most, and none where that does not pay: then a single one is tried after 16
    more tokens, and after twice as many whenever that fails. cost: of a batch of as many such rows
    as there are sequences; without one, a draft is taken to cost a quarter of a step.
    """

    def __init__(self, cost: StepCost | None = None, max_drafts: int = MAX_DRAFTS) -> None:
        self._cost = cost
        self._max_drafts = max_drafts
        self._draftees: dict[SequenceId, _Draftee] = {}
        self._times: dict[tuple[int, int], list[int]] = {}

    def propose(self, id: SequenceId, tokens: Many[Token], most: int) -> tuple[Token, ...]:
        """At most `most` tokens that followed the last of `tokens` where they occurred before.

        Where the earlier occurrence is so near that its continuation is not all known, the draft
        goes on from itself: a text that repeats with a period goes on repeating.
        """
        draftee = self._draftees.get(id)
        if draftee is None:
            draftee = self._draftees[id] = _Draftee()
        draftee.index(tokens)
        follows = draftee.find(tokens)
        count = min(most, self._choose(draftee, len(tokens))) if follows else 0
        drafts = list(tokens[follows : follows + count]) if count > 0 else []
        for ahead in range(len(drafts), count):
            drafts.append(drafts[follows + ahead - len(tokens)])
        return tuple(drafts)

    def settle(self, id: SequenceId, drafted: int, accepted: int) -> None:
        """Of so many drafted tokens so many were right; behind a wrong one nothing was checked."""
        draftee = self._draftees.get(id)
        if draftee is None or drafted < 1:
            return
        draftee.hits = _KEPT * draftee.hits + accepted
        draftee.trials = _KEPT * draftee.trials + accepted + (accepted < drafted)
        draftee.key = (-1, -1)
        if draftee.retry_at:
            is_right = accepted > 0
            draftee.wait = (
                _FIRST_WAIT_TOKENS if is_right else min(2 * draftee.wait, _LONGEST_WAIT_TOKENS)
            )
            draftee.retry_at = 0

    def forget(self, id: SequenceId) -> None:
        """The sequence has ended; unknown ones never drafted."""
        self._draftees.pop(id, None)

    def _choose(self, draftee: _Draftee, known: int) -> int:
        """How many tokens to draft for a sequence of so many known tokens."""
        key = (known.bit_length(), len(self._draftees).bit_length())
        if draftee.key != key:
            draftee.choice = find_best_count(
                draftee.hits / draftee.trials, self._times.get(key) or self._predict(key)
            )
            draftee.key = key
        if draftee.choice:
            draftee.retry_at = 0
            return draftee.choice
        if not draftee.retry_at:
            draftee.retry_at = known + draftee.wait
        return 1 if known >= draftee.retry_at else 0

    def _predict(self, key: tuple[int, int]) -> list[int]:
        """Times of a step of rows with 0, 1, 2 … drafts.

        key: powers of two above the context and the number of rows, because neither matters in
        detail and few powers means few predictions.
        """
        rows, context = 1 << key[1] - 1, 1 << key[0]
        times = []
        for drafts in range(self._max_drafts + 1):
            if self._cost is None:
                times.append(STEP_PARTS + DRAFT_PARTS * drafts)
            else:
                row = self._cost.get_row_totals(1 + drafts, context, 1 + drafts)
                times.append(self._cost.predict_ns(grow_totals(StepTotals(), row, rows)))
        self._times[key] = times
        return times


def find_best_count(rate: float, times: Many[int]) -> int:
    """The number of drafts with the most expected tokens per time.

    rate: how often a drafted token is right. times[d]: of a step with d drafts. Of d drafts
    1 + rate + rate^2 + … + rate^d tokens come (Leviathan et al. 2023, eq. 1).
    """
    best, best_speed = 0, 1.0 / times[0]
    expected = power = 1.0
    for drafts in range(1, len(times)):
        power *= rate
        expected += power
        if expected / times[drafts] > best_speed:
            best, best_speed = drafts, expected / times[drafts]
    return best
