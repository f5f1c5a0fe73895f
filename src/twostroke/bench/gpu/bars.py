"""The bars of the GPU engine, and what runs measured against each.

A share of bandwidth is the bytes that the step cannot do without, weights and keys and values, over
the measured time and the card's own copy bandwidth; a share of the matrix rate is all its
operations over the card's own BF16 rate. What was not measured is neither met nor missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twostroke.bench.gpu.fit import Fit
from twostroke.bench.gpu.results import Row, Run, list_rows
from twostroke.bench.gpu.workloads import DECODE, PREFILL, Cell, get_cell_work, get_model

SEVEN, EIGHT = "llama-2-7b", "llama-3.1-8b"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and the value measured for it; None where it was not measured.

    is_ceiling: the value must not exceed the bound. unit: "" for shares.
    """

    what: str
    bound: float
    value: float | None
    unit: str = ""
    is_ceiling: bool = False
    note: str = ""

    @property
    def word(self) -> str:
        """pass, miss or not measured."""
        if self.value is None:
            return "not measured"
        is_met = self.value <= self.bound if self.is_ceiling else self.value >= self.bound
        return "pass" if is_met else "miss"

    def describe(self) -> dict[str, object]:
        """Plain values."""
        return {
            "what": self.what,
            "bound": self.bound,
            "is_ceiling": self.is_ceiling,
            "unit": self.unit,
            "value": self.value,
            "result": self.word,
            "note": self.note,
        }

    def format(self, value: float | None) -> str:
        """A value in this bar's unit: a share in percent."""
        if value is None:
            return "–"
        return f"{value:.1%}" if not self.unit else f"{value:.2f}{self.unit}"


class Measured:
    """What bars ask of runs. Each get_ answers None where it was not measured."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._steps = {
            (row["model"], row["cell"]): (run, row)
            for run, row in list_rows(runs, "steps")
            if not row["exact"]
        }
        self._attention = {row["name"]: (run, row) for run, row in list_rows(runs, "attention")}
        served, gaps = (list_rows(runs, section) for section in ("served", "gap"))
        self._served = {row["engine"]: row for _, row in served if row["model"] == EIGHT}
        self._gaps = [row for _, row in gaps if row["model"] == EIGHT]

    def get_seconds(self, model: str, cell: str) -> float | None:
        """Median time of a step."""
        found = self._steps.get((model, cell))
        return None if found is None else float(found[1]["seconds"])

    def get_bandwidth_share(self, model: str, cell: str) -> float | None:
        """Bytes of a step over its time and the copy bandwidth."""
        if (model, cell) not in self._steps:
            return None
        run, row = self._steps[model, cell]
        return get_bandwidth_share(run, row)

    def get_rate_share(self, model: str, cell: str) -> float | None:
        """Operations of a step over its time and the matrix rate."""
        if (model, cell) not in self._steps:
            return None
        run, row = self._steps[model, cell]
        return get_rate_share(run, row)

    def get_attention(self, name: str, get: Callable[[Run, Row], float]) -> float | None:
        """A value of a shape of the attention section."""
        return get(*self._attention[name]) if name in self._attention else None

    def get_served(self, value: str) -> tuple[float, float] | None:
        """A value of the served trace: ours and Transformers'."""
        try:
            ours, theirs = (self._served[name][value] for name in ("twostroke", "transformers"))
        except KeyError:
            return None
        return float(ours), float(theirs)

    def get_gap(self) -> float | None:
        """Share of a step that the device idles."""
        gaps = [max(0.0, 1 - row["device_s"] / row["wall_s"]) for row in self._gaps]
        return max(gaps, default=None)


def get_cell(row: Row) -> Cell:
    """The step that a row is about."""
    return Cell(row["kind"], row["batch"], row["tokens"], row["context"])


def get_bandwidth_share(run: Run, row: Row) -> float:
    """Of a row of steps or peers."""
    work = get_cell_work(get_model(row["model"]), get_cell(row))
    return float(work.bytes / row["seconds"] / run.ceilings.copy_bandwidth)


def get_rate_share(run: Run, row: Row) -> float:
    """Of a row of steps or peers."""
    work = get_cell_work(get_model(row["model"]), get_cell(row))
    return float(work.flops / row["seconds"] / run.ceilings.matrix_rate)


def get_fastest_s(row: Row) -> float:
    """PyTorch's best time of an attention: its own choice, or a kernel that it can be told."""
    return min(float(row[name]) for name in ("sdpa_s", "flash_s", "cudnn_s") if name in row)


def judge(runs: Sequence[Run], fit: Fit | None) -> list[Verdict]:
    """Every bar, in the order of the issue."""
    found = Measured(runs)
    share = found.get_bandwidth_share
    attention = found.get_attention
    return [
        Verdict(
            "7B FP16 decode, batch 1, context 2,048: of bandwidth",
            0.85,
            share(SEVEN, "decode-1x2048"),
        ),
        Verdict(
            "7B FP16 decode, batch 32, context 2,048: of bandwidth",
            0.75,
            share(SEVEN, "decode-32x2048"),
        ),
        Verdict(
            "7B prefill 2,048: of the BF16 matrix rate",
            0.65,
            found.get_rate_share(SEVEN, "prefill-2048"),
        ),
        Verdict(
            "attention, prefill 8,192, head size 128: of SDPA's speed",
            0.8,
            attention("prefill-8192", lambda _, row: row["sdpa_s"] / row["ours_s"]),
            "×",
        ),
        Verdict(
            "attention, decode 32 x 2,048: of bandwidth",
            0.85,
            attention("decode-32x2048", _get_kv_share),
        ),
        Verdict(
            "8B INT4 decode, batch 1, context 2,048: over 16-bit",
            2.8,
            _divide(
                found.get_seconds(EIGHT, "decode-1x2048"),
                found.get_seconds("llama-3.1-8b-int4", "decode-1x2048"),
            ),
            "×",
        ),
        *_judge_served(found),
        Verdict("host gap between decode steps, batch 32", 0.03, found.get_gap(), "", True),
        *(
            Verdict(
                f"plan against measured, {kind}: median error",
                0.10,
                None if fit is None else fit.get_median_error(kind),
                "",
                True,
                "of the half of the steps that was not fitted",
            )
            for kind in (PREFILL, DECODE)
        ),
    ]


def _judge_served(found: Measured) -> list[Verdict]:
    rates = found.get_served("output_tokens_per_s")
    tpots = found.get_served("tpot_s_mean")
    return [
        Verdict(
            "8B served trace: tokens/s over Transformers'",
            3.0,
            None if rates is None else rates[0] / rates[1],
            "×",
        ),
        Verdict(
            "8B served trace: mean TPOT over Transformers'",
            1.0,
            None if tpots is None else tpots[0] / tpots[1],
            "×",
            True,
        ),
    ]


def _get_kv_share(run: Run, row: Row) -> float:
    return float(row["kv_bytes"] / row["ours_s"] / run.ceilings.copy_bandwidth)


def _divide(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator
