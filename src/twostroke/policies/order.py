"""Orders by name: who is admitted first, gets a chunk first, and is preempted last.

Each is an `Order` of core/policy.py: rank, smaller first, with order of arrival behind it. An order
that needs to know when a request came notes it at the first rank and drops it when the last of the
request's continuations has ended, so memory is bounded by the live requests. Ranks are integers and
depend on the calls made so far alone: no clock, no random number.

Whether a request can starve is said with each order. Strict priority is in core/policy.py.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from twostroke.core.policy import Rank
from twostroke.core.types import Request
from twostroke.errors import InvalidParameter
from twostroke.spec.cost import StepCost

# One level of priority is worth ten seconds of waiting: longer than a request waits while the
# engine keeps up, so levels then hold strictly, and short enough for a person to wait a few levels.
AGE_NS = 10_000_000_000

# A request without a deadline is treated as due after half a minute: beyond any target for a first
# token that somebody would wait for, so whoever names a target goes before it.
HORIZON_NS = 30_000_000_000

_MAX_TENANTS = 1_024

Value = TypeVar("Value")


class _Notes(Generic[Value]):
    """A value for each live request, dropped when its last continuation ends."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Value, int]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, request: Request) -> Value | None:
        """What was kept, or None."""
        entry = self._kept.get(request.id)
        return None if entry is None else entry[0]

    def keep(self, request: Request, value: Value) -> Value:
        """Keep `value` and return it."""
        self._kept[request.id] = (value, request.n)
        return value

    def drop(self, request: Request) -> None:
        """One continuation has ended."""
        entry = self._kept.pop(request.id, None)
        if entry is not None and entry[1] > 1:
            self._kept[request.id] = (entry[0], entry[1] - 1)


class FirstCome:
    """In order of arrival; whoever waits is overtaken by nobody."""

    changes = False

    def rank(self, request: Request, computed: int, new_tokens: int, now: int) -> Rank:
        """The same for all: the scheduler appends the order of arrival."""
        return ()

    def end(self, request: Request, new_tokens: int) -> None:
        """Nothing to note."""


class AgeingPriority:
    """Smaller `Request.priority` first, but every `age_ns` of waiting makes up for one level.

    The rank is arrival + priority * age_ns and stays what it was, so that waiting lines never need
    sorting anew. Nothing starves: a request of priority p goes before every request of priority q
    that arrives more than (p - q) * age_ns after it, so with q as the most urgent priority in use
    the requests that may overtake it are at most those that arrive within that time.
    Raises InvalidParameter when age_ns is below 1.
    """

    changes = False

    def __init__(self, age_ns: int = AGE_NS) -> None:
        if age_ns < 1:
            raise InvalidParameter("age_ns", f"must be at least 1, not {age_ns}")
        self.age_ns = age_ns
        self._arrivals: _Notes[int] = _Notes()

    def rank(self, request: Request, computed: int, new_tokens: int, now: int) -> Rank:
        """When the request would have arrived to stand where it stands at priority 0."""
        arrival_ns = self._arrivals.find(request)
        if arrival_ns is None:
            arrival_ns = self._arrivals.keep(request, now)
        return (arrival_ns + request.priority * self.age_ns,)

    def end(self, request: Request, new_tokens: int) -> None:
        """Drop what was noted."""
        self._arrivals.drop(request)


class ShortestRemaining:
    """Fewest predicted new tokens left first (Schrage 1968, with a prediction for the length).

    The prediction is the request's own `expected_tokens`; else the running mean of the lengths at
    which its tenant's continuations ended, else everybody's, else `max_new_tokens`, which also caps
    it. It is made once, on arrival. A request that outlives its prediction counts as one token
    short of its end: it is probably nearly done, and it holds the most KV. Long requests may wait
    for as long as shorter ones keep coming: that is the price of the least mean waiting time.
    """

    changes = True

    def __init__(self) -> None:
        self._predicted: _Notes[int] = _Notes()
        self._tenants: dict[str, int] = {}  # running mean length in 16ths of a token
        self._everybody = 0

    def rank(self, request: Request, computed: int, new_tokens: int, now: int) -> Rank:
        """The predicted number of new tokens still to come, at least 1."""
        predicted = self._predicted.find(request)
        if predicted is None:
            predicted = self._predicted.keep(request, self._predict(request))
        return (max(1, predicted - new_tokens),)

    def end(self, request: Request, new_tokens: int) -> None:
        """Learn from the length; one that ended before its first token teaches nothing."""
        self._predicted.drop(request)
        if new_tokens > 0:
            mean = _follow(self._tenants.pop(request.tenant, 0), new_tokens)
            self._tenants[request.tenant] = mean  # at the end: the first is the longest unseen
            self._everybody = _follow(self._everybody, new_tokens)
            if len(self._tenants) > _MAX_TENANTS:
                del self._tenants[next(iter(self._tenants))]

    def _predict(self, request: Request) -> int:
        mean = self._tenants.get(request.tenant, 0) or self._everybody
        learned = (mean + 8) // 16 or request.max_new_tokens
        return min(request.expected_tokens or learned, request.max_new_tokens)


class EarliestDeadline:
    """Earliest deadline for the first token first (Liu & Layland 1973, §7).

    The deadline is arrival + `Request.ttft_ns`, or + `horizon_ns` where the request names none. A
    request that can no longer meet its own, because what is left of its prompt is predicted to take
    longer than that even alone and in one step, would spend the time of others in vain: it counts
    as due `horizon_ns` later, until its first token. Ranks therefore lag arrival by at most ttft +
    horizon, so nothing starves: nobody who arrives later than that after a request overtakes it.
    Raises InvalidParameter when horizon_ns is below 1.
    """

    changes = True

    def __init__(self, cost: StepCost, horizon_ns: int = HORIZON_NS) -> None:
        if horizon_ns < 1:
            raise InvalidParameter("horizon_ns", f"must be at least 1, not {horizon_ns}")
        self.horizon_ns = horizon_ns
        self._cost = cost
        self._deadlines: _Notes[int] = _Notes()

    def rank(self, request: Request, computed: int, new_tokens: int, now: int) -> Rank:
        """When the first token is due."""
        deadline_ns = self._deadlines.find(request)
        if deadline_ns is None:
            due_ns = now + (request.ttft_ns or self.horizon_ns)
            deadline_ns = self._deadlines.keep(request, due_ns)
        if new_tokens == 0 and request.ttft_ns:
            left = self._cost.get_row_totals(max(1, len(request.prompt) - computed), computed, 1)
            if now + self._cost.predict_ns(left) > deadline_ns:
                deadline_ns += self.horizon_ns
        return (deadline_ns,)

    def end(self, request: Request, new_tokens: int) -> None:
        """Drop what was noted."""
        self._deadlines.drop(request)


def _follow(mean: int, new_tokens: int) -> int:
    """A running mean in 16ths of a token: an eighth of the way to the new length; 0 is unset."""
    length = 16 * new_tokens
    return mean + (length - mean) // 8 if mean else length
