"""The streaming decoder against a plain model of what it promises."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.errors import InvalidParameter
from twostroke.text.stops import StopMatcher
from twostroke.text.stream import StreamDecoder
from twostroke.text.tokenizer import Tokenizer, build_tokenizer
from vocabularies import make_byte_bpe, make_sentencepiece

KINDS = ["bytes", "pieces", "prefixed"]
# Few different characters, so that stop strings overlap, nest and nearly match all the time.
STOPS = st.lists(st.text("ab é中\ufffd", min_size=1, max_size=5), max_size=4)


@functools.cache
def get_tokenizer(kind: str) -> Tokenizer:
    """One of the small test tokenizers."""
    if kind == "bytes":
        return build_tokenizer(make_byte_bpe(["ab", " a", "aé", "é中", "bb ", "中"]))
    pieces = {
        piece: -float(rank) for rank, piece in enumerate(["ab", "▁a", "aé", "▁", "a", "b", "é"])
    }
    return build_tokenizer(make_sentencepiece(pieces, add_space_prefix=kind == "prefixed"))


@st.composite
def token_streams(draw: st.DrawFn) -> tuple[Tokenizer, list[int]]:
    """Tokens of one tokenizer, mostly of one small alphabet, some of them broken bytes."""
    tokenizer = get_tokenizer(draw(st.sampled_from(KINDS)))
    usual = [token for text in "ab é中" for token in tokenizer.encode(text, add_special=False)]
    usual += range(tokenizer.vocab_size - 10, tokenizer.vocab_size)
    anything = st.integers(0, tokenizer.vocab_size - 1)
    return tokenizer, draw(st.lists(st.sampled_from(usual) | anything, max_size=40))


def find_stop(text: str, stops: Sequence[str]) -> tuple[int, str]:
    """Where the text ends, and which stop string ended it: the plain rule, or (-1, "")."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return end - len(longest), longest
    return -1, ""


@settings(max_examples=400, deadline=None)
@given(token_streams(), STOPS, st.booleans(), st.booleans())
def test_streamed_text_is_the_text_up_to_the_first_stop(
    stream: tuple[Tokenizer, list[int]], stops: list[str], skip: bool, after_prompt: bool
) -> None:
    tokenizer, tokens = stream
    decoder = StreamDecoder(tokenizer, stops, skip, after_prompt=after_prompt)
    shown = "".join([*map(decoder.feed, tokens), decoder.finish()])
    whole = tokenizer.decode(tokens, skip_special=skip, after_prompt=after_prompt)
    end, stop = find_stop(whole, stops)
    assert shown == (whole[:end] if stop else whole)
    assert (decoder.stopped, decoder.stop) == (bool(stop), stop)


@given(token_streams(), STOPS)
def test_nothing_is_held_back_that_cannot_begin_a_stop(
    stream: tuple[Tokenizer, list[int]], stops: list[str]
) -> None:
    tokenizer, tokens = stream
    plain, careful = StreamDecoder(tokenizer), StreamDecoder(tokenizer, stops)
    known = shown = ""
    for token in tokens:
        known += plain.feed(token)
        shown += careful.feed(token)
        if not careful.stopped:
            begun = (
                size
                for stop in stops
                for size in range(1, len(stop))
                if known.endswith(stop[:size])
            )
            assert len(known) - len(shown) == max(begun, default=0)


def test_a_character_is_shown_when_its_last_byte_arrives() -> None:
    tokenizer = get_tokenizer("pieces")
    bytes_of = [3 + byte for byte in "中".encode()]
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(token) for token in bytes_of] == ["", "", "中"]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    decoder = StreamDecoder(get_tokenizer("pieces"))
    assert decoder.feed(3 + 0xE4) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


def test_a_stop_that_spans_tokens_is_never_shown() -> None:
    tokenizer = get_tokenizer("bytes")
    decoder = StreamDecoder(tokenizer, ["bab"])
    tokens = [token for text in "abab" for token in tokenizer.encode(text)]
    assert [decoder.feed(token) for token in tokens] == ["a", "", "", ""]
    assert decoder.stop == "bab"
    assert decoder.finish() == ""


def test_the_stop_that_ends_first_counts_then_the_longest() -> None:
    tokenizer = get_tokenizer("bytes")
    for stops, text, stop in (
        (["ab", "abb"], "", "ab"),
        (["bb", "abb"], "", "abb"),
        (["bb", "a b"], "a", "bb"),
        (["b", "bbb"], "a", "b"),
    ):
        decoder = StreamDecoder(tokenizer, stops)
        shown = "".join(map(decoder.feed, tokenizer.encode("abb a b")))
        assert (shown + decoder.finish(), decoder.stop) == (text, stop)


def test_held_text_is_shown_at_the_end() -> None:
    tokenizer = get_tokenizer("bytes")
    decoder = StreamDecoder(tokenizer, ["abc"])
    assert "".join(map(decoder.feed, tokenizer.encode("aab"))) == "a"
    assert decoder.finish() == "ab"


def test_the_first_space_belongs_to_the_model_only_after_a_prompt() -> None:
    tokenizer = get_tokenizer("prefixed")
    tokens = tokenizer.encode("a a", add_special=False)
    shown = {
        after: "".join(map(StreamDecoder(tokenizer, after_prompt=after).feed, tokens))
        for after in (True, False)
    }
    assert shown == {True: " a a", False: "a a"}


@pytest.mark.parametrize("stop", ["", "\ud800", 5, None])
def test_stops_that_are_no_text_are_refused(stop: object) -> None:
    with pytest.raises(InvalidParameter, match="stop"):
        StreamDecoder(get_tokenizer("bytes"), ["a", stop])  # type: ignore[list-item]


def test_an_id_out_of_range_changes_nothing() -> None:
    tokenizer = get_tokenizer("pieces")
    decoder = StreamDecoder(tokenizer)
    first, second, third = (3 + byte for byte in "中".encode())
    decoder.feed(first)
    with pytest.raises(InvalidParameter, match="token"):
        decoder.feed(tokenizer.vocab_size)
    assert [decoder.feed(second), decoder.feed(third)] == ["", "中"]


@given(STOPS.filter(bool), st.text("ab é中", max_size=60))
def test_work_per_character_is_constant_on_average(stops: list[str], text: str) -> None:
    """Each fallback shortens what is held and each character lengthens it by one at most."""
    matcher = StopMatcher(stops)
    state = depth_sum = 0
    for character in text:
        before = matcher.depths[state]
        state = matcher.step(state, character)
        assert matcher.depths[state] <= before + 1
        depth_sum += matcher.depths[state] - before
    assert depth_sum == matcher.depths[state]
