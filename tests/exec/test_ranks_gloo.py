"""What ranks exchange over torch.distributed, between real processes (see rank_probes.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")

import torch

from rank_fakes import Answers, has_ended, make_plan
from rank_probes import (
    CHECKS,
    check_hidden,
    check_least,
    check_logits,
    check_sums,
    check_sums_of_rows,
    check_tokens,
    die_in_a_sum,
    make_probe,
)
from twostroke.core.types import StepOutcome
from twostroke.errors import ExecutorLost
from twostroke.exec.ranks import RankGroup, RankSetup
from twostroke.kernels.cuda.collectives import Collectives, connect
from twostroke.spec.ranks import WHOLE, RankLayout


def run_checks(layout: RankLayout, is_exact: bool, *checks: Callable[..., None]) -> None:
    """Runs the checks, then loses a rank in the middle of a collective operation."""
    group = RankGroup(RankSetup(make_probe, is_exact, layout, step_timeout_s=30.0))
    try:
        answers = Answers()
        for step, check in enumerate(checks):
            group.start(make_plan(step, CHECKS.index(check)), answers.take)
            answer = answers.wait(step + 1)[step]
            assert isinstance(answer, StepOutcome), answer
        group.start(make_plan(99, CHECKS.index(die_in_a_sum)), answers.take)
        lost = answers.wait(len(checks) + 1)[-1]
        assert isinstance(lost, ExecutorLost)
        last = layout.world - 1
        assert f"rank {last} of {layout.world} was killed by SIGKILL" in str(lost)
        assert all(map(has_ended, group.pids))
    finally:
        group.close()


@pytest.mark.slow
def test_three_shards_exchange_what_they_should() -> None:
    checks = (check_sums, check_sums_of_rows, check_logits, check_tokens, check_least)
    run_checks(RankLayout(tensor=3), True, *checks)


def test_two_stages_of_two_shards_exchange_what_they_should() -> None:
    checks = (check_sums, check_hidden, check_logits, check_tokens, check_least, check_hidden)
    run_checks(RankLayout(tensor=2, stages=2), False, *checks)


def test_one_rank_exchanges_with_nobody() -> None:
    alone = Collectives()
    x, out = torch.randn(3, 4), torch.full((3, 4), torch.nan)
    before = x.clone()
    alone.all_reduce(x)
    alone.share_tokens(x)
    assert torch.equal(x, before)
    alone.gather_logits(out, x)
    assert torch.equal(out, x)
    assert alone.get_least(3, torch.device("cpu")) == 3
    alone.close()


def test_one_rank_sets_nothing_up() -> None:
    connect(WHOLE, torch.device("cpu"), "no/such/folder", 1.0).close()
    assert not torch.distributed.is_initialized()
