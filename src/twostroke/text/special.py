"""Special tokens: found in raw text before any other rule sees it.

Owns the partition of a text into special tokens and the pieces between them. The longest token
text wins over the whole text, then the lower id, then the leftmost place: so a shorter token never
takes bytes a longer one could have had, even where the shorter begins earlier. Work is linear in
the text for each token that occurs in it, and tokens that do not occur cost almost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_PREFIX_BYTES = 6
_SEARCH_EACH = 32  # up to this many tokens with one beginning are searched for one by one
_TAKEN = b"\xff"  # never part of UTF-8


class _Group:
    """Special tokens that share their first bytes."""

    def __init__(self, prefix: bytes, members: dict[bytes, int]) -> None:
        self.prefix = prefix
        self.members = members
        self._lengths = sorted({len(text) for text in members})

    def find(self, data: bytes) -> Iterator[tuple[bytes, list[int]]]:
        """(token, places in ascending order) for each member that occurs in `data`."""
        at = data.find(self.prefix)
        if at < 0:
            return
        if len(self.members) <= _SEARCH_EACH:
            for text in self.members:
                if text in data:
                    yield text, []
            return
        places: dict[bytes, list[int]] = {}
        while at >= 0:
            for length in self._lengths:
                text = data[at : at + length]
                if len(text) == length and text in self.members:
                    places.setdefault(text, []).append(at)
            at = data.find(self.prefix, at + 1)
        yield from places.items()


class SpecialMatcher:
    """Cuts text at special tokens."""

    def __init__(self, tokens: Iterable[tuple[int, str]]) -> None:
        """tokens: (id, text) pairs; empty texts are left out."""
        by_prefix: dict[bytes, dict[bytes, int]] = {}
        for token, text in tokens:
            data = text.encode("utf-8")
            if data:
                by_prefix.setdefault(data[:_PREFIX_BYTES], {}).setdefault(data, token)
        self._groups = [_Group(prefix, members) for prefix, members in by_prefix.items()]

    def split(self, text: str) -> list[int | str]:
        """The text in order, as special token ids and the non-empty pieces between them.

        text: must hold no lone surrogate.
        """
        data = text.encode("utf-8")
        found = [
            (-len(token), group.members[token], token, places)
            for group in self._groups
            for token, places in group.find(data)
        ]
        if not found:
            return [text] if text else []
        rest = bytearray(data)
        hits: list[tuple[int, int, int]] = []
        for negative, token, literal, places in sorted(found):
            for at in places or _occurrences(rest, literal):
                if rest.startswith(literal, at):
                    rest[at : at - negative] = _TAKEN * -negative
                    hits.append((at, at - negative, token))
        return list(_pieces(data, sorted(hits)))


def _occurrences(data: bytearray, literal: bytes) -> Iterator[int]:
    """Places of `literal`, left to right, each searched for only when the last was dealt with."""
    at = data.find(literal)
    while at >= 0:
        yield at
        at = data.find(literal, at + len(literal))


def _pieces(data: bytes, hits: list[tuple[int, int, int]]) -> Iterator[int | str]:
    end = 0
    for start, stop, token in hits:
        if start > end:
            yield data[end:start].decode("utf-8")
        yield token
        end = stop
    if end < len(data):
        yield data[end:].decode("utf-8")
