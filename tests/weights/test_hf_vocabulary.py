"""What lies beside a tokenizer.json is gathered into a Vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model_files import FolderRecipe, make_folder
from twostroke.errors import CorruptModel, UnsupportedModel
from twostroke.spec.vocabulary import Vocabulary, VocabularyKind
from twostroke.weights.load import open_model


def read(recipe: FolderRecipe, folder: Path) -> Vocabulary:
    with open_model(recipe.write(folder / "m")) as model:
        return model.vocabulary


def with_settings(**settings: Any) -> FolderRecipe:
    recipe = make_folder("llama")
    recipe.files["tokenizer_config.json"] = settings
    return recipe


def test_ids_come_from_the_config_where_nothing_else_speaks(tmp_path: Path) -> None:
    vocabulary = read(make_folder("llama"), tmp_path)
    assert vocabulary.kind is VocabularyKind.TOKENIZER_JSON
    assert vocabulary.json_path == tmp_path / "m" / "tokenizer.json"
    assert (vocabulary.bos, vocabulary.eos) == (1, 2)
    assert vocabulary.stop_tokens == {2, 3}
    assert not vocabulary.add_bos
    assert vocabulary.chat_template is None


def test_tokens_are_found_by_their_spelling(tmp_path: Path) -> None:
    recipe = with_settings(
        bos_token={"content": "<s>"}, eos_token="<|im_end|>", pad_token="b", add_bos_token=True
    )
    del recipe.config["bos_token_id"]
    vocabulary = read(recipe, tmp_path)
    assert (vocabulary.bos, vocabulary.eos, vocabulary.padding) == (1, 3, 5)
    assert vocabulary.add_bos


def test_every_end_of_every_file_stops(tmp_path: Path) -> None:
    recipe = make_folder("llama")
    recipe.files["generation_config.json"] = {"eos_token_id": [6, 7]}
    assert read(recipe, tmp_path).stop_tokens == {2, 3, 6, 7}


def test_a_template_file_goes_before_the_one_in_the_settings(tmp_path: Path) -> None:
    recipe = with_settings(chat_template="old")
    assert read(recipe, tmp_path).chat_template == "old"
    recipe.files["chat_template.jinja"] = "new"
    assert read(recipe, tmp_path).chat_template == "new"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert read(with_settings(chat_template=named), tmp_path).chat_template == "d"


@pytest.mark.parametrize("wrong", [-1, 10**6, "two", [2, None], True])
def test_an_end_token_that_is_no_id_is_named(wrong: Any, tmp_path: Path) -> None:
    recipe = make_folder("llama")
    recipe.config["eos_token_id"] = wrong
    with pytest.raises(CorruptModel, match=r"config\.json: key 'eos_token_id' has"):
        read(recipe, tmp_path)


def test_a_folder_without_a_tokenizer_json_is_refused_when_text_is_wanted(tmp_path: Path) -> None:
    recipe = make_folder("llama")
    del recipe.files["tokenizer.json"]
    with open_model(recipe.write(tmp_path / "m")) as model:
        assert model.spec.family == "llama"
        with pytest.raises(UnsupportedModel, match=r"no tokenizer\.json"):
            _ = model.vocabulary
