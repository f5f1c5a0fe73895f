"""Parts leave the records of the whole, and no process of theirs is left or waited for in vain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from places import REPO
from sim_strategies import draw_arrivals, draw_choices
from simulations import Scene, draw_by_last, make_replica_spec, run_one, show
from twostroke.errors import EngineError, InvalidParameter
from twostroke.exec.simulated import Draw, draw_zero
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster, Part
from twostroke.sim.faults import ExecutorDies, draw_cancels
from twostroke.sim.parts import count_parts, run_parts
from twostroke.sim.records import Records


@st.composite
def draw_scenes(draw: st.DrawFn) -> Scene:
    """Two to five replicas behind round robin, often short of blocks."""
    spec = make_replica_spec(
        num_blocks=draw(st.sampled_from([12, 20, 64])),
        step_tokens=draw(st.sampled_from([16, 64])),
        max_rows=draw(st.sampled_from([2, 8])),
        host_blocks=draw(st.sampled_from([0, 10])),
        cache_seed=draw(st.sampled_from(["", "model"])),
    )
    arrivals = draw(draw_arrivals()) + draw(draw_arrivals())
    arrivals = tuple(sorted(arrivals, key=lambda one: one.time_ns))
    replicas = draw(st.integers(2, 5))
    return Scene(spec, arrivals, replicas, choice=draw(draw_choices()))


def make_scene(seed: int, count: int, replicas: int) -> Scene:
    """Drawn requests of several tenants, some of which are given up."""
    random, time_ns, arrivals = Random(seed), 0, list[Arrival]()
    for _ in range(count):
        time_ns += random.choice([0, 1, 900, 2_100])
        lengths = random.randint(1, 40), random.randint(1, 60)
        prefix = (random.randrange(3), random.randrange(3))
        tenant = random.choice("abcd")
        arrivals.append(Arrival(time_ns, *lengths, prefix, 8, tenant, random.randrange(2)))
    spec = make_replica_spec(num_blocks=24, cache_seed="model")
    return Scene(spec, tuple(draw_cancels(arrivals, seed, 0.2, 9_000)), replicas)


def run_apart(scene: Scene, count: int, draw: Draw = draw_zero) -> Records:
    """Its parts one after the other in this process, merged in an order of their own."""
    records, *others = (
        scene.make(1_000, Part(index, count), draw=draw).run(scene.arrivals)
        for index in reversed(range(count))
    )
    for other in others:
        records.merge(other)
    return records


def run_in_processes(scene: Scene, count: int) -> Records:
    """Its parts beside each other."""
    return run_parts(partial(scene.make, 1_000), lambda part: scene.arrivals, count)


def show_all(records: Records) -> dict[str, object]:
    """Everything recorded, and when the last event happened."""
    return {**show(records), "end_ns": records.end_ns}


@settings(max_examples=60, deadline=None)
@given(draw_scenes(), st.integers(2, 4), st.sampled_from([draw_zero, draw_by_last]))
def test_parts_leave_the_records_of_the_whole(scene: Scene, count: int, draw: Draw) -> None:
    whole = scene.run(1_000, draw=draw).records
    assert show_all(run_apart(scene, count, draw)) == show_all(whole)


@pytest.mark.parametrize(
    ("seed", "replicas", "count"), [(1, 2, 2), (2, 3, 2), (3, 7, 3), (4, 5, 4)]
)
def test_processes_leave_the_records_of_one(seed: int, replicas: int, count: int) -> None:
    scene = make_scene(seed, 300, replicas)
    whole = scene.run(1_000).records
    found = run_in_processes(scene, count)
    assert show_all(found) == show_all(whole)
    assert whole.samples.period_ns > 500, "no sample was ever dropped"
    assert whole.count_fates()["cancelled"]
    assert len(whole.tenants) == 4
    assert not active_children()


def test_one_part_is_the_whole_and_needs_no_process() -> None:
    scene = make_scene(5, 40, 2)
    made = list[Part]()

    def make(part: Part) -> Cluster:
        made.append(part)
        return scene.make(1_000, part)

    found, whole = run_parts(make, lambda part: scene.arrivals, 1), scene.run(1_000).records
    assert show_all(found) == show_all(whole)
    assert made == [Part(0, 1)]


def test_only_replicas_that_are_independent_have_parts() -> None:
    scene = Scene(make_replica_spec(), (), 2)
    hearing = (
        replace(scene, router="least-tokens"),
        replace(scene, faults=(ExecutorDies(5, 0),)),
        replace(scene, spec=replace(scene.spec, step_deadline_ns=5_000)),
    )
    for one in hearing:
        with pytest.raises(AssertionError, match="no parts"):
            one.make(1, Part(0, 2))


def test_records_of_other_arrivals_are_not_merged() -> None:
    mine, other = run_one([Arrival(0, 4, 2)]), run_one([Arrival(0, 5, 2)])
    before = show(mine)
    with pytest.raises(InvalidParameter, match="differ between parts"):
        mine.merge(other)
    assert show(mine) == before


@pytest.mark.parametrize(
    ("replicas", "requests", "processors", "parts"),
    [(1_000, 10**6, 2, 2), (3, 10**6, 8, 3), (8, 1_999, 2, 1), (8, 3_000, 64, 3), (8, 0, 1, 1),
     (1_000, 10**6, 256, 16)],
)  # fmt: skip
def test_parts_are_as_many_as_pay(
    replicas: int, requests: int, processors: int, parts: int
) -> None:
    assert count_parts(replicas, requests, processors) == parts


# ---- processes that fail ------------------------------------------------------------------------


def die() -> None:
    """End this process as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    """Raise what a user can cause."""
    raise InvalidParameter("arrivals", "are refused")


