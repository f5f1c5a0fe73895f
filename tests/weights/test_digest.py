"""The digest of a model's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from twostroke.errors import UnknownModel
from twostroke.weights.digest import get_digest
from twostroke.weights.mapping import map_file


def digest_of(path: Path, folder: Path) -> str:
    """Digest of a file as it is now."""
    return get_digest([map_file(path, 1)[1]], folder)


def test_it_is_of_the_content_and_not_of_the_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    expected = hashlib.sha256(hashlib.sha256(b"weights").digest()).hexdigest()
    assert digest_of(one, tmp_path / "kept") == digest_of(two, tmp_path / "kept") == expected
    two.write_bytes(b"weightz")
    assert digest_of(two, tmp_path / "kept") != expected


def test_it_is_taken_once(tmp_path: Path) -> None:
    path, kept = tmp_path / "model", tmp_path / "kept"
    path.write_bytes(b"weights")
    digest_of(path, kept)
    (entry,) = kept.iterdir()
    entry.write_text("00" * 32)
    assert digest_of(path, kept) == hashlib.sha256(bytes(32)).hexdigest()


def test_a_damaged_entry_is_taken_again(tmp_path: Path) -> None:
    path, kept = tmp_path / "model", tmp_path / "kept"
    path.write_bytes(b"weights")
    first = digest_of(path, kept)
    (entry,) = kept.iterdir()
    entry.write_text("0")
    assert digest_of(path, kept) == first


def test_a_file_that_went_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"weights")
    identity = map_file(path, 1)[1]
    path.unlink()
    with pytest.raises(UnknownModel, match="model"):
        get_digest([identity], tmp_path / "kept")
