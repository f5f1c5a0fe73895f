"""The pace that keeps latency targets: a step takes the most prompt its decodes can wait for.

Owns the search for that budget and the correction of the predictions by what was measured. The
target between tokens (ITL) is the harder promise: a first token's deadline never buys a larger
chunk than the running decodes allow, because the budget is already the largest they do. Deadlines
are honoured through the order instead (order.py: EarliestDeadline). Integers only, so that plans
are the same on every machine that is given the same outcomes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many

from twostroke.core.policy import Load, Room
from twostroke.core.types import Row, StepOutcome, StepPlan
from twostroke.errors import InvalidParameter
from twostroke.policies.pace import EVERYBODY
from twostroke.spec.cost import StepCost
from twostroke.spec.work import StepTotals, add_totals

BLOCK_TOKENS = 16
LEAST_TOKENS = 4
# Enough for the accuracy that `find_most_tokens` promises, from one block to 16,384 tokens.
MAX_PREDICTIONS = 11
ONE = 1 << 16  # a ratio of 1

_WINDOW = 15
_TRUSTED = 3
_DECODE_STRIDE = 16


class TargetPace:
    """The most prompt tokens for which a step's predicted time keeps every decode's ITL target.

    itl_ns: target of requests that name none; 0 for none. step_tokens: most tokens of a step.
    Without a decode to keep waiting, or with no target, a step takes all it can. Where a block of
    the first prompt in line is too much, as many whole LEAST_TOKENS as are not go into the step,
    and one in any case, or a target no step can keep would starve it.

    A prediction is corrected by the median of measured to predicted time over the last steps that
    had decodes and a prompt; until there are three, over other steps. On top comes a margin of four
    median absolute deviations, 2.7 standard deviations of a normal error, and at least 1/12. What
    passes between steps, while sequences run, is taken off the target: its median over the last
    steps. Up to half of the measurements may be wild without moving any of these. Raises
    InvalidParameter when the target is below the time of one decode alone.
    """

    def __init__(self, cost: StepCost, step_tokens: int, itl_ns: int = 0) -> None:
        if step_tokens < BLOCK_TOKENS:
            least = f"must be at least {BLOCK_TOKENS}, not {step_tokens}"
            raise InvalidParameter("step_tokens", least)
        least_ns = get_least_itl_ns(cost)
        if itl_ns < 0 or 0 < itl_ns < least_ns:
            raise InvalidParameter(
                "itl_ns",
                f"{itl_ns} cannot be kept: one decode alone is predicted to take {least_ns} ns, the"
                " smallest possible target (0 for none)",
            )
        self.cost = cost
        self.step_tokens = step_tokens
        self.itl_ns = itl_ns
        self._mixed = Correction()
        self._other = Correction()
        self._noted = 0  # steps
        self._around_ns: deque[int] = deque(maxlen=_WINDOW)  # from one step's end to the next begin
        self._begun_ns = self._lasted_ns = 0  # of the step noted last, when it was opened
        # (pairs, keys) of a decode by block of its position; at most one entry a block of context.
        self._decodes: dict[int, tuple[int, int]] = {}

    def open_step(self, load: Load, now: int) -> Room:
        """Room that is measured when a prompt first asks for it."""
        if self._lasted_ns and load.decodes:  # who runs has waited for nothing but the engine
            self._around_ns.append(max(0, now - self._begun_ns - self._lasted_ns))
        self._begun_ns, self._lasted_ns = now, 0
        return TargetRoom(self, load)

    def note_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Compare measured with predicted time.

        Prompts' rows come last in a plan. Steps of other kinds only matter until mixed ones were
        seen, and few of those of decodes alone are looked at. A plan of several iterations counts
        as so many steps. Moving KV to or from the host is not predicted here.
        """
        self._lasted_ns = outcome.duration_ns
        rows, iteration_ns = plan.rows, outcome.iteration_ns or (outcome.duration_ns,)
        first, self._noted = self._noted, self._noted + len(iteration_ns)
        has_prompt = _is_prompt(rows[-1])
        is_mixed = has_prompt and not _is_prompt(rows[0])
        if plan.swaps_in or plan.swaps_out or (self._mixed.is_trusted and not is_mixed):
            return
        if is_mixed or has_prompt:
            predicted_ns = self.cost.predict_ns(self._sum_rows(rows))
            (self._mixed if is_mixed else self._other).note(iteration_ns[0], predicted_ns)
            return
        # Of many iterations in one go, those that single steps would have looked at, and of those
        # the last, because the window forgets the others.
        looked_at = range(-first % _DECODE_STRIDE, len(iteration_ns), _DECODE_STRIDE)
        for ahead in looked_at[-_WINDOW:]:
            totals = self._sum_rows(rows, ahead)
            self._other.note(iteration_ns[ahead], self.cost.predict_ns(totals))

    def get_limit_ns(self, itl_ns: int) -> int:
        """The longest predicted time that is believed to keep a measured one within itl_ns."""
        correction = self._mixed if self._mixed.is_trusted else self._other
        known = sorted(self._around_ns)
        around_ns = known[len(known) // 2] if len(known) >= _TRUSTED else 0
        return max(1, itl_ns - around_ns) * ONE // correction.upper

    def sum_decodes(self, positions: Many[int]) -> StepTotals:
        """Totals of a decode at each of the positions, rounded up to the end of their blocks.

        A long batch is summed at every step with a prompt, and get_row_totals and add_totals for
        each of its rows would take most of a plan's time.
        """
        known, pairs, keys = self._decodes, 0, 0
        for position in positions:
            block = position // BLOCK_TOKENS
            entry = known.get(block)
            if entry is None:
                last = block * BLOCK_TOKENS + BLOCK_TOKENS - 1
                totals = self.cost.get_row_totals(1, last, 1)
                entry = known[block] = (totals.pairs, totals.keys)
            pairs += entry[0]
            keys += entry[1]
        count = len(positions)
        return StepTotals(count, count, count, pairs, keys, pairs, keys)

    def _sum_rows(self, rows: tuple[Row, ...], ahead: int = 0) -> StepTotals:
        """Totals of a plan's rows, decodes `ahead` iterations later."""
        totals = self.sum_decodes([row.start + ahead for row in rows if len(row.tokens) == 1])
        for row in rows:
            if len(row.tokens) > 1:
                sampled = len(row.scored) + (0 if row.sampling is None else 1 + row.drafts)
                count = len(row.tokens)
                more = self.cost.get_row_totals(count, row.start, min(count, sampled))
                totals = add_totals(totals, more)
        return totals


class TargetRoom:
    """The room of one step under a TargetPace; nothing is predicted unless a prompt asks.

    Rows that are added before that are decodes with drafts.
    """

    __slots__ = (
        "_decodes",
        "_left",
        "_limit_ns",
        "_pace",
        "_placed",
        "_totals",
        "_verge",
        "newcomers",
        "wake_ns",
    )

    def __init__(self, pace: TargetPace, load: Load) -> None:
        self.newcomers = EVERYBODY
        self.wake_ns = 0
        self._pace = pace
        self._decodes = load.decodes
        self._left = pace.step_tokens - len(load.decodes)
        self._limit_ns = -1  # not asked for yet; 0 for no limit
        self._totals = StepTotals()
        self._placed = 0
        self._verge = EVERYBODY  # prompt tokens with which the step reaches its limit

    def get_tokens(self, start: int, wanted: int) -> int:
        """Most tokens of one more prompt row that begins at position `start`."""
        if self._limit_ns < 0:
            self._measure()
        most = min(wanted, self._left)
        if most <= 0 or self._placed >= self._verge:
            return 0
        if not self._limit_ns:
            return most
        found = self._find(start, most)
        if found < most:
            self._verge = self._placed + found
        return found

    def add(self, start: int, tokens: int) -> None:
        """Count a row in."""
        if self._limit_ns:
            row = self._pace.cost.get_row_totals(tokens, start, 1)
            self._totals = add_totals(self._totals, row)
        if self._limit_ns < 0:
            self._left -= tokens - 1
        else:
            self._left -= tokens
            self._placed += tokens

    def _measure(self) -> None:
        """Sum the decodes up and find the tightest of their targets."""
        default_ns = self._pace.itl_ns
        targets = [request.itl_ns or default_ns for _, request in self._decodes]
        itl_ns = min((target for target in targets if target), default=0)
        self._limit_ns = itl_ns and max(1, self._pace.get_limit_ns(itl_ns))
        if itl_ns:
            decodes = self._pace.sum_decodes([position for position, _ in self._decodes])
            self._totals = add_totals(self._totals, decodes)

    def _find(self, start: int, most: int) -> int:
        cost, totals = self._pace.cost, self._totals

        def predict(tokens: int) -> int:
            return cost.predict_ns(add_totals(totals, cost.get_row_totals(tokens, start, 1)))

        found = find_most_tokens(predict, most, self._limit_ns)
        if found or self._placed:
            return found
        for tokens in range(BLOCK_TOKENS - LEAST_TOKENS, LEAST_TOKENS, -LEAST_TOKENS):
            if tokens < most and predict(tokens) <= self._limit_ns:
                return tokens
        return min(LEAST_TOKENS, most)


class Correction:
    """By how much measured times exceed predicted ones, robustly, as multiples of 1 / ONE.

    upper: the median of the last ratios and a margin for their spread (see TargetPace). is_trusted:
    whether there are enough of them; until then upper is that of no error at all, and an eighth.
    """

    __slots__ = ("_next", "_ratios", "upper")

    def __init__(self) -> None:
        self._ratios: list[int] = []
        self._next = 0
        self.upper = ONE + ONE // 8

    @property
    def is_trusted(self) -> bool:
        """True once there are a few ratios."""
        return len(self._ratios) >= _TRUSTED

    def note(self, measured_ns: int, predicted_ns: int) -> None:
        """One more step."""
        ratio = max(1, measured_ns * ONE // predicted_ns)
        if len(self._ratios) < _WINDOW:
            self._ratios.append(ratio)
        else:
            self._ratios[self._next] = ratio
            self._next = (self._next + 1) % _WINDOW
        if self.is_trusted:
            middle = len(self._ratios) // 2
            median = sorted(self._ratios)[middle]
            deviation = sorted([abs(each - median) for each in self._ratios])[middle]
            self.upper = median + max(4 * deviation, median // 12, 1)


def find_most_tokens(predict: Callable[[int], int], most: int, limit_ns: int) -> int:
    """The most tokens that predict(tokens) lets pass within limit_ns: `most`, else whole blocks.

    By false position in its Illinois form (Dowell & Jarratt 1971): times are convex in the tokens
    and straight but for a few bends, so it takes about six predictions where not all fits. Where
    those that are left of MAX_PREDICTIONS would only just do for it, the geometric mean is tried
    instead, so that what is returned is within a tenth and two blocks of the most that fits. 0 when
    one block does not fit.
    """
    over_ns = predict(most)
    if over_ns <= limit_ns:
        return most
    low, high = BLOCK_TOKENS, most
    if high <= low or (under_ns := predict(low)) > limit_ns:
        return 0
    went_up = False
    for left in range(MAX_PREDICTIONS - 2, 0, -1):
        if high - low <= BLOCK_TOKENS:
            break
        if _count_halvings(low, high) >= left:
            guess = math.isqrt(low * high)
        else:
            guess = low + (limit_ns - under_ns) * (high - low) // (over_ns - under_ns)
        guess = guess // BLOCK_TOKENS * BLOCK_TOKENS
        guess = max(low + BLOCK_TOKENS, min(guess, (high - 1) // BLOCK_TOKENS * BLOCK_TOKENS))
        time_ns = predict(guess)
        if time_ns <= limit_ns:
            low, under_ns = guess, time_ns
            if went_up:  # twice from below: pull the other end nearer
                over_ns = limit_ns + max(1, (over_ns - limit_ns) // 2)
            went_up = True
        else:
            high, over_ns, went_up = guess, time_ns, False
    return low


def _count_halvings(low: int, high: int) -> int:
    """Geometric means that leave `high` within a tenth and two blocks of `low`, whichever counts.

    One more than exact ones would need, for they are rounded to blocks.
    """
    if high <= low + low // 10 + 2 * BLOCK_TOKENS:
        return 0
    ratio = high / low
    halvings = 1
    while ratio > 1.1:
        ratio = math.sqrt(ratio)
        halvings += 1
    return halvings


def get_least_itl_ns(cost: StepCost) -> int:
    """The predicted time of a step with one decode and nothing else: no target can be smaller."""
    return cost.predict_ns(cost.get_row_totals(1, 0, 1))


def _is_prompt(row: Row) -> bool:
    return len(row.tokens) - row.drafts > 1
