"""Where the values of a recorded forward pass live: values whose lives do not overlap share memory.

Pure bookkeeping over widths; it allocates and runs nothing. Every backend that records uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Place:
    """An interval of an arena, in values a row. `arena` names which one."""

    arena: str
    start: int
    width: int

    def overlaps(self, other: Place) -> bool:
        """True when the two share memory."""
        return (
            self.arena == other.arena
            and self.start < other.start + other.width
            and other.start < self.start + self.width
        )


@dataclass(slots=True)
class PlaceAllocator:
    """First-fit allocation of places in one arena; `width` is the arena's size so far."""

    arena: str
    free: list[tuple[int, int]] = field(default_factory=list)
    width: int = 0

    def take(self, width: int) -> Place:
        """A free place of this width, at the lowest start."""
        for index, (start, size) in enumerate(self.free):
            if size >= width:
                self.free[index : index + 1] = (
                    [(start + width, size - width)] if size > width else []
                )
                return Place(self.arena, start, width)
        start = self.width
        self.width += width
        return Place(self.arena, start, width)

    def give_back(self, place: Place) -> None:
        """Frees a place, joining it with free neighbours."""
        self.free.append((place.start, place.width))
        self.free.sort()
        joined: list[tuple[int, int]] = []
        for start, size in self.free:
            if joined and joined[-1][0] + joined[-1][1] == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        self.free = joined


def find_last_uses(uses: Sequence[Iterable[int]]) -> dict[int, int]:
    """For every slot, the index of the last call that uses it."""
    return {slot: index for index, slots in enumerate(uses) for slot in slots}
