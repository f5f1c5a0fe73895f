"""Names turn into paths, and unknown ones into help."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from model_files import make_folder, make_gguf
from twostroke.errors import UnknownModel
from twostroke.spec.quant import Format
from twostroke.weights.catalog import (
    CATALOG,
    ModelCost,
    NotPulled,
    Unreadable,
    get_cache_dir,
    get_catalog_path,
    is_hub_name,
    list_models,
    parse_hub_name,
    resolve,
)
from twostroke.weights.load import open_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_below_home_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWOSTROKE_CACHE")
    assert get_cache_dir() == Path.home() / ".cache" / "twostroke"


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    path = make_gguf("llama").write(tmp_path / "m.gguf")
    assert resolve(path) == path
    assert resolve(str(path)) == path
    assert resolve(tmp_path) == tmp_path


def test_a_catalog_name_is_its_file_once_pulled() -> None:
    path = get_catalog_path(CATALOG["smollm2-135m"])
    with pytest.raises(UnknownModel, match="twostroke pull smollm2-135m"):
        resolve("smollm2-135m")
    path.parent.mkdir(parents=True)
    path.touch()
    assert resolve("smollm2-135m") == path


def test_a_hub_name_is_its_folder_once_pulled(cache: Path) -> None:
    with pytest.raises(UnknownModel, match="twostroke pull acme/tiny"):
        resolve("acme/tiny")
    folder = cache / "hub" / "acme--tiny"
    folder.mkdir(parents=True)
    assert resolve("acme/tiny") == folder


def test_a_gguf_file_of_a_repository_has_a_place_of_its_own(cache: Path) -> None:
    model = parse_hub_name("acme/tiny:q4/m.gguf")
    assert (model.repository, model.file) == ("acme/tiny", "q4/m.gguf")
    assert model.path == cache / "hub" / "acme--tiny--q4--m.gguf" / "q4" / "m.gguf"


@pytest.mark.parametrize(
    "name", ["../x", "a/..", "a/b/c", "a/b:../m.gguf", "/etc", "a/b:m.bin", ""]
)
def test_what_is_no_hub_name_is_not_taken_for_one(name: str) -> None:
    assert not is_hub_name(name)


@pytest.mark.parametrize("name", ["smolm2", "gemma3", "", "no\0pe", "x" * 5000])
def test_an_unknown_name_lists_what_is_known(name: str) -> None:
    with pytest.raises(UnknownModel, match="known names: smollm2-135m, gemma3-270m"):
        resolve(name)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(UnknownModel, match="did you mean smollm2-135m"):
        resolve("smolm2-135")


def test_the_list_tells_cost_absence_and_damage_apart(cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    path = make_gguf("llama", Format.Q8_0).write(cache / "models" / "mine.gguf")
    (cache / "models" / "broken.gguf").write_bytes(b"GGUF")
    make_folder("qwen3").write(cache / "hub" / "acme--tiny")
    quantised = cache / "hub" / "acme--quant--m.gguf" / "m.gguf"
    quantised.parent.mkdir()
    shutil.copy(path, quantised)
    listed = {each.name: each for each in list_models()}
    assert list(listed) == [
        *CATALOG,
        "broken.gguf",
        "mine.gguf",
        "acme/quant:m.gguf",
        "acme/tiny",
    ]
    assert isinstance(listed["smollm2-135m"].state, NotPulled)
    assert listed["gemma3-270m"].licence == "Gemma Terms of Use"
    broken = listed["broken.gguf"].state
    assert isinstance(broken, Unreadable)
    assert "too few" in broken.problem
    for name in ("mine.gguf", "acme/quant:m.gguf", "acme/tiny"):
        cost = listed[name].state
        assert isinstance(cost, ModelCost)
        with open_model(listed[name].path) as model:
            assert (cost.weight_bytes, cost.file_bytes) == (
                model.spec.weight_bytes,
                model.file_bytes,
            )
            context_bytes = model.spec.get_kv_bytes_per_token() * model.spec.context_tokens
        assert cost.full_context_bytes == cost.weight_bytes + context_bytes


def test_formats_are_listed_with_their_shares(cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    make_gguf("llama", Format.Q8_0).write(cache / "models" / "mine.gguf")
    cost = list_models()[-1].state
    assert isinstance(cost, ModelCost)
    assert cost.formats == "Q8_0 99%, F32 1%"
