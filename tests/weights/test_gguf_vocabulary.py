"""A GGUF vocabulary is read with llama.cpp's defaults, and no list may contradict another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model_files import ARRAY, BOOL, F32, I32, STR, U32, VOCAB, GGUFRecipe, make_gguf
from twostroke.errors import CorruptModel
from twostroke.spec.vocabulary import Vocabulary, VocabularyKind
from twostroke.weights.load import open_model

PREFIX = "tokenizer.ggml."


def read(recipe: GGUFRecipe, folder: Path) -> Vocabulary:
    with open_model(recipe.write(folder / "m.gguf")) as model:
        return model.vocabulary


def set_key(recipe: GGUFRecipe, name: str, *value: Any) -> GGUFRecipe:
    recipe.keys[PREFIX + name] = value
    return recipe


def test_a_byte_level_vocabulary_is_read(tmp_path: Path) -> None:
    vocabulary = read(make_gguf("qwen2"), tmp_path)
    assert vocabulary.kind is VocabularyKind.BYTE_BPE
    assert vocabulary.pre == "qwen2"
    assert vocabulary.merges == ["t 0", "t 1"]
    assert vocabulary.tokens[1] == "t1"
    assert (vocabulary.bos, vocabulary.eos, vocabulary.unknown) == (VOCAB - 2, 0, None)
    adds = (vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_space_prefix)
    assert adds == (False, False, False)
    assert len(vocabulary.scores) == 0
    assert vocabulary.chat_template is None


def test_a_sentencepiece_vocabulary_that_says_nothing_gets_the_defaults(tmp_path: Path) -> None:
    vocabulary = read(make_gguf("gemma3"), tmp_path)
    assert vocabulary.kind is VocabularyKind.SENTENCEPIECE
    assert (vocabulary.unknown, vocabulary.bos, vocabulary.eos) == (0, 1, 2)
    assert (vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_space_prefix) == (
        True,
        False,
        True,
    )
    assert vocabulary.scores[3] == -3.0
    assert list(vocabulary.types[:4]) == [2, 3, 3, 1]


def test_what_a_file_says_wins_over_the_defaults(tmp_path: Path) -> None:
    recipe = make_gguf("gemma3")
    set_key(recipe, "add_bos_token", BOOL, False)
    set_key(recipe, "add_eos_token", BOOL, True)
    set_key(recipe, "add_space_prefix", BOOL, False)
    set_key(recipe, "eos_token_id", U32, 5)
    recipe.keys["tokenizer.chat_template"] = (STR, "{{ messages }}")
    vocabulary = read(recipe, tmp_path)
    assert (vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_space_prefix) == (
        False,
        True,
        False,
    )
    assert vocabulary.eos == 5
    assert vocabulary.chat_template == "{{ messages }}"


def test_a_llama_3_pre_tokeniser_begins_texts_unless_told_otherwise(tmp_path: Path) -> None:
    recipe = set_key(make_gguf("llama"), "pre", STR, "llama-bpe")
    del recipe.keys[PREFIX + "add_bos_token"]
    assert read(recipe, tmp_path).add_bos
    assert not read(set_key(recipe, "add_bos_token", BOOL, False), tmp_path).add_bos


def test_stop_tokens_are_those_named_and_control_tokens_that_end_a_turn(tmp_path: Path) -> None:
    recipe = set_key(make_gguf("qwen2"), "eot_token_id", U32, 7)
    assert read(recipe, tmp_path).stop_tokens == {0, 7, VOCAB - 1}


def test_a_turn_end_that_is_plain_text_does_not_stop(tmp_path: Path) -> None:
    recipe = set_key(make_gguf("qwen2"), "token_type", ARRAY, [1] * VOCAB, I32)
    assert read(recipe, tmp_path).stop_tokens == {0}


@pytest.mark.parametrize(("kind", "stops"), [(3, {2, 5}), (4, {5})])
def test_an_html_strike_tag_stops_only_as_a_control_token(
    kind: int, stops: set[int], tmp_path: Path
) -> None:
    recipe = set_key(make_gguf("gemma3"), "eos_token_id", U32, 5)
    set_key(recipe, "token_type", ARRAY, [2, 3, kind] + [1] * (VOCAB - 3), I32)
    assert read(recipe, tmp_path).stop_tokens == stops


def test_an_empty_token_gets_a_name_of_its_own(tmp_path: Path) -> None:
    tokens = [f"t{index}" for index in range(VOCAB)]
    tokens[4] = tokens[9] = ""
    recipe = set_key(make_gguf("llama"), "tokens", ARRAY, tokens, STR)
    assert read(recipe, tmp_path).tokens[4:10:5] == ["[EMPTY_4]", "[EMPTY_9]"]


def test_the_vocabulary_is_built_once(tmp_path: Path) -> None:
    with open_model(make_gguf("llama").write(tmp_path / "m.gguf")) as model:
        assert model.vocabulary is model.vocabulary


TWICE = ["same", "same", *(f"t{index}" for index in range(VOCAB - 2))]
CONTRADICTIONS = [
    ("tokens", (ARRAY, TWICE, STR), "has 'same' twice, as 0 and 1"),
    ("token_type", (ARRAY, [1] * (VOCAB - 1), I32), "has 39 items where 40 are needed"),
    ("token_type", (ARRAY, [1] * (VOCAB - 1) + [9], I32), "gives token 39 the unknown type 9"),
    ("token_type", (ARRAY, [1.0] * VOCAB, F32), "holds FLOAT32, not INT32"),
    ("scores", (ARRAY, [0.0] * 3, F32), "has 3 items where 40 are needed"),
    ("scores", (ARRAY, [float("nan")] * VOCAB, F32), "has a score that is not finite"),
    ("scores", (ARRAY, ["a"] * VOCAB, STR), "holds STRING, not FLOAT32"),
    ("bos_token_id", (U32, VOCAB), "is 40, but there are 40 tokens"),
    ("eos_token_id", (I32, -1), "is -1"),
    ("add_bos_token", (U32, 1), "is UINT32, not a bool"),
]


@pytest.mark.parametrize(("name", "value", "said"), CONTRADICTIONS)
def test_a_list_that_contradicts_is_named(
    name: str, value: tuple[Any, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptModel, match=f"'{PREFIX}{name}' {said}"):
        read(set_key(make_gguf("gemma3"), name, *value), tmp_path)


@pytest.mark.parametrize(("architecture", "name"), [("llama", "merges"), ("gemma3", "scores")])
def test_a_missing_list_is_named(architecture: str, name: str, tmp_path: Path) -> None:
    recipe = make_gguf(architecture)
    del recipe.keys[PREFIX + name]
    with pytest.raises(CorruptModel, match=f"'{PREFIX}{name}' is missing"):
        read(recipe, tmp_path)


def test_a_token_that_is_not_utf_8_is_named_by_place(tmp_path: Path) -> None:
    path = make_gguf("llama").write(tmp_path / "m.gguf")
    raw = path.read_bytes().replace(b"t17", b"\xff17", 1)
    path.write_bytes(raw)
    with (
        open_model(path) as model,
        pytest.raises(CorruptModel, match=r"item 17 of key .* not UTF-8"),
    ):
        _ = model.vocabulary
