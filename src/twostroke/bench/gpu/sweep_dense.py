"""Times candidate tiles of the dense products, on Llama-2-7B's matrices, to choose tables from.

Every time is of a captured graph that multiplies with different matrices in turn, more of them than
the caches hold, so launch costs between kernels count. Every candidate is first held to PyTorch's
own error. Run as `python -m twostroke.bench.gpu.sweep_dense [part …]`; a part is a name of PARTS.
On a CPU, in Triton's interpreter, it goes through the same steps with tiny matrices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from twostroke.bench.gpu.sweep import measure_copy, run_together, time_captured
from twostroke.bench.gpu.timing import Launch, Pace
from twostroke.kernels.cuda import rows
from twostroke.kernels.cuda.dense import product, product_exact, product_many
from twostroke.kernels.cuda.overlap import can_overlap
from twostroke.kernels.cuda.rope import HeadRope, HeadShape, rope_write
from twostroke.kernels.cuda.stream import Tile
from twostroke.kernels.cuda.types import (
    BLOCK_TOKENS,
    PLAIN,
    DenseMatrix,
    Fused,
    KvLayer,
    StepTensors,
    Tensor,
)

PARTS = ("vector", "tiles", "chain", "exact", "small")
DTYPE = torch.float16
EPS = 1e-5
PACE = Pace(least=4, most=12, budget_s=0.03)

VECTORS = (
    Tile(8, 1024, 0, 4, 3, 4096),
    Tile(8, 1024, 0, 4, 3),
    Tile(8, 1024, 0, 4, 4, 4096),
    Tile(4, 1024, 0, 4, 4, 4096),
    Tile(8, 512, 0, 2, 4, 4096),
    Tile(16, 512, 0, 4, 3, 4096),
    Tile(4, 2048, 0, 8, 3, 4096),
    Tile(8, 1024, 0, 4, 1, 4096),
    Tile(32, 256, 8, 4, 4, 1024),
)
# All of one instruction shape, so that their bits must agree.
EXACT_FEW = tuple(Tile(64, 64, 128, 4, stages) for stages in (3, 4, 6))
EXACT_MANY = (Tile(128, 64, 128, 8, 4), Tile(128, 64, 128, 4, 3), Tile(256, 64, 128, 8, 3))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Matrices (outputs, inputs) of a layer, layers of the chain, bytes that exceed the caches."""

    qkv: tuple[int, int] = (12288, 4096)
    o: tuple[int, int] = (4096, 4096)
    gate_up: tuple[int, int] = (22016, 4096)
    down: tuple[int, int] = (4096, 11008)
    head: tuple[int, int] = (32000, 4096)
    layers: int = 8
    pool_bytes: int = 400_000_000
    copied_bytes: int = 2_000_000_000
    many: int = 2048


TINY = Sizes(
    (96, 64), (64, 64), (64, 64), (64, 32), (100, 64),
    layers=1, pool_bytes=30_000, copied_bytes=1_000_000, many=130,
)  # fmt: skip


class Sweep:
    """Matrices and clocks of one run; collects what it measured and prints as it goes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sizes = Sizes() if device.type == "cuda" else TINY
        self.rows: list[dict[str, Any]] = []
        pool = torch.empty(self.sizes.pool_bytes // 2, dtype=DTYPE, device=device)
        self.pool = pool.normal_() / 64
        self.copy = measure_copy(device, 2 * self.sizes.copied_bytes, PACE)
        self.report("copy", f"{self.copy / 1e9:.0f} GB/s", copy=self.copy)

    def report(self, name: str, text: str, **values: Any) -> None:
        """Print a line and keep its numbers."""
        print(f"{name:<26} {text}", flush=True)
        self.rows.append({"name": name, **values})

    def cut(self, shape: tuple[int, int]) -> list[DenseMatrix]:
        """As many matrices of this shape as the pool holds, at least one."""
        outputs, inputs = shape
        size = outputs * inputs
        count = max(1, self.pool.numel() // size)
        return [
            DenseMatrix(self.pool[i * size : (i + 1) * size].view(outputs, inputs))
            for i in range(count)
        ]

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

    def check(self, multiply: Callable[..., None], x: Tensor, matrix: DenseMatrix) -> None:
        """Hold a product's error to twice that of PyTorch."""
        out = torch.full((x.shape[0], matrix.outputs), float("nan"), dtype=DTYPE, device=x.device)
        multiply(out, x, matrix)
        exact = x.float() @ matrix.values.float().t()
        error = (out.float() - exact).abs().max()
        plain = ((x @ matrix.values.t()).float() - exact).abs().max()
        if not error <= 2 * plain + 1e-3 * exact.abs().max():
            raise AssertionError(f"error {error} of {multiply}, PyTorch has {plain}")

    def share(self, num_bytes: float, seconds: float) -> str:
        """GB/s and share of the copy bandwidth."""
        rate = num_bytes / seconds
        return f"{rate / 1e9:5.0f} ({rate / self.copy:.0%})"


