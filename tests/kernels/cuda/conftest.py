"""The interpreter rounds as a GPU does while kernels are tested in it."""

from __future__ import annotations

import pytest

from triton_rounding import repair_rounding


@pytest.fixture(scope="session", autouse=True)
def rounding() -> None:
    """See triton_rounding.py."""
    repair_rounding()
