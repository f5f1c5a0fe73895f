"""How each family of pre-tokenisers cuts text."""

from __future__ import annotations

import pytest

from twostroke.errors import UnsupportedModel
from twostroke.text.pretokenize import FAMILIES, build_pretokenizer, find_family

TEXT = "I'LL don't  pay 12345€\n\n  été HelloWorld 中文"

EXPECTED = {
    "default": [
        "I",
        "'",
        "LL",
        " don",
        "'",
        "t",
        " ",
        " pay",
        " ",
        "123",
        "45",
        "€",
        "\n\n ",
        " été",
    ],
    "gpt-2": ["I", "'", "LL", " don", "'t", " ", " pay", " 12345", "€", "\n\n ", " été"],
    "smollm": ["I", "'", "LL", " don", "'t", " ", " pay", " ", *"12345", "€", "\n\n ", " été"],
    "falcon": ["I", "'", "LL", " don", "'", "t", " ", " pay", " ", "123", "45", "€", "\n\n "],
    "llama-bpe": ["I", "'LL", " don", "'t", " ", " pay", " ", "123", "45", "€\n\n", " ", " été"],
    "qwen2": ["I", "'LL", " don", "'t", " ", " pay", " ", *"12345", "€\n\n", " ", " été"],
    "qwen35": ["I", "'LL", " don", "'t", " ", " pay", " ", *"12345", "€\n\n", " ", " été"],
    "seed-coder": ["I", "'LL", " don", "'t", " ", " pay", " ", *"12345", "€", "\n\n", " ", " été"],
    "bailingmoe": ["I", "'LL", " don", "'t", " ", " pay", " ", *"12345", "€\n\n", " ", " été"],
    "tekken": ["I", "'LL", " don", "'t", " ", " pay", " ", *"12345", "€\n\n", " ", " été"],
    "gpt-4o": ["I'LL", " don't", " ", " pay", " ", "123", "45", "€\n\n", " ", " été"],
    "bloom": ["I'LL", " don't", " ", " pay", " 12345€", "\n\n ", " été"],
    "viking": ["I'LL", " don't", " ", " pay", " ", *"12345", "€", "\n\n ", " été"],
    # Its punctuation is listed as !-/ and :-~, and the latter range holds the ASCII letters.
    "deepseek-llm": ["I", "'", "LL", " don", "'", "t", " ", " pay", " ", "12345", "€", "\n", "\n"],
    "deepseek-coder": ["I", "'", "LL", " don", "'", "t", " ", " pay", " ", *"12345", "€", "\n"],
    "deepseek-v3": ["I", "'LL", " don", "'t", " ", " pay", " ", "123", "45", "€\n\n", " ", " été"],
}


def cut(name: str, text: str) -> list[str]:
    """The words of `text`."""
    pretokenizer = build_pretokenizer(find_family(name))
    return [text[start:end] for _, (start, end) in pretokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", EXPECTED)
def test_each_family_cuts_in_its_own_way(name: str) -> None:
    words = cut(name, TEXT)
    assert words[: len(EXPECTED[name])] == EXPECTED[name]
    assert "".join(words) == TEXT


@pytest.mark.parametrize("name", [family.names.split()[0] for family in FAMILIES])
def test_no_family_loses_or_adds_a_character(name: str) -> None:
    text = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2070), 0x1F600, 0x4E2D, 0x10FFFF]))
    assert "".join(cut(name, text)) == text


def test_cased_families_cut_before_capitals() -> None:
    assert cut("gpt-4o", "HelloWorld fooBAR") == ["Hello", "World", " foo", "BAR"]
    assert cut("llama-bpe", "HelloWorld fooBAR") == ["HelloWorld", " fooBAR"]


def test_every_name_belongs_to_one_family() -> None:
    names = [name for family in FAMILIES for name in family.names.split()]
    assert len(names) == len(set(names))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.pre.*'klingon'.*llama-bpe"):
        find_family("klingon")
