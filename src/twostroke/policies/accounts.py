"""Fair shares among tenants: the virtual token counter of Sheng et al. (OSDI 2024, Algorithm 2).

Owns one counter a tenant: what it has had of the service, in weighted tokens. Whoever waits and has
had the least goes first. A tenant that comes back is lifted to the least of those who wait, so
nobody saves up service by staying away. While tenants f and g both have requests waiting, what
they get in any span of time differs by at most 2 * max(w_p * L, w_q * M) (Theorem 4.4), with L the
longest prompt, M the most tokens a running batch holds, and w_p, w_q the weights below.

The level of lifting never falls: so a counter at or below it says nothing that the level does not,
and a tenant that stays away is forgotten without loss.
"""

from __future__ import annotations

from collections.abc import Iterable

from twostroke.errors import InvalidParameter

# A new token reads all weights for few rows, a prompt's for many: the paper's 1 and 2 (§5.1).
INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2

_GENERATION = 1_024
_MAX_AWAY = 64 * _GENERATION


class VirtualTokenCounter:
    """Counters of weighted tokens, an `Accounts` of core/policy.py.

    Raises InvalidParameter when a weight is negative, or both are 0 and so nothing is counted.
    """

    def __init__(
        self, input_weight: int = INPUT_WEIGHT, output_weight: int = OUTPUT_WEIGHT
    ) -> None:
        if min(input_weight, output_weight) < 0 or input_weight + output_weight == 0:
            weights = f"{input_weight} and {output_weight}"
            raise InvalidParameter("weights", f"must be at least 0 and not both 0, not {weights}")
        self.input_weight = input_weight
        self.output_weight = output_weight
        self._level = 0  # where whoever joins is lifted to, at least
        self._last: str | None = None  # whose request left the waiting line last
        # Tenants heard of lately, and those not heard of since that generation began. Whether one
        # is away for good is nowhere said; that a thousand others came since is a good sign.
        self._near: dict[str, int] = {}
        self._away: dict[str, int] = {}

    def lift(self, tenant: str, waiting: Iterable[str]) -> None:
        """`tenant`, who had nothing waiting, does now; `waiting` are the others who have.

        Its counter becomes at least the least of theirs; when nobody else waits, at least that of
        the tenant whose request was admitted last.
        """
        least = min(map(self.get_debt, waiting), default=None)
        if least is None:
            least = self._level if self._last is None else self.get_debt(self._last)
        self._level = max(self._level, least)
        self._set(tenant, max(self.get_debt(tenant), self._level))

    def get_debt(self, tenant: str) -> int:
        """The tenant's counter, in weighted tokens."""
        debt = self._near.get(tenant)
        return self._away.get(tenant, self._level) if debt is None else debt

    def charge(self, tenant: str, prompt_tokens: int, new_tokens: int) -> None:
        """Add what `tenant` was served: a prompt when it is admitted, other tokens when drawn."""
        if prompt_tokens:
            self._last = tenant
        cost = self.input_weight * prompt_tokens + self.output_weight * new_tokens
        self._set(tenant, self.get_debt(tenant) + cost)

    def _set(self, tenant: str, debt: int) -> None:
        self._near[tenant] = debt
        if len(self._near) > _GENERATION:
            away = {name: old for name, old in self._away.items() if old > self._level}
            self._away = away | self._near
            self._near = {}
            # Beyond any sane number of tenants the longest away are forgiven what they had.
            for name in list(self._away)[: max(0, len(self._away) - _MAX_AWAY)]:
                del self._away[name]
