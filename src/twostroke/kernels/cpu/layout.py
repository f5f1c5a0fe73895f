"""Where threads must wait.

Pure bookkeeping over a recorded list of calls: a barrier stands only where a call touches memory
that another thread may have written or may still read. It never runs anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twostroke.kernels.places import Place


@dataclass(frozen=True, slots=True)
class Access:
    """One call's use of a place. `by_row`: every thread touches only its own share of the rows."""

    place: Place
    write: bool
    by_row: bool

    def conflicts(self, earlier: Access) -> bool:
        """True when `earlier` must be complete on all threads before this access."""
        if not (self.write or earlier.write) or not self.place.overlaps(earlier.place):
            return False
        same_share = self.by_row and earlier.by_row and self.place == earlier.place
        return not same_share


class BarrierFinder:
    """Decides, call by call, whether a barrier must stand before it."""

    def __init__(self) -> None:
        self._since: list[Access] = []

    def needs_barrier(self, accesses: Sequence[Access]) -> bool:
        """Whether to wait before a call with these accesses; takes note of them."""
        wait = any(access.conflicts(earlier) for access in accesses for earlier in self._since)
        if wait:
            self._since = []
        self._since += accesses
        return wait
