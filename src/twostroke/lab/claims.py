"""Writes docs/claims.md: `python -m twostroke.lab.claims > docs/claims.md`, from the repository.

Owns the page's shape. Every number on it is computed when the page is made, from the formulas that
plan and serve, or read from what was measured and is kept in docs; a test fails when the page is
not current.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from twostroke.lab.claim import Claim, Evidence, Verdict
from twostroke.lab.claims_compute import build_compute_claims
from twostroke.lab.claims_memory import build_memory_claims
from twostroke.lab.claims_serving import build_serving_claims

_HEAD = """# Numbers in circulation

Numbers and formulas that circulate in teaching material on the two phases of inference, each
computed again from this project's own formulas or measured, and what is true of it. Made by
`python -m twostroke.lab.claims > docs/claims.md`; edit `src/twostroke/lab/claims_*.py` instead.
Times are the least that data sheets allow where they are called floors, and of an engine that
replays captured kernels where they are called predicted ([Roofline](roofline.md)).
"""


def build_claims(docs: Path) -> list[Claim]:
    """All claims in order; `docs` is the folder of this repository's documentation."""
    found = [
        *build_compute_claims(Evidence(docs)),
        *build_memory_claims(),
        *build_serving_claims(),
    ]
    return sorted(found, key=lambda claim: claim.number)


def build_page(docs: Path) -> str:
    """The page, as Markdown."""
    claims = build_claims(docs)
    lines = [_HEAD, "| # | claim | verdict |", "|---|---|---|"]
    lines += [
        f"| {claim.number} | [{claim.title}](#{_get_anchor(claim)}) | {claim.verdict.value} |"
        for claim in claims
    ]
    for claim in claims:
        lines += _describe(claim)
    return "\n".join(lines) + "\n"


def _describe(claim: Claim) -> Iterator[str]:
    yield f"\n## {claim.number}. {claim.title}\n"
    yield f"> {claim.claim}\n"
    verdict = claim.verdict.value.capitalize()
    if claim.verdict is Verdict.CONDITION:
        verdict = f"{verdict}: {claim.condition}"
    yield f"**{verdict}.** {claim.right}\n"
    tables = ("|", "-", " ")
    before = ""
    for line in claim.derivation:
        # A paragraph of its own, unless it goes on with a table or a list.
        if before and line and not (before.startswith(tables) and line.startswith(tables)):
            yield ""
        yield line
        before = line


def _get_anchor(claim: Claim) -> str:
    heading = f"{claim.number} {claim.title}".lower()
    return "".join(each for each in heading if each.isalnum() or each in " -").replace(" ", "-")


if __name__ == "__main__":
    print(build_page(Path("docs")), end="")
