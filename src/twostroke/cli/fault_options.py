"""What goes wrong in a simulation, as a user writes it: `deaths=1,cancels=0.05,restart=10`.

Owns the keys, their ranges and defaults; the faults themselves are drawn in `sim/faults.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from twostroke.errors import InvalidParameter
from twostroke.sim.faults import FaultRates

# key → (default, least, most, meaning)
_KEYS: Mapping[str, tuple[float, float, float, str]] = {
    "deaths": (0.0, 0.0, 1000.0, "executors that die, per replica"),
    "hangs": (0.0, 0.0, 1000.0, "executors that stop answering, per replica"),
    "slowdowns": (0.0, 0.0, 1000.0, "times that steps take longer, per replica"),
    "jumps": (0.0, 0.0, 1000.0, "jumps of the clock"),
    "cancels": (0.0, 0.0, 1.0, "share of requests whose callers give up"),
    "patience": (10.0, 0.001, 1e6, "mean seconds until they do"),
    "restart": (10.0, 0.0, 1e6, "seconds to replace an executor"),
    "deadline": (30.0, 0.001, 1e6, "seconds until a silent executor counts as lost"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultChoice:
    """Faults to draw. cancels: share of requests given up after `patience_s` in the mean.

    restart_s: until a lost executor is replaced. deadline_s: of a step.
    """

    rates: FaultRates
    cancels: float
    patience_s: float
    restart_s: float
    deadline_s: float


def parse_faults(text: str | None) -> FaultChoice:
    """Faults as written; none for None. Raises InvalidParameter naming the keys there are."""
    values = {key: default for key, (default, *_) in _KEYS.items()}
    for part in text.split(",") if text is not None else []:
        key, equals, value = part.partition("=")
        if key not in _KEYS or not equals:
            keys = ", ".join(f"{name}= ({known[3]})" for name, known in _KEYS.items())
            raise InvalidParameter("faults", f"{part!r} must be one of: {keys}")
        _, least, most, _ = _KEYS[key]
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise InvalidParameter(
                "faults", f"{key} must be a number from {least:g} to {most:g}, not {value!r}"
            )
        values[key] = number
    return FaultChoice(
        rates=FaultRates(values["deaths"], values["hangs"], values["slowdowns"], values["jumps"]),
        cancels=values["cancels"],
        patience_s=values["patience"],
        restart_s=values["restart"],
        deadline_s=values["deadline"],
    )
