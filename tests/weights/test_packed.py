"""Packed weights kept in files: what is found again, what never is, and what keeping may cost."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from twostroke.weights.mapping import FileIdentity, map_file, release_pages
from twostroke.weights.packed import PackedFiles

SIZE = 300_000


def make_model(path: Path, content: bytes = b"a model") -> FileIdentity:
    """A file that stands for a model."""
    path.write_bytes(content)
    return map_file(path, 1)[1]


@pytest.fixture
def files(tmp_path: Path) -> PackedFiles:
    """A folder that keeps small files of a model written just now."""
    model = make_model(tmp_path / "model")
    return PackedFiles(tmp_path / "packed", (model,), least_bytes=1, settled_ns=0)


def make_weights(seed: int = 0, size: int = SIZE) -> NDArray[np.uint8]:
    """Bytes to keep."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def keep(files: PackedFiles, weights: NDArray[np.uint8], layout: str = "layout") -> None:
    """Keeps the weights as a packer does."""
    draft = files.try_begin(layout, weights.size)
    assert draft is not None
    with draft:
        draft.memory[:] = weights
        draft.keep()


def list_kept(files: PackedFiles) -> list[Path]:
    """Everything in the folder."""
    return sorted(files.folder.iterdir())


def test_what_was_kept_is_mapped_again_and_cannot_be_written(files: PackedFiles) -> None:
    keep(files, make_weights())
    mapped = files.try_map("layout", SIZE)
    assert mapped is not None
    assert np.array_equal(mapped, make_weights())
    assert not mapped.flags.writeable
    assert mapped.ctypes.data % 64 == 0


def test_nothing_is_found_where_nothing_was_kept(files: PackedFiles) -> None:
    assert files.try_map("layout", SIZE) is None


def test_another_layout_finds_nothing(files: PackedFiles) -> None:
    keep(files, make_weights())
    assert files.try_map("another", SIZE) is None


@pytest.mark.parametrize("how", ["written to", "replaced", "touched", "cut"])
def test_a_changed_model_finds_nothing(files: PackedFiles, how: str) -> None:
    keep(files, make_weights())
    path = files.model[0].path
    time.sleep(0.05)  # several ticks of any clock; see SETTLED_NS
    if how == "written to":  # in place, and the old time put back
        status = path.stat()
        path.write_bytes(b"A MODEL")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif how == "replaced":
        path.with_name("new").write_bytes(b"a model")
        path.with_name("new").replace(path)
    elif how == "touched":
        os.utime(path)
    else:
        path.write_bytes(b"a")
    changed = replace(files, model=(map_file(path, 1)[1],))
    assert changed.try_map("layout", SIZE) is None


def test_a_model_that_changes_while_it_is_packed_is_not_kept(files: PackedFiles) -> None:
    draft = files.try_begin("layout", SIZE)
    assert draft is not None
    with draft:
        draft.memory[:] = make_weights()
        files.model[0].path.write_bytes(b"another")
        draft.keep()
    assert list_kept(files) == []
    assert np.array_equal(draft.memory, make_weights())


def test_a_model_changed_a_moment_ago_is_not_kept(files: PackedFiles) -> None:
    assert replace(files, settled_ns=10**12).try_begin("layout", SIZE) is None


def test_packing_that_fails_leaves_nothing(files: PackedFiles) -> None:
    draft = files.try_begin("layout", SIZE)
    assert draft is not None
    with pytest.raises(ZeroDivisionError), draft:
        raise ZeroDivisionError
    assert list_kept(files) == []


