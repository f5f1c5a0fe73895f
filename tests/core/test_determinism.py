"""The same inputs give the same plans and updates, in every process and under every hash seed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest

import dst_scene
from dst_world import World
from scheduler_fuzz import run_random
from twostroke.policies.names import ORDERS, PACES, PolicyChoice

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src"
HASH_SEEDS = ("0", "1", "2", "3", "17", "1234", "65536", "99999999", "2147483648", "4294967295")
SEEDS = range(12)


def list_choices() -> Iterator[PolicyChoice]:
    """Every order with every pace, with and without drafts."""
    for order in ORDERS:
        for pace in PACES:
            for drafts in (False, True):
                itl_ns = 2_500 if pace == "target" else 0
                yield PolicyChoice(
                    order=order,
                    pace=pace,
                    age_ns=4_000,
                    horizon_ns=50_000,
                    fixed_tokens=6,
                    chunk_tokens=6,
                    itl_ns=itl_ns,
                    batch_size=3,
                    batch_timeout_ns=7_000,
                    drafts=drafts,
                )


def list_digests() -> list[str]:
    """Of the bytes of all plans, and all that came of them: each policy choice, then random runs.

    A choice is simulated with executors that fail, so that losing steps is part of it.
    """
    digests = []
    for seed, choice in enumerate(list_choices()):
        digest, said = sha256(), list[str]()
        World(dst_scene.draw_scene(seed, choice), says=said.append).run()
        digest.update("\n".join(said).encode())
        digests.append(digest.hexdigest())
    return digests + [run_random(seed).get_digest() for seed in SEEDS]


def start_elsewhere(hash_seed: str) -> subprocess.Popen[str]:
    """Another process that prints its digests."""
    paths = os.pathsep.join([str(TESTS), str(TESTS / "core"), str(SOURCE)])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths}
    program = "import test_determinism; print(*test_determinism.list_digests())"
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def check_elsewhere(here: list[str], hash_seeds: Sequence[str]) -> None:
    """Processes with these hash seeds find the same digests; two run at a time."""
    assert len(set(here)) == len(here) == len(ORDERS) * len(PACES) * 2 + len(SEEDS)
    for first in range(0, len(hash_seeds), 2):
        chosen = hash_seeds[first : first + 2]
        processes = [start_elsewhere(hash_seed) for hash_seed in chosen]
        found = [process.communicate()[0].split() for process in processes]
        assert found == [here] * len(chosen)


def test_another_process_plans_the_same_bytes() -> None:
    check_elsewhere(list_digests(), HASH_SEEDS[:1])


@pytest.mark.slow
def test_every_plan_and_update_is_byte_identical_under_ten_hash_seeds() -> None:
    assert len(HASH_SEEDS) == len(set(HASH_SEEDS)) == 10
    check_elsewhere(list_digests(), HASH_SEEDS)
