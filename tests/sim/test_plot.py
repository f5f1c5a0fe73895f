"""Laws of the picture: it is drawn from the records alone, and its timeline adds up."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sim_records import MS, Run, add_sample, make_records
from twostroke.errors import InvalidParameter
from twostroke.sim.plot import Picture, build_timeline, check_plot, draw
from twostroke.sim.records import Records

PICTURE = Picture("a title", 10)
RUNS = tuple(
    Run(arrival=9 * n, first=9 * n + 30 + n, gaps=(10, 20, 5), ttft_target=50, itl_target=15)
    for n in range(60)
)
WORDS = """
TTFT, p99
TPOT, p99
ITL, p99
time, s (logarithmic)
Goodput: what finished within both targets
TPOT ≤ 15 ms (the target)
TTFT target, 50 ms
blocks held, %
running
waiting
prefill
decode
tokens a step
simulated time, s
""".strip().splitlines()


def make_run(replicas: int = 2) -> Records:
    """Records with samples at every instant of both replicas."""
    records = make_records(*RUNS, replicas=replicas)
    for time_ms in range(0, records.end_ns // MS, 10):
        for replica in range(replicas):
            add_sample(records, time_ms, 2 + replica, replica)
    return records


def test_a_timeline_sums_over_replicas_and_means_over_instants() -> None:
    timeline = build_timeline(make_run(), 10)
    assert timeline.running.tolist() == [6] * len(timeline.seconds)
    assert timeline.waiting.tolist() == [4] * len(timeline.seconds)
    assert timeline.kv_mean == pytest.approx(0.25)
    assert timeline.kv_most == pytest.approx(0.3)
    assert (timeline.prefill_tokens[0], timeline.decode_tokens[0]) == (128, 2)


def test_a_timeline_counts_idle_instants_as_nothing() -> None:
    records = make_records(Run(first=100), replicas=1)
    add_sample(records, 0, 5)
    timeline = build_timeline(records, 10)
    assert (timeline.running[0], timeline.kv_mean[0]) == (3, 0.5)
    assert not timeline.running[1:].any()


def test_a_long_timeline_is_a_few_hundred_bins_whose_means_add_up() -> None:
    records = Records(1)
    records.end_ns = 100_000 * MS
    for time_ms in range(0, 100_000, 20):
        add_sample(records, time_ms, 5)
    timeline = build_timeline(records, 10)
    assert len(timeline.seconds) <= 300
    # Every second instant has a sample; the last bin is shorter and has an odd number of them.
    assert timeline.running[:-1] == pytest.approx(1.5)
    assert timeline.running[-1] == pytest.approx(1.5, abs=0.4)
    assert np.all(np.diff(timeline.seconds) > 0)


@pytest.mark.parametrize(
    "records",
    [
        make_run(),
        Records(3),
        make_records(Run(fate="rejected", replica=-1)),
        make_records(Run(first=5)),
        make_records(Run(first=5, gaps=(3,), fate="cancelled")),
    ],
    ids=["all", "nothing", "rejected", "one token", "cancelled"],
)
def test_whatever_happened_can_be_drawn(records: Records, tmp_path: Path) -> None:
    draw(records, PICTURE, tmp_path / "a.png")
    draw(records, PICTURE, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()[:1000]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_records_give_the_same_picture(tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        draw(make_run(), PICTURE, tmp_path / f"{name}.{ending}")
    first, second = ((tmp_path / f"{name}.{ending}").read_bytes() for name in "ab")
    assert first == second


def test_every_panel_names_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    draw(make_run(), PICTURE, path)
    # Matplotlib leaves each text beside its glyphs as a comment.
    text = path.read_text()
    assert [words for words in WORDS if words not in text] == []


def test_without_matplotlib_the_command_that_helps_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidParameter, match="pip install matplotlib"):
        check_plot()


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, twostroke.sim.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
