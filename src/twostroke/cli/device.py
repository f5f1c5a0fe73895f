"""Which device an engine runs on: the CPU, or a GPU where there is one and what drives it.

It owns the choice and its reason. Looking for a GPU asks NVIDIA's driver library and loads nothing
else: importing PyTorch to learn that there is none would take longer than the first token does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from twostroke.errors import DeviceError, InvalidParameter

INSTALL = "pip install 'twostroke[cuda]'"
_NEEDED = ("torch", "triton")
_DEVICE = re.compile(r"cuda(?::(\d{1,3}))?")
_DRIVER = "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs that this process may use: how many, why none, and what is missing to use them.

    why: "" where there are some. missing: "" where PyTorch and Triton are installed for GPUs, or
    nobody looked because there is no GPU; else a sentence that says what is not.
    """

    count: int = 0
    why: str = ""
    missing: str = ""


def find_gpus() -> Gpus:
    """Ask the driver for GPUs, and, without importing them, whether the libraries are there."""
    count, why = _count_gpus()
    return Gpus(count, why, _find_missing() if count else "")


def resolve_device(wanted: str, for_cpu: str, find: Callable[[], Gpus]) -> tuple[str, str]:
    """The device, "cpu" or "cuda:n", and why.

    wanted: "auto", "cpu", "cuda" or "cuda:n". for_cpu: names a setting that was asked for and only
    the CPU has; "" where there is none. find: asked where it matters what GPUs there are.
    Raises InvalidParameter and DeviceError.
    """
    match = _DEVICE.fullmatch(wanted)
    if wanted == "cpu":
        return "cpu", "as asked"
    if wanted == "auto":
        return _choose(for_cpu, find)
    if match is None:
        raise InvalidParameter("device", f"must be auto, cpu, cuda or cuda:0, not {wanted!r}")
    if for_cpu:
        raise InvalidParameter(for_cpu, f"is of the CPU; with --device {wanted} leave it out")
    gpus = find()
    if gpus.count == 0:
        raise DeviceError(f"--device {wanted}: {gpus.why}; use --device cpu")
    if gpus.missing:
        raise DeviceError(f"--device {wanted}: {gpus.missing}: {INSTALL}")
    index = int(match[1] or 0)
    if index >= gpus.count:
        names = ", ".join(f"cuda:{each}" for each in range(gpus.count))
        raise DeviceError(f"there is no cuda:{index} here, only {names}")
    return f"cuda:{index}", "as asked"


def _choose(for_cpu: str, find: Callable[[], Gpus]) -> tuple[str, str]:
    if for_cpu:
        return "cpu", f"{for_cpu} was asked for, which is of the CPU"
    gpus = find()
    if gpus.count == 0:
        return "cpu", gpus.why
    if gpus.missing:
        return "cpu", f"a GPU is here, but {gpus.missing}: {INSTALL}"
    return "cuda:0", "the first GPU of this machine"


def _count_gpus() -> tuple[int, str]:
    import ctypes

    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return 0, "there is no NVIDIA driver here"
    count = ctypes.c_int(0)
    # Both answer 0 for success (CUDA driver API, cuInit and cuDeviceGetCount).
    if (code := driver.cuInit(0)) or (code := driver.cuDeviceGetCount(ctypes.byref(count))):
        return 0, f"the NVIDIA driver finds no GPU (code {code})"
    return count.value, "" if count.value else "the NVIDIA driver finds no GPU"


def _find_missing() -> str:
    import importlib.metadata
    import importlib.util

    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
    version = importlib.metadata.version("torch")
    return f"torch {version} is a build for the CPU" if version.endswith("+cpu") else ""