def describe(tile: Tile) -> str:
    """A tile in a few characters."""
    text = f"{tile.rows}x{tile.columns}"
    text += f"x{tile.tokens}" if tile.tokens else ""
    return f"{text} w{tile.warps} s{tile.stages} p{tile.prefetched}"


def sweep_tiles(sweep: Sweep, tokens: int, tiles: Sequence[Tile]) -> None:
    """Each tile on three matrices, alone, with launches that overlap, beside torch.mm."""
    sizes = sweep.sizes
    shapes = {"o": sizes.o, "gate_up": sizes.gate_up, "down": sizes.down}
    overlap = can_overlap(sweep.device)
    runs: dict[str, Callable[..., None]] = {
        describe(tile): partial(product, fused=PLAIN, tile=tile, overlap=overlap) for tile in tiles
    }
    if tokens > 1:
        runs["torch.mm"] = product_many
    cases = {
        name: (sweep.cut(shape), sweep.draw(tokens, shape[1]), sweep.draw(tokens, shape[0]))
        for name, shape in shapes.items()
    }
    sweep.warm(
        [
            partial(run, out, x, matrices[0])
            for run in runs.values()
            for matrices, x, out in cases.values()
        ]
    )
    for name, run in runs.items():
        texts, values = [], {}
        for case, (matrices, x, out) in cases.items():
            sweep.check(run, x, matrices[0])
            seconds = sweep.time([partial(run, out, x, matrix) for matrix in matrices])
            texts.append(f"{case} {sweep.share(matrices[0].bytes, seconds)}")
            values[case] = seconds
        sweep.report(f"T{tokens} {name}", "  ".join(texts), tokens=tokens, **values)


def make_chain(sweep: Sweep, tokens: int, fused: bool, overlap: bool | None) -> list[Launch]:
    """The four products of every layer, one behind the other, with what surrounds them."""
    sizes = sweep.sizes
    width, inner = sizes.o[0], sizes.down[1]
    stream, normed, attended = (sweep.draw(tokens, width) for _ in range(3))
    qkv, both, hidden = (sweep.draw(tokens, n) for n in (sizes.qkv[0], sizes.gate_up[0], inner))
    norm = sweep.draw(width)
    multiply = partial(product, overlap=overlap)
    launches: list[Launch] = []
    for _ in range(sizes.layers):
        weights = [
            DenseMatrix(torch.empty(shape, dtype=DTYPE, device=sweep.device).normal_() / 64)
            for shape in (sizes.qkv, sizes.o, sizes.gate_up, sizes.down)
        ]
        if fused:
            launches += [
                partial(multiply, qkv, stream, weights[0], Fused(norm=norm, eps=EPS)),
                partial(multiply, stream, attended, weights[1], Fused(residual=stream)),
                partial(multiply, hidden, stream, weights[2], Fused(norm, EPS, gate="silu")),
                partial(multiply, stream, hidden, weights[3], Fused(residual=stream)),
            ]
        else:
            launches += [
                partial(rows.add_rms_norm, stream, normed, stream, attended, norm, EPS),
                partial(multiply, qkv, normed, weights[0]),
                partial(multiply, attended, attended.clone(), weights[1]),
                partial(rows.add_rms_norm, stream, normed, stream, attended, norm, EPS),
                partial(multiply, both, normed, weights[2]),
                partial(rows.gated, hidden, both, "silu"),
                partial(multiply, attended, hidden, weights[3]),
            ]
    return launches