def blunder() -> None:
    """Raise what only a bug can."""
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (die, r"part 2 of 3 of the replicas was killed by SIGKILL"),
        (refuse, r"^arrivals: are refused$"),
        (blunder, r"part 2 of 3 of the replicas failed with code 1"),
    ],
)
@pytest.mark.parametrize("after", [0, 3_000])
def test_a_part_that_fails_is_an_error_and_leaves_nothing(
    act: object, message: str, after: int
) -> None:
    assert callable(act)

    def arrive(part: Part) -> Iterator[Arrival]:
        for at in range(4_000):
            if part.index == 1 and at == after:
                act()
            yield Arrival(at, 1, 1)

    scene = Scene(make_replica_spec(), (), 3)
    with pytest.raises(EngineError, match=message):
        run_parts(partial(scene.make, 1), arrive, 3)
    assert not active_children()


def test_a_failure_is_heard_while_requests_still_arrive() -> None:
    pulled = 0

    def arrive(part: Part) -> Iterator[Arrival]:
        nonlocal pulled
        if part.index == 1:
            die()
        while True:  # for as long as nobody stops it
            pulled += 1
            yield Arrival(pulled, 1, 1)

    scene = Scene(make_replica_spec(), (), 2)
    with pytest.raises(EngineError, match="SIGKILL"):
        run_parts(partial(scene.make, 1_000), arrive, 2)
    assert not active_children()


def test_what_fails_here_ends_the_others() -> None:
    def arrive(part: Part) -> Iterator[Arrival]:
        if part.index == 0:
            raise InvalidParameter("arrivals", "never came")
        time.sleep(60)
        yield Arrival(0, 1, 1)

    scene, begun = Scene(make_replica_spec(), (), 2), time.monotonic()
    with pytest.raises(InvalidParameter, match="never came"):
        run_parts(partial(scene.make, 1), arrive, 2)
    assert time.monotonic() - begun < 30
    assert not active_children()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_one_that_started_it(how: int, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from simulations import Scene, make_replica_spec\n"
        "from twostroke.sim.parts import run_parts\n"
        # As in a terminal: who runs tests in the background has it ignored, and that is inherited.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def arrive(part):\n"
        f"    Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
        "    time.sleep(60)\n"
        "    return ()\n"
        "scene = Scene(make_replica_spec(), (), 3)\n"
        "run_parts(lambda part: scene.make(1, part), arrive, 3)\n"
    )
    path = os.pathsep.join([*sys.path, str(REPO / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
        process.send_signal(how)
        process.wait(timeout=30)
        others = [int(one.name) for one in tmp_path.iterdir() if int(one.name) != process.pid]
        wait_until(lambda: not any(map(is_running, others)))
    finally:
        process.kill()
        _, words = process.communicate()
    assert "ForkProcess" not in words


def wait_until(is_so: object, seconds: float = 30) -> None:
    """Wait for what must become true."""
    assert callable(is_so)
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it never became so"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """True for a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
