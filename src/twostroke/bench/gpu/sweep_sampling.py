"""Times drawing and scoring on a GPU, for the common settings, and candidate ways to launch them.

Every time is of a captured graph. Logits fall like Zipf's law, as a model's do about, or are normal
("flat"), where the most tokens are likely. Each setting's draws are first held to the reference's.
Run as `python -m twostroke.bench.gpu.sweep_sampling [tune]`; a line is a vocabulary and a setting,
with microseconds a step by the number of rows. On a CPU, in Triton's interpreter, all is tiny.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from twostroke.bench.gpu.sweep import run_together, time_captured
from twostroke.bench.gpu.timing import Launch, Pace
from twostroke.core.types import Row, SamplingSpec, SequenceId
from twostroke.exec.sampling import build_sampling_arrays
from twostroke.kernels.cuda.sampling import (
    CHOICE,
    DrawChoice,
    SamplingScratch,
    draw,
    draw_greedy,
)
from twostroke.kernels.cuda.sampling_score import ScoredTensors, ScoreScratch, score
from twostroke.kernels.cuda.sampling_tensors import SamplingCounts, SamplingMode, upload
from twostroke.kernels.cuda.types import Tensor
from twostroke.kernels.reference import sampling as reference

PACE = Pace(least=5, most=30, budget_s=0.01)
SETTINGS = {
    "temperature": SamplingSpec(temperature=0.8),
    "top-p 0.9": SamplingSpec(temperature=0.8, top_p=0.9),
    "top-k 50": SamplingSpec(temperature=0.8, top_k=50),
    "top-k 50, top-p 0.9": SamplingSpec(temperature=0.8, top_k=50, top_p=0.9),
}
CANDIDATES = (
    CHOICE,
    replace(CHOICE, programs=1024),
    replace(CHOICE, programs=4096),
    replace(CHOICE, weigh_warps=4),
    replace(CHOICE, search_warps=4),
    replace(CHOICE, search_warps=16),
    replace(CHOICE, scan_warps=8),
)
LOGPROBS = 5


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows and vocabularies that are timed."""

    rows: tuple[int, ...] = (1, 32, 128, 256)
    vocabs: tuple[int, ...] = (32000, 128256)
    checked: int = 4


TINY = Sizes(rows=(1,), vocabs=(300,), checked=1)


class Sweep:
    """Memory of the largest case; collects what it measured and prints as it goes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sizes = Sizes() if device.type == "cuda" else TINY
        self.lines: list[dict[str, Any]] = []
        rows, vocab = max(self.sizes.rows), max(self.sizes.vocabs)
        self.memory = torch.empty(rows * vocab, dtype=torch.float32, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.scratch = SamplingScratch.allocate(SamplingCounts(rows), device)
        self.scores = ScoredTensors.allocate(rows, LOGPROBS, device)
        self.top = torch.full((rows,), LOGPROBS, dtype=torch.int32, device=device)
        self.zipf = {vocab: self._make_zipf(vocab) for vocab in self.sizes.vocabs}

    def fill(self, rows: int, vocab: int, flat: bool) -> Tensor:
        """Random logits (rows, vocab)."""
        logits = self.memory[: rows * vocab].view(rows, vocab)
        if flat:
            return logits.normal_()
        shifts = torch.randint(0, vocab, (rows,)).tolist()
        for row, shift in enumerate(shifts):
            logits[row] = self.zipf[vocab].roll(shift)
        return logits

    def _make_zipf(self, vocab: int) -> Tensor:
        ranks = torch.arange(1, vocab + 1, dtype=torch.float32, device=self.device)
        noise = torch.empty_like(ranks).normal_(0, 0.3)
        order = torch.randperm(vocab, device=self.device)
        return (-1.3 * ranks.log() + noise)[order]

    def time(self, launch: Launch) -> float:
        """Microseconds of one launch, replayed from a graph."""
        return 1e6 * time_captured([launch], self.device, PACE)

    def bind(self, logits: Tensor, spec: SamplingSpec, choice: DrawChoice = CHOICE) -> Launch:
        """A draw of these logits with one spec for all rows, each with a number of its own."""
        rows, vocab = logits.shape
        arrays = make_arrays(spec, rows)
        sampling, mode = upload(arrays, vocab, self.device), SamplingMode.of(arrays)
        tokens = self.tokens[:rows]
        return partial(draw, tokens, logits, sampling, mode, self.scratch, choice)

    def bind_scores(self, logits: Tensor) -> Launch:
        """The scores of the tokens drawn last."""
        rows, vocab = logits.shape
        answer = ScoredTensors(*(each[:rows] for each in self.scores))
        scratch = ScoreScratch.allocate(rows, vocab, self.device)
        return partial(score, answer, logits, self.tokens[:rows], self.top[:rows], scratch)

    def report(self, name: str, times: dict[int, float]) -> None:
        """Print a line and keep its numbers."""
        text = "  ".join(f"{rows}: {time:7.1f}" for rows, time in times.items())
        print(f"{name:<36} {text}", flush=True)
        self.lines.append({"name": name, "microseconds": times})

    def check(self, spec: SamplingSpec) -> None:
        """Hold the draws of a few rows to the reference's."""
        for flat in (False, True):
            logits = self.fill(self.sizes.checked, self.sizes.vocabs[0], flat)
            self.bind(logits, spec)()
            expected = reference.sample(
                logits.cpu().numpy(), make_arrays(spec, self.sizes.checked)
            ).tokens
            drawn = self.tokens[: self.sizes.checked].cpu().numpy()
            if not np.array_equal(drawn, expected):
                raise AssertionError(f"{spec} drew {drawn}, the reference {expected}")


