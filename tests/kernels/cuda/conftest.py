"""The GPU's kernels in Triton's interpreter: slow, and with narrow floats treated as a GPU does."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from triton_repair import repair_interpreter

FOLDER = Path(__file__).parent
QUICK = ("test_program",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs a kernel here is marked slow: `make test` runs it, `make check` does not."""
    for item in items:
        if item.path.is_relative_to(FOLDER) and item.path.stem not in QUICK:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def rounding() -> None:
    """See triton_repair.py."""
    repair_interpreter()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """What torch draws depends on the test alone, so whatever fails fails again."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
