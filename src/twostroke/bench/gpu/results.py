"""What runs of the benchmark found, as plain values, saved after every section.

A run that is cut off keeps what it has, and several runs are read as one: where two measured the
same, the later counts. Only measured values are kept; floors, shares and predictions are worked out
when a report is made, so that they always follow today's formulas.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twostroke.bench.gpu.ceilings import Ceilings
from twostroke.errors import TwostrokeError

Row = dict[str, Any]

# What tells two rows of a section apart; a later row with the same values replaces the earlier.
KEYS = {
    "steps": ("model", "cell", "exact"),
    "peers": ("model", "cell", "engine"),
    "attention": ("name",),
    "gap": ("model",),
    "served": ("model", "engine"),
}


@dataclass(slots=True)
class Run:
    """One invocation. missing: what was not measured, with the reason. seconds: by section."""

    about: dict[str, Any]
    ceilings: Ceilings
    sections: dict[str, list[Row]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "about": self.about,
            "ceilings": self.ceilings.describe(),
            "sections": self.sections,
            "missing": self.missing,
            "seconds": self.seconds,
        }

    @staticmethod
    def parse(values: dict[str, Any]) -> Run:
        """A run from what `describe` gave. Raises KeyError, TypeError."""
        return Run(
            values["about"],
            Ceilings(**values["ceilings"]),
            values["sections"],
            values["missing"],
            values["seconds"],
        )

    def add(self, section: str, rows: Sequence[Row]) -> None:
        """Rows of a section, beside those it has."""
        self.sections.setdefault(section, []).extend(rows)


def save(runs: Sequence[Run], path: Path) -> None:
    """Write all runs; a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    text = json.dumps({"runs": [run.describe() for run in runs]}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.rename(path)


def load(path: Path) -> list[Run]:
    """The runs of a file. Raises TwostrokeError naming what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return [Run.parse(each) for each in values["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TwostrokeError(f"{path} holds no results of this benchmark: {error!r}") from error


def list_rows(runs: Sequence[Run], section: str) -> Iterator[tuple[Run, Row]]:
    """A section's rows over all runs with the run of each; of equal ones the last counts."""
    found: dict[tuple[object, ...], tuple[Run, Row]] = {}
    for run in runs:
        for row in run.sections.get(section, []):
            found[tuple(row.get(key) for key in KEYS[section])] = run, row
    yield from found.values()


def list_missing(runs: Sequence[Run]) -> dict[str, str]:
    """What no run measured, with the reason that the last one gave."""
    measured = {
        f"{row['model']} {row['cell']}" for _, row in list_rows(runs, "steps") if not row["exact"]
    }
    reasons: dict[str, str] = {}
    for run in runs:
        reasons |= run.missing
    return {what: why for what, why in reasons.items() if what not in measured}
