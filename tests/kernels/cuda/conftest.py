"""The interpreter treats narrow floats as a GPU does while kernels are tested in it."""

from __future__ import annotations

import pytest

from triton_repair import repair_interpreter


@pytest.fixture(scope="session", autouse=True)
def rounding() -> None:
    """See triton_repair.py."""
    repair_interpreter()