def make_arrays(spec: SamplingSpec, rows: int) -> Any:
    """SamplingArrays of `rows` rows that differ in their sequence."""
    return build_sampling_arrays(
        [Row(SequenceId(f"r{row}", row), (1,), 9, (0,), spec) for row in range(rows)]
    )


def draw_plainly(logits: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """What the draw would be in PyTorch's operations: sort, sum, search."""
    values, order = torch.sort(logits, dim=1, descending=True, stable=True)
    masses = ((values - values[:, :1]).double() / 0.8).exp().cumsum(1)
    kept = torch.searchsorted(masses, top_p * masses[:, -1:])
    ends = masses.gather(1, kept.clamp(max=logits.shape[1] - 1))
    return order.gather(1, torch.searchsorted(masses, uniforms * ends, right=True))


def warm(sweep: Sweep, choices: Sequence[DrawChoice]) -> None:
    """Compiles every kernel, several at a time."""
    launches: list[Launch] = []
    for vocab in sweep.sizes.vocabs:
        logits = sweep.fill(max(sweep.sizes.rows), vocab, flat=False)
        tokens = sweep.tokens[: logits.shape[0]]
        launches += [sweep.bind(logits, SETTINGS["temperature"], choice) for choice in choices]
        launches += [sweep.bind_scores(logits)]
        launches += [partial(draw_greedy, tokens, logits, sweep.scratch.draw)]
    if sweep.device.type == "cuda":
        run_together(launches, sweep.device)


def sweep_settings(sweep: Sweep) -> None:
    """Every setting and vocabulary by rows."""
    sizes = sweep.sizes
    for spec in SETTINGS.values():
        sweep.check(spec)
    for vocab in sizes.vocabs:
        lines: dict[str, dict[int, float]] = {}
        for rows in sizes.rows:
            logits = sweep.fill(rows, vocab, flat=False)
            tokens = sweep.tokens[:rows]
            launches: dict[str, Launch] = {
                "torch.argmax": partial(torch.argmax, logits, 1),
                "greedy": partial(draw_greedy, tokens, logits, sweep.scratch.draw),
                f"logprobs {LOGPROBS}": sweep.bind_scores(logits),
            }
            launches |= {name: sweep.bind(logits, spec) for name, spec in SETTINGS.items()}
            uniforms = torch.rand(rows, 1, dtype=torch.float64, device=sweep.device)
            launches["top-p 0.9 by torch.sort"] = partial(draw_plainly, logits, uniforms, 0.9)
            for name, launch in launches.items():
                lines.setdefault(name, {})[rows] = sweep.time(launch)
            logits = sweep.fill(rows, vocab, flat=True)
            for name in ("temperature", "top-p 0.9"):
                launch = sweep.bind(logits, SETTINGS[name])
                lines.setdefault(f"{name}, flat", {})[rows] = sweep.time(launch)
        for name, times in lines.items():
            sweep.report(f"{vocab} {name}", times)


def sweep_choices(sweep: Sweep) -> None:
    """Every candidate at the larger vocabulary, with top-p; the least sum of times first."""
    vocab = max(sweep.sizes.vocabs)
    found = []
    for choice in CANDIDATES:
        times = {}
        for rows in sweep.sizes.rows:
            logits = sweep.fill(rows, vocab, flat=False)
            times[rows] = sweep.time(sweep.bind(logits, SETTINGS["top-p 0.9"], choice))
        found.append((sum(times.values()), describe(choice), times))
    for _, name, times in sorted(found, key=lambda entry: entry[0]):
        sweep.report(name, times)


def describe(choice: DrawChoice) -> str:
    """A choice in a few characters."""
    warps = f"{choice.scan_warps}/{choice.weigh_warps}/{choice.search_warps}"
    return f"programs {choice.programs} warps {warps}"


def sweep(device: torch.device, tune: bool = False) -> list[dict[str, Any]]:
    """Measure, print, and return what was measured: times in microseconds by rows."""
    run = Sweep(device)
    warm(run, CANDIDATES if tune else (CHOICE,))
    sweep_settings(run)
    if tune:
        sweep_choices(run)
    return run.lines


if __name__ == "__main__":
    sweep(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "tune" in sys.argv)
