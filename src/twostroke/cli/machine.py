"""Machine: what this process may use of the computer it runs on.

It owns how cores and memory are counted: cores in the process's affinity mask, two threads of one
core counted once, less where a control group grants less time; memory that is available now, less
where a control group's limit is nearer. Nothing is cached and nothing is changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twostroke.cli.device import Gpus, find_gpus


@dataclass(frozen=True, slots=True)
class Machine:
    """cores: physical cores this process may keep busy; available_bytes: memory it may still take.

    cores_reason and memory_reason say in a few words where each number comes from. find_gpus: what
    GPUs there are, for those who want one; looking costs time where there are some.
    """

    cores: int
    cores_reason: str
    available_bytes: int
    memory_reason: str
    find_gpus: Callable[[], Gpus] = find_gpus


def read_machine(root: Path = Path("/")) -> Machine:
    """Count this machine's cores and memory; `root` is where /proc and /sys are found."""
    cores, cores_reason = _count_cores(root)
    available, memory_reason = _count_memory(root)
    return Machine(cores, cores_reason, available, memory_reason)


def count_processors(root: Path = Path("/")) -> int:
    """How many processes can run at once: threads of one core count each, unlike in `Machine`."""
    return min(len(_list_allowed()), _read_granted(root))


def _count_cores(root: Path) -> tuple[int, str]:
    places = {_get_core_place(root, cpu) for cpu in _list_allowed()}
    cores, granted = len(places), _read_granted(root)
    if granted < cores:
        return granted, "cores' worth of time the control group grants"
    return cores, "physical cores this process may use"


def _list_allowed() -> list[int]:
    """The logical CPUs of the affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read_granted(root: Path) -> int:
    """How many CPUs' worth of time the control group grants; very many when it sets no quota."""
    quota = _read_words(root / "sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
        return max(1, int(quota[0]) // int(quota[1]))
    return sys.maxsize


def _get_core_place(root: Path, cpu: int) -> tuple[str, str]:
    """(socket, core) of a logical CPU; a CPU whose place is unknown counts as a core of its own."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    socket, core = _read_words(topology / "physical_package_id"), _read_words(topology / "core_id")
    return (socket[0], core[0]) if socket and core else ("cpu", str(cpu))


def _count_memory(root: Path) -> tuple[int, str]:
    available, reason = _read_available(root), "memory available now"
    limit = _read_words(root / "sys/fs/cgroup/memory.max")
    used = _read_words(root / "sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit() and used[0].isdigit():
        left = max(0, int(limit[0]) - int(used[0]))
        if left < available:
            return left, "memory the control group still grants"
    return available, reason


def _read_available(root: Path) -> int:
    words = _read_words(root / "proc/meminfo")
    if "MemAvailable:" in words:
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_words(path: Path) -> list[str]:
    """The words of a small kernel file; empty where the kernel has no such file."""
    try:
        return path.read_text().split()
    except OSError:
        return []
