"""Laws of counting a machine's cores and memory, over made-up /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from twostroke.cli.machine import count_processors, read_machine


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def make_topology(root: Path, core_of_cpu: dict[int, int]) -> None:
    for cpu, core in core_of_cpu.items():
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(root, {f"{topology}/core_id": f"{core}\n", f"{topology}/physical_package_id": "0\n"})


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


def test_two_threads_of_one_core_count_once(tmp_path: Path) -> None:
    make_topology(tmp_path, {0: 0, 1: 1, 2: 0, 3: 1})
    assert read_machine(tmp_path).cores == 2


def test_only_cores_in_the_affinity_mask_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_topology(tmp_path, {0: 0, 1: 1, 2: 2, 3: 3})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3})
    assert read_machine(tmp_path).cores == 2


def test_two_threads_of_one_core_are_two_processors(tmp_path: Path) -> None:
    make_topology(tmp_path, {0: 0, 1: 1, 2: 0, 3: 1})
    assert count_processors(tmp_path) == 4


def test_without_a_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert read_machine(tmp_path).cores == 4


@pytest.mark.parametrize(
    ("quota", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 4)]
)
def test_a_control_group_can_only_lower_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    write(tmp_path, {"sys/fs/cgroup/cpu.max": quota})
    assert read_machine(tmp_path).cores == cores
    assert count_processors(tmp_path) == cores


@pytest.mark.parametrize(
    ("limit", "available"), [("3000", 2000), ("1000", 0), ("max", 4096), ("9999999", 4096)]
)
def test_the_nearer_memory_limit_counts(tmp_path: Path, limit: str, available: int) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 8 kB\nMemFree: 1 kB\nMemAvailable: 4 kB\n",
            "sys/fs/cgroup/memory.max": limit,
            "sys/fs/cgroup/memory.current": "1000",
        },
    )
    assert read_machine(tmp_path).available_bytes == available


def test_this_machine_has_a_core_and_memory() -> None:
    machine = read_machine()
    assert machine.cores >= 1
    assert machine.available_bytes > 0
