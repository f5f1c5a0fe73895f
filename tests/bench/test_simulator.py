"""Laws of the benchmark of the simulator itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from places import SHARED
from twostroke.bench import simulator


def test_every_point_is_run_once_and_the_million_only_when_asked() -> None:
    points = simulator.plan_points(full=False)
    assert len(set(points)) == len(points)
    assert (simulator.FULL_REQUESTS, 1_000) not in points
    assert set(simulator.plan_points(full=True)) - set(points) == {(1_000_000, 1_000)}


@pytest.mark.slow
def test_a_point_counts_what_was_simulated_and_is_drawn(tmp_path: Path) -> None:
    point = simulator.measure(40, 2, SHARED / "traces" / "azure2023_conv.csv")
    assert point.requests == 40
    assert point.steps > 0
    assert point.peak_bytes > 10_000_000
    simulator.draw([point], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1_000
