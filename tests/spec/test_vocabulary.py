"""Texts in a buffer behave as a list of strings does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twostroke.spec.vocabulary import Texts

LISTS = st.lists(st.text("ab é中", max_size=5))


@given(LISTS)
def test_texts_are_those_that_were_joined(texts: list[str]) -> None:
    joined = Texts.join(texts)
    assert list(joined) == texts
    assert len(joined) == len(texts)
    assert joined[1:3] == texts[1:3]
    assert [joined[at] for at in range(-len(texts), 0)] == texts
    assert joined == texts


@given(LISTS, st.text("ab é中", max_size=5))
def test_a_text_is_in_them_just_if_it_is_one_of_them(texts: list[str], sought: str) -> None:
    joined = Texts.join(texts)
    assert (sought in joined) == (sought in texts)
    assert all(text in joined for text in texts)
