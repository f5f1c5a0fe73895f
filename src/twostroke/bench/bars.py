"""The bars this engine is held to, and whether a run met them.

A bar compares medians of one run: a rate with the best of some peers, a share with the limit, a
time with a number of seconds. What was not measured is neither met nor missed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twostroke.bench.lineup import ENGINES, LLAMA_CPP, LLAMA_CPP_Q4_0, OPENVINO, OURS
from twostroke.bench.results import ModelResult

PEERS = tuple(name for name in ENGINES if name != OURS)
SAME_FILE = (LLAMA_CPP,)
BEST_FORMATS = (LLAMA_CPP_Q4_0, OPENVINO)


@dataclass(frozen=True, slots=True)
class Bar:
    """What must be reached.

    what: a workload, "LOAD.VALUE" of a served load, "start" or "memory". against: peers, of which
    the best counts; none means an absolute bound. bound: the ratio to that peer, or share of the
    limit, or value. is_ceiling: ours must stay below it, not above.
    """

    what: str
    against: tuple[str, ...]
    bound: float
    unit: str
    is_ceiling: bool = False


def _rate(workload: str, against: tuple[str, ...], ratio: float) -> Bar:
    return Bar(workload, against, ratio, "×")


def _share(workload: str, share: float) -> Bar:
    return Bar(workload, (), share, "of the limit")


_EVERYWHERE = (
    Bar("start", (), 0.6, "s", True),
    Bar("start", SAME_FILE, 1.0, "×", True),
    Bar("memory", (), 1.3, "× file and KV", True),
)
BARS: Mapping[str, Sequence[Bar]] = {
    "smollm2-135m": (
        _rate("decode-0", SAME_FILE, 2.0),
        _share("decode-0", 0.75),
        _rate("decode-4096", SAME_FILE, 4.0),
        _share("decode-4096", 0.60),
        _rate("prefill-512", SAME_FILE, 4.0),
        _rate("prefill-512", BEST_FORMATS, 2.0),
        _share("prefill-512", 0.60),
        _rate("prefill-2048", SAME_FILE, 5.0),
        _share("prefill-2048", 0.50),
        _rate("batch-16", SAME_FILE, 5.0),
        _rate("batch-16", BEST_FORMATS, 2.5),
        _share("batch-16", 0.35),
        _rate("burst.output_tokens_per_s", PEERS, 2.5),
        Bar("poisson.ttft_s_p50", PEERS, 0.5, "×", True),
        Bar("poisson.itl_ms_p99", PEERS, 0.5, "×", True),
        *_EVERYWHERE,
    ),
    "gemma3-270m": (
        _rate("decode-0", SAME_FILE, 1.5),
        _rate("prefill-512", SAME_FILE, 2.0),
        *_EVERYWHERE,
    ),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and what was measured; `value` is compared with its bound. None: not measured.

    possible: the value that the limit itself would reach, where there is one.
    """

    bar: Bar
    ours: float | None = None
    peer: str | None = None
    theirs: float | None = None
    value: float | None = None
    possible: float | None = None

    @property
    def is_met(self) -> bool | None:
        """None where there is nothing to compare."""
        if self.value is None:
            return None
        bound = self.bar.bound
        return self.value <= bound if self.bar.is_ceiling else self.value >= bound

    @property
    def is_possible(self) -> bool:
        """False where even the limit would miss the bar."""
        if self.possible is None:
            return True
        bound = self.bar.bound
        return self.possible <= bound if self.bar.is_ceiling else self.possible >= bound

    @property
    def word(self) -> str:
        """pass, miss, miss where the limit forbids more, or not measured."""
        word = {True: "pass", False: "miss", None: "not measured"}[self.is_met]
        return word if self.is_possible else f"{word} (the limit forbids it)"

    def describe(self) -> dict[str, object]:
        """Plain values."""
        return {
            "what": self.bar.what,
            "against": list(self.bar.against),
            "bound": self.bar.bound,
            "unit": self.bar.unit,
            "ours": self.ours,
            "peer": self.peer,
            "theirs": self.theirs,
            "value": self.value,
            "possible": self.possible,
            "result": self.word,
        }


def judge(result: ModelResult) -> list[Verdict]:
    """Every bar of a model, in order; none for a model without bars."""
    return [_judge(result, bar) for bar in BARS.get(result.name, ())]


def _judge(result: ModelResult, bar: Bar) -> Verdict:
    ours = get_value(result, bar.what, OURS)
    if ours is None:
        return Verdict(bar)
    if not bar.against:
        measured = result.find(bar.what)
        return Verdict(bar, ours, value=measured.get_share(OURS) if measured else ours)
    values = {name: get_value(result, bar.what, name) for name in bar.against}
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return Verdict(bar, ours)
    best = (min if bar.is_ceiling else max)(known, key=lambda name: known[name])
    theirs, limit = known[best], get_limit(result, bar.what)
    possible = limit / theirs if limit is not None else None
    return Verdict(bar, ours, best, theirs, ours / theirs, possible)


def get_limit(result: ModelResult, what: str) -> float | None:
    """What the machine's limit would give; None where no limit is known."""
    measured = result.find(what)
    if measured is not None:
        return measured.get_rate(OURS)[0] / measured.get_share(OURS)
    load, _, value = what.partition(".")
    return result.load_floors.get(load, {}).get(value)


def get_value(result: ModelResult, what: str, engine: str) -> float | None:
    """An engine's median of what a bar is about; None where it was not measured."""
    if what == "start":
        start = result.start.get(f"{engine}, start to first token")
        return start["median"] if start else None
    if what == "memory":
        return result.get_memory_share()
    measured = result.find(what)
    if measured is not None:
        return measured.get_rate(engine)[0] if engine in measured.samples else None
    load, _, value = what.partition(".")
    values = result.get_served(engine, load, value)
    return statistics.median(values) if values else None