def test_a_draft_is_not_found_before_it_is_kept(files: PackedFiles) -> None:
    draft = files.try_begin("layout", SIZE)
    assert draft is not None
    with draft:
        draft.memory[:] = make_weights()
        assert files.try_map("layout", SIZE) is None


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "magic", "header", "zeros"])
def test_a_torn_or_foreign_file_is_ignored_and_replaced(files: PackedFiles, damage: str) -> None:
    keep(files, make_weights())
    (path,) = list_kept(files)
    whole = path.read_bytes()
    page = 4096
    path.write_bytes(
        {
            "cut": whole[:-1],
            "longer": whole + b"\0",
            "empty": b"",
            "magic": b"X" + whole[1:],
            "header": whole[:40] + bytes([whole[40] ^ 1]) + whole[41:],
            "zeros": whole[: 7 * page] + bytes(page) + whole[8 * page :],
        }[damage]
    )
    assert files.try_map("layout", SIZE) is None
    keep(files, make_weights())
    assert path.read_bytes() == whole
    assert files.try_map("layout", SIZE) is not None


def test_a_file_under_the_name_of_another_model_is_ignored(files: PackedFiles) -> None:
    keep(files, make_weights())
    (path,) = list_kept(files)
    other = replace(files, model=(make_model(files.folder.parent / "other"),))
    keep(other, make_weights(1))
    (other_path,) = set(list_kept(files)) - {path}
    os.replace(other_path, path)
    assert files.try_map("layout", SIZE) is None


def test_a_folder_that_cannot_be_written_costs_one_line(
    files: PackedFiles, caplog: pytest.LogCaptureFixture
) -> None:
    files.folder.write_text("a file where a folder should be")
    with caplog.at_level(logging.INFO):
        assert files.try_begin("layout", SIZE) is None
    assert len(caplog.records) == 1
    assert files.try_map("layout", SIZE) is None


def test_a_full_disk_leaves_nothing(files: PackedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert files.try_begin("layout", SIZE) is None
    assert list_kept(files) == []


def test_small_models_are_not_kept(files: PackedFiles) -> None:
    assert replace(files, least_bytes=SIZE + 1).try_begin("layout", SIZE) is None
    assert not files.folder.exists()


def test_the_folder_stays_within_its_bound_and_the_longest_unused_goes_first(
    files: PackedFiles,
) -> None:
    bounded = replace(files, kept_bytes=3 * (SIZE + 4096))
    for index in range(3):
        keep(bounded, make_weights(index), str(index))
        (newest,) = [path for path in list_kept(bounded) if path.stat().st_mtime > 10**6]
        os.utime(newest, (index, index))
    assert bounded.try_map("0", SIZE) is not None  # used now, so the second is the oldest
    keep(bounded, make_weights(3), "3")
    found = [bounded.try_map(str(index), SIZE) is not None for index in range(4)]
    assert found == [True, False, True, True]


def test_a_model_larger_than_the_bound_is_not_kept_and_drives_none_out(files: PackedFiles) -> None:
    bounded = replace(files, kept_bytes=SIZE + 4096)
    keep(bounded, make_weights())
    assert bounded.try_begin("larger", SIZE + 1) is None
    assert bounded.try_map("layout", SIZE) is not None


def test_drafts_that_were_given_up_are_deleted(files: PackedFiles) -> None:
    files.folder.mkdir()
    for name, age in (("old.1234", 10**6), ("new.1234", 0)):
        (files.folder / name).write_bytes(b"")
        now = (files.folder / name).stat().st_mtime
        os.utime(files.folder / name, (now - age, now - age))
    keep(files, make_weights())
    names = {path.name for path in list_kept(files)}
    assert "old.1234" not in names
    assert "new.1234" in names


def test_pages_let_go_are_read_again(tmp_path: Path) -> None:
    content = make_weights().tobytes()
    (tmp_path / "model").write_bytes(content)
    mapping, _ = map_file(tmp_path / "model", 1)
    view = np.frombuffer(mapping, np.uint8, 100_000, 5000)
    release_pages(view)
    assert view.tobytes() == content[5000:105_000]


def test_memory_that_is_no_file_is_never_let_go() -> None:
    weights = make_weights()
    weights.flags.writeable = False
    release_pages(weights)
    assert np.array_equal(weights, make_weights())