def sweep_chain(sweep: Sweep) -> None:
    """Layers' products with chosen tiles: fused or not, overlapping or not; and the head."""
    sizes = sweep.sizes
    layer_bytes = 2 * sum(a * b for a, b in (sizes.qkv, sizes.o, sizes.gate_up, sizes.down))
    overlap = can_overlap(sweep.device)
    for tokens in (1, 8, 16):
        for fused, overlaps in [(True, overlap), (True, False), (False, overlap)]:
            if tokens > 1 and not overlaps and overlap:
                continue
            launches = make_chain(sweep, tokens, fused, overlaps)
            sweep.warm(launches[: len(launches) // sizes.layers])
            seconds = sweep.time(launches) * len(launches) / sizes.layers
            name = f"T{tokens} layer fused={fused:d} overlap={overlaps:d}"
            text = f"{seconds * 1e6:.1f} us  {sweep.share(layer_bytes, seconds)}"
            sweep.report(name, text, seconds=seconds)
    matrices, x = sweep.cut(sizes.head), sweep.draw(1, sizes.head[1])
    logits = torch.empty(1, sizes.head[0], dtype=torch.float32, device=sweep.device)
    fused_norm = Fused(norm=sweep.draw(sizes.head[1]), eps=EPS)
    head = [partial(product, logits, x, matrix, fused_norm) for matrix in matrices]
    seconds = sweep.time(head)
    sweep.report("T1 head", sweep.share(matrices[0].bytes, seconds), seconds=seconds)


def sweep_exact(sweep: Sweep) -> None:
    """The exact product beside torch.mm, of few tokens and of many; and that bits agree."""
    sizes = sweep.sizes
    cases = [(1, sizes.o, EXACT_FEW), (32, sizes.gate_up, EXACT_FEW)]
    cases.append((sizes.many, sizes.gate_up, EXACT_MANY))
    for tokens, shape, tiles in cases:
        matrices, x, out = (
            sweep.cut(shape),
            sweep.draw(tokens, shape[1]),
            sweep.draw(tokens, shape[0]),
        )
        runs: dict[str, Callable[..., None]] = {
            f"exact {describe(tile)}": partial(product_exact, tile=tile) for tile in tiles
        }
        sweep.warm([partial(run, out, x, matrices[0]) for run in runs.values()])
        runs["torch.mm"] = product_many
        for name, run in runs.items():
            sweep.check(run, x, matrices[0])
            seconds = sweep.time([partial(run, out, x, matrix) for matrix in matrices])
            text = sweep.share(matrices[0].bytes, seconds)
            if tokens == sizes.many:
                text = f"{2 * tokens * shape[0] * shape[1] / seconds / 1e12:.0f} TFLOP/s"
            sweep.report(f"T{tokens} {name}", text, seconds=seconds)
    check_bits(sweep)


def check_bits(sweep: Sweep) -> None:
    """Count outputs of tokens alone, with each tile, that differ from those of all together."""
    shape, many = sweep.sizes.o, sweep.sizes.many
    matrix, x = sweep.cut(shape)[0], sweep.draw(many, shape[1])
    together = sweep.draw(many, shape[0])
    product_exact(together, x, matrix)
    differing = 0
    for tile in (*EXACT_FEW, *EXACT_MANY):
        for first, last in [(0, 1), (many // 2, many // 2 + 1), (1, many - 1)]:
            part = sweep.draw(last - first, shape[0])
            product_exact(part, x[first:last], matrix, tile=tile)
            differing += int((part != together[first:last]).sum())
    sweep.report("exact bits", f"{differing} outputs differ", differing=differing)


def sweep_small(sweep: Sweep) -> None:
    """The norm, the sum with the norm, and rope with the KV write: microseconds a launch."""
    shape = HeadShape(32, 32, 128)
    many, repeats = (4096, 40) if sweep.device.type == "cuda" else (3, 1)
    angles = torch.rand(many, 64, dtype=torch.float32, device=sweep.device)
    for tokens in sorted({1, min(32, many), many}):
        x, y, out = (sweep.draw(tokens, 4096) for _ in range(3))
        weight, qkv = sweep.draw(4096), sweep.draw(tokens, 3 * 4096)
        norm = partial(rows.rms_norm, out, x, weight, EPS)
        both = partial(rows.add_rms_norm, x, out, x, y, weight, EPS)
        step = make_step(sweep.device, tokens)
        times: dict[str, float] = {}
        for name, element in {"rope": DTYPE, "rope int8": torch.int8}.items():
            extents = (2, -(-tokens // BLOCK_TOKENS), 32, BLOCK_TOKENS, 128)
            keys, values = torch.zeros(extents, dtype=element, device=sweep.device).unbind(0)
            kv = KvLayer(keys, values)
            if element == torch.int8:
                key_scales, value_scales = (x[..., 0].float().contiguous() for x in (keys, values))
                kv = KvLayer(keys, values, key_scales, value_scales)
            heads = HeadRope(shape, angles, angles)
            write = partial(rope_write, out, qkv, step, kv, heads)
            times[name] = sweep.time([write] * repeats)
        times["norm"], times["add norm"] = (sweep.time([each] * repeats) for each in (norm, both))
        text = "  ".join(f"{name} {seconds * 1e6:.2f} us" for name, seconds in times.items())
        sweep.report(f"T{tokens} small", text, **times)


def make_step(device: torch.device, tokens: int) -> StepTensors:
    """One row of this many tokens, its blocks in order."""
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    table = torch.arange(-(-tokens // BLOCK_TOKENS), dtype=torch.int32, device=device)[None]
    row = torch.zeros_like(positions)
    empty = positions[:0]
    return StepTensors(
        positions, positions, row, empty, empty, table, empty, empty, empty, 64, tokens
    )  # fmt: skip


def sweep(device: torch.device, parts: Sequence[str] = PARTS) -> list[dict[str, Any]]:
    """Measure these parts, print a line each, and return the numbers."""
    run = Sweep(device)
    if "vector" in parts:
        sweep_tiles(run, 1, VECTORS)
    if "tiles" in parts:
        for tokens in (8, 16, 32, 64):
            stages = 4 if tokens < 64 else 3
            tiles = [Tile(32, 256, tokens, 4, stages, 1024), Tile(64, 256, tokens, 4, 3, 1024)]
            tiles += [Tile(64, 128, tokens, 4, stages, prefetched) for prefetched in (0, 1024)]
            sweep_tiles(run, tokens, tiles)
    if "chain" in parts:
        sweep_chain(run)
    if "exact" in parts:
        sweep_exact(run)
    if "small" in parts:
        sweep_small(run)
    return run.rows


if __name__ == "__main__":
    cuda = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sweep(cuda, sys.argv[1:] or PARTS)
