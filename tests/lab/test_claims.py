"""docs/claims.md: it is current, it is complete, and what it says of known numbers is true."""

from __future__ import annotations

import pytest

from places import REPO
from twostroke.errors import InvalidParameter
from twostroke.lab.claim import Claim, Evidence, Verdict
from twostroke.lab.claims import build_claims, build_page
from twostroke.lab.online_softmax import measure_errors

DOCS = REPO / "docs"


def get_claim(number: int) -> Claim:
    """One entry of the page."""
    return build_claims(DOCS)[number - 1]


def test_the_page_of_claims_is_current() -> None:
    page = (DOCS / "claims.md").read_text(encoding="utf-8")
    assert page == build_page(DOCS), "run `make docs`"


def test_all_eighteen_claims_are_answered_in_order() -> None:
    claims = build_claims(DOCS)
    assert [claim.number for claim in claims] == list(range(1, 19))
    assert all(claim.derivation and claim.right for claim in claims)


def test_a_condition_is_named_where_one_is_needed_and_nowhere_else() -> None:
    for claim in build_claims(DOCS):
        assert bool(claim.condition) == (claim.verdict is Verdict.CONDITION)


def test_thirteen_billions_of_kv_come_out_as_they_are() -> None:
    assert "3,355,443,200" in get_claim(17).right


def test_the_cap_comes_off_the_memory() -> None:
    derivation = " ".join(get_claim(18).derivation)
    assert ": 28 requests" in derivation
    assert ": 21." in derivation


def test_the_claimed_update_fails_at_the_second_block_and_not_at_the_first() -> None:
    first, second, *_ = measure_errors(16, 64, keeps_sum=False)
    assert first < 1e-12
    assert second > 0.1


def test_the_true_update_fails_at_no_block() -> None:
    assert max(measure_errors(16, 80, keeps_sum=True)) < 1e-12


def test_missing_evidence_is_named() -> None:
    with pytest.raises(InvalidParameter, match="no decode-9x9"):
        Evidence(DOCS).get_gpu_step_s("llama-2-7b", "decode-9x9")
