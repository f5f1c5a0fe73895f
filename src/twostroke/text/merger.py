"""The merger of a vocabulary: the `tokenizers` library over all of it, or over what a text needs.

The library takes 50 ms to build its tables for 49 thousand tokens and 0.4 s for 262 thousand; a
short text uses a few hundred of them. Merges join neighbours, so only tokens whose spelling occurs
in a text can come out of it, or stand in between. Those tokens, and any others beside them, with
every cut of theirs in the same order, therefore merge that text as the whole vocabulary does. The
first texts of a process are merged so; the whole is built once they add up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twostroke.spec.vocabulary import Texts
from twostroke.text.merges import Cuts

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

# Making a part takes about as long as the whole of a sixteenth of the tokens, and of one more token
# for each character of the text. Parts are made until they have cost as much as the whole will.
_PARTS = 16
_NEIGHBOURS = 3
_HASH_BITS = 18

Letters = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class MergeRules:
    """What differs between kinds of vocabularies.

    make: the library's object for tokens (ids by text) and merges. spell: a piece of text as tokens
    spell it. always: spellings whose tokens `make` looks at, whatever the text.
    """

    make: Callable[[dict[str, int], list[tuple[str, str]]], Library]
    spell: Callable[[str], str]
    always: tuple[str, ...]


class Merger:
    """Merges pieces of text. Safe to use from several threads."""

    def __init__(self, texts: Texts, cuts: Cuts, rules: MergeRules) -> None:
        """texts: of all tokens, by id. cuts: all of them, in order of rank."""
        self._texts = texts
        self._cuts = cuts
        self._rules = rules
        self._lock = threading.Lock()
        self._whole: list[Library] = []
        self._parts_left = len(texts)

    def merge(self, pieces: Sequence[str]) -> list[list[int]]:
        """Token ids of each piece."""
        library = self._get_library(pieces)
        return [library.encode(piece, add_special_tokens=False).ids for piece in pieces]

    def prepare(self) -> None:
        """Build the whole now, so that no text waits for it."""
        with self._lock:
            if not self._whole:
                texts = list(self._texts)
                ids = {text: token for token, text in enumerate(texts)}
                self._whole.append(self._rules.make(ids, self._cuts.get_pairs(texts)))

    def _get_library(self, pieces: Sequence[str]) -> Library:
        self._parts_left -= len(self._texts) // _PARTS + sum(map(len, pieces))
        if not self._whole and self._parts_left >= 0:
            return self._make_part(pieces)
        self.prepare()
        return self._whole[0]

    def _make_part(self, pieces: Sequence[str]) -> Library:
        spelled = "\0".join([*map(self._rules.spell, pieces), *self._rules.always])
        texts = {token: self._texts[token] for token in find_tokens(self._texts, spelled)}
        ids = {text: token for token, text in texts.items()}
        return self._rules.make(ids, self._cuts.get_pairs_of(texts, len(self._texts)))


def find_tokens(texts: Texts, spelled: str) -> list[int]:
    """Ids, ascending, of all tokens whose text occurs in `spelled`, and of some more.

    With a token, both halves of any cut of it are among them: a token is taken where every byte of
    it, every two and every three neighbours occur. They are compared for all tokens at once.
    """
    data = spelled.encode("utf-8", "surrogatepass")
    letters = np.frombuffer(data, np.uint8)
    # A view of all there is in the buffer: of a mapped file no more is read than is looked at.
    buffer = np.frombuffer(texts.data, np.uint8)
    starts = np.asarray(texts.starts, np.int64)
    lengths = np.asarray(texts.ends, np.int64) - starts
    tokens = np.flatnonzero((lengths > 0) & (lengths <= len(data)))
    occurs = np.zeros((_NEIGHBOURS + 1, 2**_HASH_BITS), np.bool_)
    for count in range(1, _NEIGHBOURS + 1):
        places = np.arange(max(0, len(data) - count + 1))
        occurs[count, _hash_neighbours(letters, places, count)] = True
    at = 0
    while (lengths[tokens] > at).any():
        for count in range(1, _NEIGHBOURS + 1):
            reaches = lengths[tokens] >= at + count
            found = _hash_neighbours(buffer, starts[tokens[reaches]] + at, count)
            reaches[reaches] = ~occurs[count, found]
            tokens = tokens[~reaches]
        at += 1
    ids: list[int] = tokens.tolist()
    return ids


def _hash_neighbours(buffer: Letters, places: NDArray[np.int64], count: int) -> NDArray[np.uint32]:
    """A number below 2^_HASH_BITS for the `count` bytes, at most 3, from each place on."""
    hashes = buffer[places].astype(np.uint32)
    for at in range(1, count):
        hashes = hashes << np.uint32(5) ^ buffer[places + at]
    return hashes
