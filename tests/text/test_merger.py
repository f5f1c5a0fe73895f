"""A part of a vocabulary merges a text as the whole does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.spec.vocabulary import Texts, Vocabulary
from twostroke.text import merger
from twostroke.text.merger import find_tokens
from twostroke.text.tokenizer import Tokenizer, build_tokenizer
from vocabularies import END, START, make_byte_bpe, make_sentencepiece

WORDS = (
    "the",
    " the",
    "then",
    "hello",
    " world",
    "ing",
    "été",
    "中文",
    " 中",
    "aaa",
    "\n\n",
    "a b",
)
VOCABULARIES = {
    "byte-level": make_byte_bpe(WORDS),
    "whole words": make_byte_bpe(WORDS, pre="llama-bpe"),
    "user-defined": make_byte_bpe(WORDS, user_defined=["<b>", "a the"]),
    "pieces": make_sentencepiece(),
    "prefixed": make_sentencepiece(add_space_prefix=True, user_defined=["\n\n"]),
}
TEXT = st.lists(
    st.sampled_from([*WORDS, START, END, "<b>", "t", "e", " ", "\0", "▁", "é"])
    | st.text(max_size=4)
).map("".join)


def make_pair(vocabulary: Vocabulary) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer that has built nothing yet, and one that has built the whole."""
    lazy, whole = build_tokenizer(vocabulary), build_tokenizer(vocabulary)
    whole.prepare()
    return lazy, whole


@pytest.mark.parametrize("name", list(VOCABULARIES))
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXT, max_size=3), parse=st.booleans())
def test_a_part_gives_the_ids_of_the_whole(name: str, texts: list[str], parse: bool) -> None:
    lazy, whole = make_pair(VOCABULARIES[name])
    for text in texts:
        expected = whole.encode(text, parse_special=parse)
        assert lazy.encode(text, parse_special=parse) == expected


def test_short_texts_never_build_the_whole_and_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    prepare = merger.Merger.prepare

    def note(self: merger.Merger) -> None:
        built.append("whole")
        prepare(self)

    monkeypatch.setattr(merger.Merger, "prepare", note)
    lazy = build_tokenizer(VOCABULARIES["byte-level"])
    for _ in range(3):
        lazy.encode("the world")
    lazy.encode("")
    assert built == []
    lazy.encode("the " * lazy.vocab_size)
    assert built == ["whole"]


@pytest.mark.parametrize("name", list(VOCABULARIES))
def test_a_long_text_has_the_same_ids_as_ever(name: str) -> None:
    lazy, whole = make_pair(VOCABULARIES[name])
    text = " the world, été" * 400
    assert lazy.encode("the") == whole.encode("the")
    assert lazy.encode(text) == whole.encode(text)
    assert lazy.encode("the") == whole.encode("the")


@given(st.lists(st.text("abc é", max_size=12), max_size=30), st.text("abc é", max_size=40))
def test_all_tokens_that_occur_are_found(tokens: Sequence[str], text: str) -> None:
    found = find_tokens(Texts.join(tokens), text)
    assert {index for index, token in enumerate(tokens) if token and token in text} <= set(found)
    assert found == sorted(found)


@given(st.text("abé", min_size=1, max_size=8), st.text("abcé ", max_size=12))
def test_with_a_token_all_parts_of_it_are_found(token: str, text: str) -> None:
    parts = [token[start:end] for end in range(len(token) + 1) for start in range(end)]
    found = find_tokens(Texts.join([token, *parts]), text)
    assert 0 not in found or found == list(range(len(parts) + 1))


def test_few_others_are_found() -> None:
    words = [f"{first}{second}x{third}" for first in "abcd" for second in "efgh" for third in "ij"]
    found = find_tokens(Texts.join(words), "aexi bfxj")
    assert [words[index] for index in found] == ["aexi", "bfxj"]
