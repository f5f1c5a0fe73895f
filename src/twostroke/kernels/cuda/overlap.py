"""Launches that begin before the launch before them has ended (programmatic dependent launch).

A kernel launched with OVERLAP lets the next one start at once, and waits for the one before to be
complete before it touches anything but weights. So in a chain of such kernels the start of each
hides behind the end of the last. Every kernel launched so must call `begin_overlapped` in all its
programs, or the ones behind it would no longer wait for the ones in front. Needs Hopper or later;
elsewhere, and in the interpreter, launches follow each other as usual.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def begin_overlapped(OVERLAP: tl.constexpr):  # noqa: N803
    """Let the next launch start, then wait until the one before is complete."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@lru_cache(maxsize=64)
def can_overlap(device: torch.device) -> bool:
    """Whether launches on this device may overlap."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return False
    return bool(torch.cuda.get_device_capability(device)[0] >= 9)


def get_options(overlap: bool, warps: int, stages: int = 1) -> dict[str, Any]:
    """The launch options of a kernel that has an OVERLAP parameter, that parameter included."""
    return {
        "OVERLAP": overlap,
        "launch_pdl": overlap,
        "num_warps": warps,
        "num_stages": stages,
    }
