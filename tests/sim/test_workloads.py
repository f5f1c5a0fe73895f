"""Laws of drawn workloads: means and variations are those asked for, and a seed says everything."""

from __future__ import annotations

import hashlib
import math
import statistics
import subprocess
import sys
from itertools import islice, pairwise

import pytest

from twostroke.errors import InvalidParameter
from twostroke.sim.lengths import Fixed, Lognormal, Scaled, Uniform, parse_lengths
from twostroke.sim.traces import Drawn
from twostroke.sim.workloads import (
    IndependentPairs,
    RecordedPairs,
    Workload,
    draw_requests,
    parse_workload,
)

SHORT = IndependentPairs(Fixed(10), Fixed(2))
MANY = 40_000


def draw(text: str, rate: float = 2.0, count: int = MANY, seed: int = 1) -> list[Drawn]:
    """Requests of a workload with lengths that do not matter."""
    return list(draw_requests(parse_workload(text), SHORT, rate, count, seed))


def get_gaps(requests: list[Drawn]) -> list[int]:
    """Times between arrivals, the first from zero."""
    return [after - before for before, after in pairwise([0, *(one.at_ns for one in requests)])]


@pytest.mark.parametrize("rate", [0.05, 2.0, 900.0])
@pytest.mark.parametrize(
    ("text", "cv"),
    [("poisson", 1.0), ("gamma:cv=0.3", 0.3), ("gamma", 2.0), ("gamma:cv=4", 4.0)],
)
def test_gaps_have_the_mean_and_variation_asked_for(text: str, cv: float, rate: float) -> None:
    gaps = get_gaps(draw(text, rate))
    mean = statistics.fmean(gaps)
    # Five standard errors; of a gamma's cv, with kurtosis 6 cv², about cv (1 + cv) / sqrt(n).
    assert mean * rate / 1e9 == pytest.approx(1, abs=5 * cv / math.sqrt(MANY))
    error = 5 * cv * (1 + cv) / math.sqrt(MANY)
    assert statistics.pstdev(gaps) / mean == pytest.approx(cv, abs=error)


