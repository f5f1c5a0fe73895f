"""Kills a server's executor at random under load: `python -m twostroke.bench.kills`.

It runs an engine as `twostroke serve` makes it, keeps 32 streams going, and sends SIGKILL or
SIGSTOP to the executor at random moments, drawn from a printed seed. It checks that every stream
gives exactly what the same request gave before anything was killed, that none is lost, and that no
block, descriptor or process is left; and reports how long streams paused after a kill. The last
line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from twostroke.cli.compose import build_engine
from twostroke.cli.settings import EngineSettings
from twostroke.engine.async_llm import AsyncLLM
from twostroke.engine.params import SamplingParams

STREAMS = 32
KINDS = 8  # different requests, several times each
TOKENS = 48


@dataclass(slots=True)
class Tally:
    """What was seen so far. pauses_s: from each kill to the next token of any stream."""

    finished: int = 0
    wrong: int = 0
    killed: int = 0
    kill_s: float | None = None
    pauses_s: list[float] = field(default_factory=list)


async def _run_one(engine: AsyncLLM, kind: int, tally: Tally) -> tuple[int, ...]:
    """One stream of a kind of request; its tokens."""
    params = SamplingParams(max_tokens=TOKENS, temperature=kind % 2 * 0.8, seed=kind)
    prompt = f"Story number {kind}: " + "once upon a time there was a sea, and " * (kind * 4)
    tokens: list[int] = []
    async for delta in await engine.submit(prompt, params):
        tokens += delta.tokens
        if tally.kill_s is not None:
            tally.pauses_s.append(time.monotonic() - tally.kill_s)
            tally.kill_s = None
    tally.finished += 1
    return tuple(tokens)


async def _keep_streaming(
    engine: AsyncLLM, expected: list[tuple[int, ...]], tally: Tally, end_s: float, place: int
) -> None:
    while time.monotonic() < end_s:
        place += STREAMS + 1
        tokens = await _run_one(engine, place % KINDS, tally)
        tally.wrong += tokens != expected[place % KINDS]


async def _keep_killing(tally: Tally, rng: random.Random, end_s: float, mean_s: float) -> None:
    while True:
        await asyncio.sleep(rng.uniform(0.2, 1.8) * mean_s)
        if time.monotonic() > end_s - 2:
            return
        children = _find_children()
        if not children:
            continue
        number = rng.choice((signal.SIGKILL, signal.SIGSTOP))
        # The older one runs steps; the other waits to take its place, and is killed at times too.
        pid = children[0] if rng.random() < 0.9 else children[-1]
        tally.killed += 1
        if pid == children[0]:
            tally.kill_s = time.monotonic()
        os.kill(pid, number)


def _find_children() -> list[int]:
    """The processes this one has started, the oldest first."""
    pids: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            pids += map(int, (thread / "children").read_text().split())
    return sorted(pids)


async def _run(seconds: float, mean_s: float, seed: int) -> dict[str, object]:
    built = build_engine(EngineSettings(model="smollm2-135m", kv_memory="512MiB"), isolated=True)
    engine = AsyncLLM(built.parts)
    tally, rng = Tally(), random.Random(seed)
    try:
        quiet = Tally()
        expected = [await _run_one(engine, kind, quiet) for kind in range(KINDS)]
        end_s = time.monotonic() + seconds
        await asyncio.gather(
            _keep_killing(tally, rng, end_s, mean_s),
            *(_keep_streaming(engine, expected, tally, end_s, one) for one in range(STREAMS)),
        )
        scheduler = built.parts.scheduler
        held = scheduler.config.num_blocks - scheduler.num_free_blocks
        health = engine.health()
    finally:
        await asyncio.to_thread(engine.close)
        built.model.close()
    pauses = sorted(tally.pauses_s)
    return {
        "seconds": seconds,
        "seed": seed,
        "killed": tally.killed,
        "finished": tally.finished,
        "wrong": tally.wrong,
        "blocks_held": held,
        "live": health.live,
        "processes_left": len(_find_children()),
        "pause_p50_s": round(pauses[len(pauses) // 2], 3) if pauses else None,
        "pause_p95_s": round(pauses[int(len(pauses) * 0.95)], 3) if pauses else None,
        "pause_max_s": round(pauses[-1], 3) if pauses else None,
    }


def main() -> None:
    """Run, print what was found, and fail when a stream was wrong or something was left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--mean", type=float, default=6.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    before = len(os.listdir("/proc/self/fd"))
    found = asyncio.run(_run(asked.seconds, asked.mean, asked.seed))
    gc.collect()
    found["descriptors_more"] = len(os.listdir("/proc/self/fd")) - before
    print(json.dumps(found))
    bad = ("wrong", "blocks_held", "live", "processes_left", "descriptors_more")
    raise SystemExit(any(found[name] for name in bad))


if __name__ == "__main__":
    main()
