"""The same inputs give the same plans and updates, in every process and under every hash seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from scheduler_fuzz import run_random

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src"
SEEDS = range(12)
PROGRAM = f"""
from scheduler_fuzz import run_random
print(*[run_random(seed).get_digest() for seed in range({SEEDS.start}, {SEEDS.stop})])
"""


def run_elsewhere(hash_seed: str) -> list[str]:
    """The digests as another process computes them."""
    paths = os.pathsep.join([str(TESTS), str(SOURCE)])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_every_answer_is_the_same_under_every_hash_seed() -> None:
    here = [run_random(seed).get_digest() for seed in SEEDS]
    assert len(set(here)) == len(SEEDS)
    for hash_seed in ("0", "1", "4294967295"):
        assert run_elsewhere(hash_seed) == here
