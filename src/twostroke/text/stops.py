"""StopMatcher: finds the first stop string in a text that arrives character by character.

Aho and Corasick (1975): one state a character, whatever the number of stop strings. The state is
the longest end of the text so far that begins some stop string, so its length is exactly how much
must be held back. It looks only at characters, never at how they were grouped on arrival.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """The automaton of a set of stop strings; immutable, so one serves many texts.

    States are numbered from 0, the start. `depths[state]` is how many characters of the text the
    state holds back; `matched[state]` is the longest stop string that ends there, or "".
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: non-empty strings."""
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depths = [0]
        self.matched = [""]
        for stop in stops:
            self._add(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depths.append(self.depths[state] + 1)
                self.matched.append("")
            state = self._next[state][character]
        self.matched[state] = stop

    def _link(self) -> None:
        """Set each state's fallback, the next shorter end that begins a stop, nearest first."""
        queue = [0]
        for state in queue:
            for character, child in self._next[state].items():
                queue.append(child)
                if state:
                    self._fallback[child] = self.step(self._fallback[state], character)
                self.matched[child] = self.matched[child] or self.matched[self._fallback[child]]
