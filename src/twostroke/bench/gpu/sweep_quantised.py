"""Times candidate tiles of the quantised products, on Llama-3.1-8B's matrices, to choose tables.

Every time is of a captured graph that multiplies with different matrices in turn, more of them than
the caches hold, so launch costs between kernels count. Every candidate is first held to a product
in float32. Run as `python -m twostroke.bench.gpu.sweep_quantised [part …]`; a part is a name of
PARTS. On a CPU, in Triton's interpreter, it goes through the same steps with tiny matrices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from twostroke.bench.gpu.sweep import measure_copy, run_together, time_captured
from twostroke.bench.gpu.timing import Launch, Pace
from twostroke.kernels.cuda.quantised import (
    Workspace,
    dequantise,
    make_workspace,
    product,
    product_exact,
    product_many,
)
from twostroke.kernels.cuda.quantised_choice import (
    Config,
    choose_exact,
    choose_few,
    count_parts,
)
from twostroke.kernels.cuda.repack import dequantise_rows, make_random
from twostroke.kernels.cuda.types import PLAIN, Fused, QuantMatrix, Tensor

Run = Callable[[Tensor, Tensor, QuantMatrix, Fused], Any]
PARTS = ("one", "few", "exact", "many")
DTYPE = torch.float16
PACE = Pace(least=4, most=12, budget_s=0.02)
GATED = "gate_up"

ONE = {
    32: (
        Config(8, 16, 1),
        Config(4, 32, 2),
        Config(8, 16, 1, warps=2),
        Config(8, 32, 1),
        Config(8, 16, 1, stages=6),
    ),
    128: (
        Config(8, 16, 1, stages=3),
        Config(4, 32, 2, stages=3),
        Config(8, 16, 1, stages=3, warps=2),
    ),
}
FEW = {
    8: (
        Config(1, 64, 8, parts=4),
        Config(2, 64, 8, parts=4),
        Config(2, 32, 8, parts=2, warps=2),
    ),
    32: (
        Config(1, 128, 32, parts=8, scale_weights=True),
        Config(1, 64, 32, parts=4, scale_weights=True),
        Config(1, 128, 32, parts=8),
    ),
}
MANY = (
    Config(1, 128, 128, warps=8, stages=3, scale_weights=True),
    Config(1, 128, 128, warps=8, stages=2, scale_weights=True),
    Config(1, 64, 128, warps=4, stages=3, scale_weights=True),
    Config(1, 128, 64, warps=4, stages=3, scale_weights=True),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Matrices (outputs, inputs), bytes that exceed the caches, and tokens of a prefill."""

    shapes: dict[str, tuple[int, int]]
    pool_bytes: int = 120_000_000
    copied_bytes: int = 1_000_000_000
    many: tuple[int, ...] = (128, 256, 512, 2048)


FULL = Sizes(
    {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    }
)
TINY = Sizes({"o": (64, 256), "gate_up": (64, 256)}, 10_000, 1_000_000, (130,))


class Sweep:
    """Matrices and clocks of one run; collects what it measured and prints as it goes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sizes = FULL if device.type == "cuda" else TINY
        self.rows: list[dict[str, Any]] = []
        self.work = make_workspace(device)
        self.copy = measure_copy(device, 2 * self.sizes.copied_bytes, PACE)
        self.report("copy", f"{self.copy / 1e9:.0f} GB/s", copy=self.copy)

    def report(self, name: str, text: str, **values: Any) -> None:
        """Print a line and keep its numbers."""
        print(f"{name:<24} {text}", flush=True)
        self.rows.append({"name": name, **values})

    def draw(self, *shape: int) -> Tensor:
        """Random activations."""
        return torch.empty(shape, dtype=DTYPE, device=self.device).normal_()

    def time(self, launches: Sequence[Launch]) -> float:
        """Seconds of one launch on average."""
        return time_captured(launches, self.device, PACE)

    def warm(self, launches: Sequence[Launch]) -> None:
        """Compile what these launch."""
        if self.device.type == "cuda":
            run_together(launches, self.device)


class Case:
    """One kind of matrix of the model, multiplied with so many tokens."""

    def __init__(self, sweep: Sweep, name: str, kind: tuple[int, int], tokens: int) -> None:
        outputs, inputs = sweep.sizes.shapes[name]
        make = partial(make_random, (outputs, inputs), *kind, sweep.device)
        self.name = name
        self.matrices = [make(0)]
        count = min(16, -(-sweep.sizes.pool_bytes // self.matrices[0].bytes))
        self.matrices += [make(seed) for seed in range(1, count)]
        self.x = sweep.draw(tokens, inputs)
        self.fused = PLAIN
        if name == GATED:
            self.fused = Fused(gate="silu")
        self.out = sweep.draw(tokens, outputs // 2 if self.fused.gate else outputs)
        self.true = self._multiply_plainly()

    def _multiply_plainly(self) -> Tensor:
        matrix, x = self.matrices[0], self.x.float()
        pieces = []
        for begin in range(0, matrix.outputs, 8192):
            weights = dequantise_rows(matrix, begin, min(begin + 8192, matrix.outputs))
            pieces.append(x @ weights.T)
        y = torch.cat(pieces, dim=1)
        if not self.fused.gate:
            return y
        gate, up = y.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    def bind(self, run: Run) -> list[Launch]:
        """Launches with each of its matrices."""
        return [partial(run, self.out, self.x, each, self.fused) for each in self.matrices]

    def check(self, run: Run) -> None:
        """Hold the error of a product to that of rounding its weights and its result to 16 bits."""
        self.out.fill_(float("nan"))
        run(self.out, self.x, self.matrices[0], self.fused)
        error = (self.out.float() - self.true).norm() / self.true.norm()
        if not error < 2e-3:
            raise AssertionError(f"{self.name}: relative error {error}")


def describe(config: Config) -> str:
    """A configuration in a few characters."""
    text = f"{config.slices}x{config.rows}x{config.columns} w{config.warps} s{config.stages}"
    text += f" /{config.parts}" if config.parts > 1 else ""
    return text + (" W" if config.scale_weights else "")


def sweep_configs(
    sweep: Sweep, cases: Sequence[Case], runs: dict[str, Run], tokens: int, label: str
) -> None:
    """Each of the runs on every case: GB/s of weights, and their share of the copy's."""
    sweep.warm([case.bind(run)[0] for run in runs.values() for case in cases])
    lines = []
    for name, run in runs.items():
        texts, values, total = [], {}, 0.0
        for case in cases:
            case.check(run)
            seconds = sweep.time(case.bind(run))
            rate = case.matrices[0].bytes / seconds
            texts.append(f"{case.name} {rate / 1e9:.0f} ({rate / sweep.copy:.0%})")
            values[case.name] = seconds
            total += seconds
        lines.append((total, f"{label} {name}", "  ".join(texts), values))
    for _, name, text, values in sorted(lines, key=lambda line: line[0]):
        sweep.report(name, text, tokens=tokens, **values)


