"""Deterministic simulation: worlds from seeds, each run to its end under every law.

    python -m dst --seeds 10000 --jobs 2    seeds 0 to 9,999
    python -m dst --seed 123                one of them again, with all that happens in it

Owns the runner only: worlds are drawn in dst_scene.py, run in dst_world.py and judged in
dst_laws.py. A failing seed is named with the command that replays it and does not stop the others;
the last line is one JSON object, and the exit status says whether all went well.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dst_scene import Scene, draw_scene
from dst_world import World

REPLAY = "make dst SEED={seed}"
PROGRESS_EVERY = 500
MOST_SHOWN = 10


@dataclass
class Tally:
    """What some seeds came to: things counted, and what went wrong, by seed."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.counts.update(other.counts)
        self.failures.update(other.failures)


def run_seed(seed: int, scene: Scene | None = None) -> World:
    """Run the world of a seed; raises whatever is wrong with it."""
    world = World(scene or draw_scene(seed))
    world.run()
    return world


def count(world: World) -> dict[str, int]:
    """What makes a run worth something."""
    laws, scheduler = world.laws, world.scheduler
    return {
        "worlds": 1,
        "events": world.num_events,
        "steps": laws.num_steps,
        "requests": laws.num_accepted + laws.num_rejected,
        "tokens": laws.num_tokens,
        "preemptions": laws.num_preempted,
        "swaps": scheduler.memory.num_swaps,
        "cached_tokens": scheduler.memory.cached_tokens,
        "drafted_tokens": scheduler.num_drafted,
        "lost_executors": laws.num_lost,
        "refused_answers": world.loop.refused_answers,
        "results_after_the_end": scheduler.num_ignored_results,
        "engines_closed": int(laws.is_closed),
        **{
            fate: scheduler.counts[fate] for fate in ("finished", "rejected", "cancelled", "failed")
        },
    }


def try_seed(seed: int) -> Tally:
    """Run one seed; whatever it raises is noted as its failure."""
    try:
        return Tally(Counter(count(run_seed(seed))))
    except Exception as error:  # noqa: BLE001 - the outermost frame of a seed
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        return Tally(failures={seed: f"{type(error).__name__} at {place}: {error}"})


def run_seeds(seeds: range, jobs: int) -> Iterator[Tally]:
    """Tallies of the seeds, as they come."""
    if jobs == 1:
        yield from map(try_seed, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, be_quiet) as pool:
        yield from pool.imap_unordered(try_seed, seeds, chunksize=50)


def be_quiet() -> None:
    """Requests that fail are the point here: nothing is logged of them."""
    logging.disable(logging.CRITICAL)


def replay(seed: int) -> None:
    """Run one seed and print all that happens in it."""
    scene = draw_scene(seed)
    print(scene)
    world = World(scene, says=print)
    world.run()
    print(json.dumps({"seed": seed, **count(world)}))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dst", description="Deterministic simulation.")
    parser.add_argument("--seeds", type=int, default=10_000, help="how many to run")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, help="run this one alone and print what happens")
    asked = parser.parse_args(arguments)
    if asked.seed is not None:
        replay(asked.seed)
        return 0
    if min(asked.seeds, asked.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    seeds = range(asked.first, asked.first + asked.seeds)
    began, total = time.monotonic(), Tally()
    for number, tally in enumerate(run_seeds(seeds, asked.jobs), 1):
        total.add(tally)
        for seed, what in tally.failures.items():
            print(f"seed {seed}: {what}\n  replay: {REPLAY.format(seed=seed)}", flush=True)
        if number % PROGRESS_EVERY == 0:
            done = f"{number:,} of {asked.seeds:,} seeds, {len(total.failures)} failed"
            print(f"{done}, {time.monotonic() - began:.0f} s", flush=True)
    result = {
        "seeds": asked.seeds,
        "from": asked.first,
        "jobs": asked.jobs,
        "seconds": round(time.monotonic() - began, 1),
        "broken": len(total.failures),
        "broken_seeds": sorted(total.failures)[:MOST_SHOWN],
    }
    print(json.dumps({**result, **total.counts}))
    return 1 if total.failures else 0


if __name__ == "__main__":
    be_quiet()
    sys.exit(main())
