"""Arrays of strings in a GGUF file, a quarter of a million at a time, without a loop over them.

    u64 length | bytes | u64 length | bytes | …

Where a string begins follows only from the one before it, so a reader must go through them one by
one. Nearly all lengths are below 256 though, and look like one: a byte and seven zeros. So all
places that look so are found at once, and then it is checked that each leads to the next. What
passes is the one way to read the array, and what does not is read one by one.
"""

from __future__ import annotations

from mmap import mmap

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]

_BLOCK_BYTES = 2**18
_CHECKED_AT_ONCE = 4096
_MIX = np.uint64(0x9E3779B97F4A7C15)


def find_run(mapping: mmap, position: int, most: int) -> I64:
    """Where up to `most` strings begin, their lengths first, from `position` on.

    Only as many as are certain: perhaps none. They may reach beyond the end of the file.
    """
    size = min(_BLOCK_BYTES, len(mapping) - 7 - position)
    if size <= 0:
        return np.zeros(0, np.int64)
    places = np.flatnonzero(_view_words(mapping, position, size) < 256)[:most]
    if not places.size or places[0]:
        return np.zeros(0, np.int64)
    lengths = np.frombuffer(mapping, np.uint8, size, position)[places]
    wrong = np.flatnonzero(places[1:] != places[:-1] + 8 + lengths[:-1])
    certain: I64 = places[: wrong[0] + 1] if wrong.size else places
    return certain + position


def find_not_utf8(mapping: mmap, starts: I64, ends: I64) -> int | None:
    """Index of the first text that is not UTF-8. Texts have eight bytes of length before them."""
    wide = bool(starts.size) and int((ends - starts).max()) >= 2**16
    for first in range(0, len(starts), _CHECKED_AT_ONCE):
        last = min(first + _CHECKED_AT_ONCE, len(starts))
        begin, end = int(starts[first]) - 8, int(ends[last - 1])
        region = bytearray(mapping[begin:end])
        # With zeros for the lengths, the whole is UTF-8 just if each text is.
        view, prefixes = np.frombuffer(region, np.uint8), starts[first:last] - 8 - begin
        for byte in range(8 if wide else 2):
            view[prefixes + byte] = 0
        try:
            region.decode()
        except UnicodeDecodeError as error:
            return first + int(np.searchsorted(prefixes, error.start, "right")) - 1
    return None


def may_repeat(mapping: mmap, starts: I64, ends: I64) -> bool:
    """False only when all texts differ."""
    if not starts.size or int(ends[-1]) + 8 > len(mapping):
        return True
    words = _view_words(mapping, 0, len(mapping) - 7)
    left = ends - starts
    hashes = left.astype(np.uint64) * _MIX
    rest = np.arange(len(starts))
    at = starts
    while rest.size:
        word = words[at]
        short = left < 8
        unused = (8 * (8 - left[short])).astype(np.uint64)
        word[short] = np.where(unused < 64, word[short] << unused % 64, 0)
        mixed = (hashes[rest] ^ word) * _MIX
        hashes[rest] = mixed ^ mixed >> np.uint64(29)
        longer = left > 8
        rest, at, left = rest[longer], at[longer] + 8, left[longer] - 8
    hashes.sort()
    return bool((hashes[1:] == hashes[:-1]).any())


def _view_words(mapping: mmap, position: int, count: int) -> NDArray[np.uint64]:
    """The eight bytes at each of `count` neighbouring positions, as numbers."""
    return np.ndarray((count,), "<u8", mapping, position, (1,))
