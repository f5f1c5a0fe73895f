"""The partition of text at special tokens, against the plain rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twostroke.text.special import SpecialMatcher

PIECES = st.text("ab<é", min_size=1, max_size=9)


def split_plainly(text: str, tokens: list[str]) -> list[int | str]:
    """Cut the text at each token in turn, longest first, only where it is still text."""
    pieces: list[int | str] = [text]
    order = sorted(range(len(tokens)), key=lambda token: (-len(tokens[token].encode()), token))
    for token in order:
        after: list[int | str] = []
        for piece in pieces:
            if isinstance(piece, int):
                after.append(piece)
                continue
            for at, part in enumerate(piece.split(tokens[token])):
                after += [token, part] if at else [part]
        pieces = after
    return [piece for piece in pieces if piece != ""]


@given(st.lists(PIECES, unique=True, max_size=8), st.data())
def test_longer_tokens_win_over_the_whole_text(tokens: list[str], data: st.DataObject) -> None:
    parts = st.sampled_from([*tokens, "a", "b", "<", "é"])
    text = data.draw(st.lists(parts).map("".join))
    matcher = SpecialMatcher(enumerate(tokens))
    assert matcher.split(text) == split_plainly(text, tokens)


@given(st.lists(st.sampled_from([f"<unused{n}>" for n in range(60)] + ["<", "x", "<unused"])))
def test_many_tokens_with_one_beginning_are_found_alike(parts: list[str]) -> None:
    tokens = [f"<unused{n}>" for n in range(50)]
    text = "".join(parts)
    assert SpecialMatcher(enumerate(tokens)).split(text) == split_plainly(text, tokens)


def test_a_shorter_token_takes_nothing_a_longer_one_could_have() -> None:
    matcher = SpecialMatcher([(0, "ab"), (1, "bcd")])
    assert matcher.split("abcd") == ["a", 1]


def test_runs_are_taken_in_the_longest_pieces() -> None:
    matcher = SpecialMatcher((size, "\n" * size) for size in range(1, 32))
    assert matcher.split("x" + "\n" * 40) == ["x", 31, 9]
    assert matcher.split("\n" * 100_000) == [31] * 3225 + [25]


def test_no_tokens_leave_the_text_whole() -> None:
    assert SpecialMatcher([]).split("text") == ["text"]
    assert SpecialMatcher([(0, "")]).split("") == []
