"""The command-line reference says what the commands say."""

from __future__ import annotations

from places import REPO
from twostroke.cli.reference import build_reference


def test_the_reference_is_current() -> None:
    page = (REPO / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert page == build_reference(), "run `make docs`"
