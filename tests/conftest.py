"""Where the GPU kernels' tests run: in Triton's interpreter, or on a GPU that is asked for.

TRITON_INTERPRET is read when a kernel is defined, so it is set before any test module is imported.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> str:
    """The device that GPU kernels are tested on: "cuda" with TRITON_INTERPRET=0, else "cpu"."""
    return "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
