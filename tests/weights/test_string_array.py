"""Arrays of strings, many at a time: what a loop over them would read."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twostroke.weights.string_array import I64, find_not_utf8, find_run, may_repeat

# Short and long ones, and such as hold what looks like lengths.
ITEM = st.one_of(
    st.binary(max_size=12),
    st.builds(bytes, st.integers(0, 400)),
    st.integers(0, 2**20).map(struct.Struct("<Q").pack),
    st.text(max_size=8).map(str.encode),
)
ITEMS = st.lists(ITEM, max_size=40)
LEAD, TAIL = b"lead", bytes(range(64))


def store(items: Sequence[bytes]) -> tuple[mmap.mmap, I64, I64]:
    """The items as a file stores them, between other things; where their bytes start and end."""
    content, starts = LEAD, []
    for item in items:
        content += struct.pack("<Q", len(item))
        starts.append(len(content))
        content += item
    mapping = mmap.mmap(-1, len(content) + len(TAIL))
    mapping[:] = content + TAIL
    begins = np.array(starts, np.int64)
    return mapping, begins, begins + np.array([len(item) for item in items], np.int64)


@given(ITEMS, st.integers(0, 50))
def test_a_run_is_a_beginning_of_the_array_as_a_loop_reads_it(
    items: list[bytes], most: int
) -> None:
    mapping, starts, _ = store(items)
    run = find_run(mapping, len(LEAD), min(most, len(items)))
    assert run.tolist() == (starts - 8)[: run.size].tolist()


@given(st.lists(st.text("abcé", min_size=1, max_size=20), min_size=1, max_size=60))
def test_ordinary_strings_are_all_found_at_once(texts: list[str]) -> None:
    mapping, starts, _ = store([text.encode() for text in texts])
    assert find_run(mapping, len(LEAD), len(texts)).tolist() == (starts - 8).tolist()


@given(ITEMS)
def test_the_first_text_that_is_not_utf8_is_named(items: list[bytes]) -> None:
    mapping, starts, ends = store(items)
    expected = None
    for index, item in reversed(list(enumerate(items))):
        try:
            item.decode()
        except UnicodeDecodeError:
            expected = index
    assert find_not_utf8(mapping, starts, ends) == expected


def test_a_character_cut_in_two_is_not_utf8() -> None:
    mapping, starts, ends = store([b"a", "é".encode()[:1], "é".encode()[1:]])
    assert find_not_utf8(mapping, starts, ends) == 1


@given(ITEMS)
def test_texts_are_said_to_differ_just_if_they_do(items: list[bytes]) -> None:
    mapping, starts, ends = store(items)
    if items:
        assert may_repeat(mapping, starts, ends) == (len(set(items)) < len(items))
