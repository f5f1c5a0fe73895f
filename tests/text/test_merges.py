"""Merge rules derived from scores, against the plain algorithm."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.text import merges
from twostroke.text.merges import derive_cuts, get_cuts
from twostroke.text.tokenizer import build_tokenizer
from vocabularies import make_sentencepiece

LETTERS = "abc"


def merge_plainly(text: str, scores: dict[str, float]) -> list[str]:
    """Join the neighbours whose text has the highest score, leftmost first, until none is left."""
    parts = list(text)
    while True:
        best = max(
            (
                (scores[left + right], -at)
                for at, (left, right) in enumerate(pairwise(parts))
                if left + right in scores
            ),
            default=None,
        )
        if best is None:
            return parts
        at = -best[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]


@st.composite
def scored_pieces(draw: st.DrawFn) -> dict[str, float]:
    """A vocabulary over three letters with distinct scores in no order whatever."""
    longer = draw(st.sets(st.text(LETTERS, min_size=2, max_size=6), max_size=24))
    pieces = sorted(longer)
    ranks = draw(st.permutations(range(len(pieces))))
    scores = {piece: float(rank) for piece, rank in zip(pieces, ranks, strict=True)}
    return scores | {letter: -100.0 - at for at, letter in enumerate(LETTERS)}


@settings(max_examples=300, deadline=None)
@given(scored_pieces(), st.lists(st.text(LETTERS, max_size=40), min_size=1, max_size=8))
def test_the_highest_score_merges_first(scores: dict[str, float], texts: list[str]) -> None:
    tokenizer = build_tokenizer(make_sentencepiece(scores))
    for text in texts:
        ids = tokenizer.encode(text, add_special=False)
        assert [tokenizer.get_token_text(token) for token in ids] == merge_plainly(text, scores)


@settings(max_examples=100, deadline=None)
@given(scored_pieces())
def test_every_reachable_token_keeps_the_cut_that_makes_it(scores: dict[str, float]) -> None:
    vocabulary = make_sentencepiece(scores)
    kept = {left + right for left, right in derive_cuts(vocabulary).get_pairs(vocabulary.tokens)}
    for piece in scores:
        if len(piece) > 1 and merge_plainly(piece, scores) == [piece]:
            assert piece in kept


def test_cuts_that_never_happen_are_dropped() -> None:
    scores = {"ab": 3.0, "bc": 2.0, "abc": 1.0, "a": 0.0, "b": -1.0, "c": -2.0}
    vocabulary = make_sentencepiece(scores)
    assert derive_cuts(vocabulary).get_pairs(vocabulary.tokens) == [
        ("a", "b"),
        ("b", "c"),
        ("ab", "c"),
    ]


def test_bytes_and_control_tokens_are_never_merged() -> None:
    scores = {"<": 0.0, "s": -1.0, ">": -2.0, "<s": -3.0, "0x41>": -4.0, "<0x41>x": -5.0}
    vocabulary = make_sentencepiece(scores)
    made = {left + right for left, right in derive_cuts(vocabulary).get_pairs(vocabulary.tokens)}
    assert made == {"<s"}


def test_the_cache_gives_what_was_derived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "_get_cache_folder", lambda: tmp_path)
    vocabulary = make_sentencepiece()
    derived = derive_cuts(vocabulary)
    assert get_cuts(vocabulary) == derived
    (path,) = (tmp_path / "tokenizers").iterdir()
    monkeypatch.setattr(merges, "derive_cuts", lambda _: pytest.fail("the cache was not used"))
    assert get_cuts(vocabulary) == derived
    assert path.suffix == ".cuts"


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "magic"])
def test_a_damaged_cache_file_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(merges, "_get_cache_folder", lambda: tmp_path)
    vocabulary = make_sentencepiece()
    derived = get_cuts(vocabulary)
    (path,) = (tmp_path / "tokenizers").iterdir()
    whole = path.read_bytes()
    damaged = {
        "truncate": whole[:-3],
        "flip": whole[:-1] + bytes([whole[-1] ^ 1]),
        "empty": b"",
        "magic": b"X" + whole[1:],
    }
    path.write_bytes(damaged[damage])
    assert get_cuts(vocabulary) == derived
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizers").write_text("a file where a folder should be")
    monkeypatch.setattr(merges, "_get_cache_folder", lambda: tmp_path)
    vocabulary = make_sentencepiece()
    assert get_cuts(vocabulary) == derive_cuts(vocabulary)


def test_vocabularies_with_other_scores_have_other_cache_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merges, "_get_cache_folder", lambda: tmp_path)
    get_cuts(make_sentencepiece({"a": 1.0, "b": 0.0, "ab": 2.0}))
    get_cuts(make_sentencepiece({"a": 1.0, "b": 0.0, "ab": 3.0}))
    assert len(list((tmp_path / "tokenizers").iterdir())) == 2