def bind_config(config: Config, work: Workspace) -> Run:
    """A product with these tiles, in as many parts as make sense."""

    def run(out: Tensor, x: Tensor, matrix: QuantMatrix, fused: Fused) -> None:
        parts = min(config.parts, count_parts(matrix, config.slices, config.rows))
        product(out, x, matrix, fused, work, replace(config, parts=parts))

    return run


def bind_choice(work: Workspace | None) -> Run:
    """A product with the tiles that the tables have."""

    def run(out: Tensor, x: Tensor, matrix: QuantMatrix, fused: Fused) -> None:
        product(out, x, matrix, fused, work, choose_few(x.shape[0], matrix, work is not None))

    return run


def sweep_few(sweep: Sweep, group: int, tokens: int, configs: Sequence[Config]) -> None:
    """Candidates of few tokens, and what the tables have."""
    runs = {describe(config): bind_config(config, sweep.work) for config in configs}
    runs["chosen"] = bind_choice(sweep.work)
    names = [name for name in sweep.sizes.shapes if tokens == 1 or name != "head"]
    cases = [Case(sweep, name, (4, group), tokens) for name in names]
    sweep_configs(sweep, cases, runs, tokens, f"T{tokens} g{group}")


def sweep_exact(sweep: Sweep) -> None:
    """The exact product of one token, with and without a workspace."""

    def bind(work: Workspace | None, config: Config | None) -> Run:
        def run(out: Tensor, x: Tensor, matrix: QuantMatrix, _: Fused) -> None:
            product_exact(out, x, matrix, None, work, config)

        return run

    case = Case(sweep, "o", (4, 32), 1)
    shared = choose_exact(case.matrices[0], True)
    runs = {"exact": bind(sweep.work, shared), "exact alone": bind(None, replace(shared, parts=1))}
    sweep_configs(sweep, [case], runs, 1, "T1 g32")


def sweep_many(sweep: Sweep) -> None:
    """Many tokens: in the kernel, with weights written out, and what PyTorch takes without that."""
    name = GATED
    outputs, inputs = sweep.sizes.shapes[name]
    matrix = make_random((outputs, inputs), 4, 32, sweep.device, 0)
    values = torch.empty(outputs, inputs, dtype=DTYPE, device=sweep.device)
    dequantise(values, matrix)
    whole, some = torch.empty_like(values), torch.empty(4096, inputs, dtype=DTYPE)
    some = some.to(sweep.device)
    for tokens in sweep.sizes.many:
        x, out = sweep.draw(tokens, inputs), sweep.draw(tokens, outputs)
        bound = partial(product_many, out, x, matrix, None)
        launches: dict[str, Launch] = {
            describe(config): partial(bound, None, config) for config in MANY
        }
        launches["written"] = partial(bound, whole)
        launches["in pieces"] = partial(bound, some)
        launches["torch.mm"] = partial(torch.mm, x, values.T, out=out)
        sweep.warm(list(launches.values()))
        true = (x[:8].float() @ values.float().T)[:, :4096]
        texts, seconds = [], {}
        for label, launch in launches.items():
            out.fill_(float("nan"))
            launch()
            error = (out[:8, :4096].float() - true).norm() / true.norm()
            assert error < 2e-3, f"{label}: relative error {error}"
            seconds[label] = sweep.time([launch])
            rate = 2 * tokens * outputs * inputs / seconds[label]
            texts.append(f"{label} {rate / 1e12:.0f}")
        sweep.report(f"T{tokens} TFLOP/s", "  ".join(texts), tokens=tokens, **seconds)


def sweep(device: torch.device, parts: Sequence[str] = PARTS) -> list[dict[str, Any]]:
    """Run these parts, print their lines, and return their numbers."""
    run = Sweep(device)
    if "one" in parts:
        for group, configs in ONE.items():
            sweep_few(run, group, 1, configs)
    if "few" in parts:
        for tokens, configs in FEW.items():
            sweep_few(run, 32, tokens, configs)
    if "exact" in parts:
        sweep_exact(run)
    if "many" in parts:
        sweep_many(run)
    return run.rows


if __name__ == "__main__":
    sweep(torch.device("cuda" if torch.cuda.is_available() else "cpu"), sys.argv[1:] or PARTS)