def test_poisson_counts_vary_as_their_mean() -> None:
    seconds = [0] * 20_000
    for one in draw("poisson", 2.0):
        if one.at_ns < len(seconds) * 10**9:
            seconds[one.at_ns // 10**9] += 1
    seconds = seconds[:19_000]
    assert statistics.fmean(seconds) == pytest.approx(2, abs=0.06)
    assert statistics.pvariance(seconds) == pytest.approx(2, abs=0.15)


def test_constant_gaps_are_equal() -> None:
    assert set(get_gaps(draw("constant", 4.0, 9))) == {250_000_000}


def test_a_seed_says_everything() -> None:
    assert draw("gamma:tenants=3,prefix=0.5", seed=7) == draw("gamma:tenants=3,prefix=0.5", seed=7)
    assert draw("gamma", seed=7) != draw("gamma", seed=8)


def test_the_first_requests_do_not_depend_on_how_many_follow() -> None:
    assert draw("gamma", count=5000)[:100] == draw("gamma", count=100)
    endless = draw_requests(parse_workload("gamma"), SHORT, 2.0, None, 1)
    assert list(islice(endless, 5000)) == draw("gamma", count=5000)


def test_lengths_leave_the_arrivals_as_they_were() -> None:
    others = IndependentPairs(Uniform(1, 900), Lognormal(50, 1))
    workload = parse_workload("poisson")
    times = [one.at_ns for one in draw_requests(workload, others, 2.0, 500, 1)]
    assert times == [one.at_ns for one in draw("poisson", count=500)]


def test_draws_are_the_same_in_every_process() -> None:
    code = (
        "import hashlib\n"
        "from twostroke.sim.lengths import Lognormal\n"
        "from twostroke.sim.workloads import *\n"
        "pairs = IndependentPairs(Lognormal(500, 1.0), Lognormal(100, 2.0))\n"
        "drawn = list(draw_requests(parse_workload('gamma:tenants=5'), pairs, 2.0, 999, 3))\n"
        "print(hashlib.sha256(repr(drawn).encode()).hexdigest())\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    pairs = IndependentPairs(Lognormal(500, 1.0), Lognormal(100, 2.0))
    here = list(draw_requests(parse_workload("gamma:tenants=5"), pairs, 2.0, 999, 3))
    assert found == {hashlib.sha256(repr(here).encode()).hexdigest() + "\n"}


def test_a_million_requests_stream() -> None:
    requests = draw_requests(parse_workload("poisson"), SHORT, 1000.0, 1_000_000, 1)
    assert next(requests).prompt_tokens == 10
    assert sum(1 for _ in islice(requests, 10_000)) == 10_000


def test_tenants_send_by_their_weights_and_share_their_own_prefix() -> None:
    requests = draw("poisson:tenants=10:1,prefix=0.5")
    shares = dict.fromkeys(("t0", "t1"), 0)
    for one in requests:
        shares[one.tenant] += 1
        assert (one.prefix, one.prefix_tokens) == ((int(one.tenant[1:]),), 5)
    assert shares["t0"] / shares["t1"] == pytest.approx(10, rel=0.1)


def test_one_tenant_has_no_name() -> None:
    assert {one.tenant for one in draw("poisson", count=9)} == {""}


def test_lengths_have_the_mean_and_variation_asked_for() -> None:
    prompt, new = Lognormal(512, 1.5), Uniform(10, 30)
    pairs = IndependentPairs(prompt, new)
    requests = list(draw_requests(Workload(process="constant"), pairs, 1.0, MANY, 5))
    prompts = [one.prompt_tokens for one in requests]
    assert statistics.fmean(prompts) == pytest.approx(512, rel=0.04)
    assert statistics.pstdev(prompts) / statistics.fmean(prompts) == pytest.approx(1.5, rel=0.15)
    assert min(prompts) >= 1
    answers = [one.new_tokens for one in requests]
    assert statistics.fmean(answers) == pytest.approx(20, rel=0.01)
    assert (min(answers), max(answers)) == (10, 30)


def test_pairs_of_a_trace_stay_together() -> None:
    pairs = RecordedPairs(((1, 10), (2, 20), (3, 30)))
    drawn = list(draw_requests(Workload(process="poisson"), pairs, 1.0, 3000, 5))
    assert {(one.prompt_tokens, one.new_tokens) for one in drawn} == set(pairs.pairs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("poison", "must be poisson, gamma"),
        ("", "must be poisson, gamma"),
        ("gamma:cv", "'cv' must be one of cv=, tenants= and prefix="),
        ("gamma:speed=1", "'speed=1' must be one of"),
        ("gamma:cv=1,cv=2", "cv is given twice"),
        ("gamma:cv=0", "cv must be a number from 0.01 to 20, not '0'"),
        ("gamma:cv=-1", "cv must be"),
        ("gamma:cv=nan", "cv must be"),
        ("gamma:cv=inf", "cv must be"),
        ("poisson:cv=2", "cv belongs to gamma, not to poisson"),
        ("poisson:tenants=0", "tenants must be"),
        ("poisson:tenants=1.5", "tenants must be"),
        ("poisson:tenants=1:0", "tenants must be"),
        ("poisson:tenants=99999", "tenants must be"),
        ("poisson:prefix=1.1", "prefix must be a number from 0 to 1"),
        ("poisson:prefix=-0.1", "prefix must be"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(text: str, expected: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^workload: ") as caught:
        parse_workload(text)
    assert expected in str(caught.value)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, 1e7, 1e-9])
def test_a_rate_that_cannot_be_is_refused(rate: float) -> None:
    with pytest.raises(InvalidParameter, match=r"^rate: "):
        next(draw_requests(parse_workload("poisson"), SHORT, rate, 10, 1))


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("512", Fixed(512)),
        ("uniform:100-900", Uniform(100, 900)),
        ("uniform:7-7", Uniform(7, 7)),
        ("lognormal:512:1.5", Lognormal(512, 1.5)),
        ("0.5x", Scaled(0.5)),
    ],
)
def test_lengths_are_read(text: str, lengths: object) -> None:
    assert parse_lengths("prompt_tokens", text) == lengths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("many", "must be a number such as 512"),
        ("", "must be a number such as 512"),
        ("normal:3:4", "must be a number such as 512"),
        ("0", "from 1 to 10,000,000"),
        ("-5", "from 1 to 10,000,000"),
        ("uniform:900-100", "the range 900-100 is empty"),
        ("uniform:0-100", "from 1 to"),
        ("lognormal:0.5:1", "the mean must be from 1"),
        ("lognormal:512:nan", "the variation must be"),
        ("lognormal:512:0", "the variation must be"),
        ("nanx", "the factor must be"),
        ("-1x", "the factor must be"),
        ("1-1x", "the factor must be"),
    ],
)
def test_lengths_that_cannot_be_are_refused(text: str, expected: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^prompt_tokens: ") as caught:
        parse_lengths("prompt_tokens", text)
    assert expected in str(caught.value)
