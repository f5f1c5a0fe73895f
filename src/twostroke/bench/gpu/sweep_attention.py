"""Times candidate tiles of the attention kernels, to choose tables from.

Every time is of a captured graph, decodes of one that reads layers in turn, more of them than the
caches hold. Every candidate is first held to PyTorch's result. Rates of prefill count the causal
half. Run as `python -m twostroke.bench.gpu.sweep_attention [part …]`; a part is a name of PARTS. On
a CPU, in Triton's interpreter, it goes through the same steps with tiny shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from twostroke.bench.gpu.sweep import measure_copy, time_captured, try_together
from twostroke.bench.gpu.timing import Pace
from twostroke.kernels.cuda import attention
from twostroke.kernels.cuda.attention_decode import DecodeConfig, decode
from twostroke.kernels.cuda.attention_prefill import PrefillConfig, prefill
from twostroke.kernels.cuda.attention_work import AttentionScratch, Look, Work
from twostroke.kernels.cuda.types import BLOCK_TOKENS, KvLayer, StepTensors, Tensor

Launch = Callable[[], Any]
PARTS = ("prefill", "decode", "other")
DTYPE = torch.float16
PACE = Pace(least=4, most=12, budget_s=0.02)
ROTATED_BYTES = 300_000_000
COPIED_BYTES = 2_000_000_000

PREFILLS = (
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(128, 64, 8, 4),
    PrefillConfig(128, 64, 8, 3, boxes=True),
    PrefillConfig(128, 128, 8, 3),
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(128, 128, 8, 3, boxes=True),
    PrefillConfig(64, 64, 4, 3),
    PrefillConfig(64, 64, 4, 3, boxes=True),
)
# Programs a processor, warps, stages.
DECODES = ((1, 4, 3), (2, 4, 3), (3, 4, 3), (4, 4, 3), (8, 4, 3), (3, 4, 4), (3, 2, 3), (3, 8, 3))


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows that end at one context, each with this many new tokens."""

    rows: int
    tokens: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return 4 * self.rows * self.context * self.kv_heads * self.head_dim

    @property
    def flops(self) -> int:
        """Operations of both products, of what is seen."""
        past = self.context - self.tokens
        pairs = self.tokens * past + self.tokens * (self.tokens + 1) // 2
        return 4 * self.rows * pairs * self.heads * self.head_dim

    def describe(self) -> str:
        """The shape in a few characters."""
        return f"{self.rows}x{self.tokens}@{self.context} {self.heads}/{self.kv_heads}"


LONG = (Shape(1, 8192, 8192, 32, 32), Shape(1, 8192, 8192, 32, 8), Shape(1, 2048, 2048, 32, 32))
SHORT = (
    Shape(1, 1, 2048, 32, 32),
    Shape(1, 1, 8192, 32, 8),
    Shape(8, 1, 2048, 32, 8),
    Shape(32, 1, 2048, 32, 32),
    Shape(32, 1, 2048, 32, 8),
    Shape(128, 1, 2048, 32, 8),
)
TINY_LONG = (Shape(1, 130, 130, 2, 1, 64),)
TINY_SHORT = (Shape(2, 1, 200, 2, 1, 64),)


class Sweep:
    """The device, its copy bandwidth, and what was measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self.rows: list[dict[str, Any]] = []
        size = COPIED_BYTES if self.is_gpu else 1_000_000
        self.copy = measure_copy(device, 2 * size, PACE)
        print(f"copy {self.copy / 1e9:.0f} GB/s", flush=True)

    def report(self, name: str, text: str, **values: Any) -> None:
        """Print a line and keep its numbers."""
        print(f"{name:<28} {text}", flush=True)
        self.rows.append({"name": name, **values})

    def time(self, launches: Sequence[Launch]) -> float:
        """Seconds of one launch on average."""
        return time_captured(launches, self.device, PACE)

    def warm(self, launches: Mapping[str, Launch]) -> dict[str, str]:
        """Compile what these launch; what failed, and how."""
        errors = zip(launches, try_together(list(launches.values()), self.device), strict=True)
        return {name: repr(error)[:60] for name, error in errors if error is not None}


def make_works(shape: Shape, device: torch.device, layers: int) -> list[Work]:
    """The same queries over each of these layers of a pool of random numbers."""
    blocks = -(-shape.context // BLOCK_TOKENS)
    extents = (layers, 2, shape.rows * blocks, shape.kv_heads, BLOCK_TOKENS, shape.head_dim)
    pool = torch.empty(extents, dtype=DTYPE, device=device).normal_()

    def place(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    tokens, rows = shape.tokens, range(shape.rows)
    group = shape.heads // shape.kv_heads
    tile = attention.get_tile_tokens(group, shape.head_dim, False)
    tiles = [(row, first) for row in rows for first in range(0, tokens, tile) if tokens > 1]
    step = StepTensors(
        tokens=place([]),
        positions=place([]),
        token_rows=place([]),
        row_offsets=place([row * tokens for row in range(shape.rows + 1)]),
        contexts=place([shape.context] * shape.rows),
        block_tables=torch.randperm(extents[2], device=device).int().view(shape.rows, blocks),
        logit_rows=place([]),
        decode_rows=place([row for row in rows if tokens == 1]),
        tiles=place([number for pair in tiles for number in pair]).view(len(tiles), 2),
        tile_tokens=tile,
        longest=shape.context,
    )
    q = torch.empty(shape.rows * tokens, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
    q.normal_()
    out = torch.full_like(q, torch.nan).flatten(1)
    look = Look(shape.head_dim**-0.5)
    return [Work(out, q, KvLayer(layer[0], layer[1]), step, look) for layer in pool]


def prepare_sdpa(shape: Shape, work: Work) -> Launch:
    """PyTorch's attention of a work's contiguous keys and values."""
    tables = work.step.block_tables.long()

    def gather(part: Tensor) -> Tensor:
        return part[tables].transpose(1, 2).flatten(2, 3)[:, :, : shape.context].contiguous()

    keys, values = gather(work.kv.keys), gather(work.kv.values)
    q = work.q.view(shape.rows, shape.tokens, shape.heads, shape.head_dim)
    q = q.transpose(1, 2).contiguous()
    return lambda: functional.scaled_dot_product_attention(
        q, keys, values, is_causal=shape.tokens > 1, enable_gqa=shape.heads != shape.kv_heads
    )


def check(work: Work, launch: Launch, expected: Tensor) -> str:
    """What is wrong with a launch's result, or nothing."""
    work.out.fill_(torch.nan)
    launch()
    theirs = expected.transpose(1, 2).flatten(2).flatten(0, 1).float()
    error = (work.out.float() - theirs).norm() / theirs.norm()
    return "" if error < 2e-3 else f" WRONG: error {float(error):.2g}"


def describe(config: PrefillConfig) -> str:
    """A configuration in a few characters."""
    boxes = " boxes" if config.boxes else ""
    registers = f" r{config.registers}" if config.registers else ""
    return f"{config.rows}x{config.keys} w{config.warps} s{config.stages}{boxes}{registers}"


def with_backend(launch: Launch, backend: SDPBackend) -> Launch:
    """The launch by one of PyTorch's kernels."""

    def run() -> Any:
        with sdpa_kernel(backend):
            return launch()

    return run


def sweep_prefill(sweep: Sweep, shapes: Sequence[Shape], configs: Sequence[PrefillConfig]) -> None:
    """Each configuration on each shape, beside PyTorch's kernels."""
    works = {shape: make_works(shape, sweep.device, 1)[0] for shape in shapes}
    for shape, work in works.items():
        launches: dict[str, Launch] = {
            describe(each): partial(prefill, work, each) for each in configs
        }
        failed = sweep.warm(launches)
        sdpa = prepare_sdpa(shape, work)
        expected = sdpa()
        wrong = {
            name: check(work, each, expected)
            for name, each in launches.items()
            if name not in failed
        }
        theirs = {"sdpa": sdpa}
        if sweep.is_gpu:
            theirs["flash"] = with_backend(sdpa, SDPBackend.FLASH_ATTENTION)
            theirs["cudnn"] = with_backend(sdpa, SDPBackend.CUDNN_ATTENTION)
        # One after the other: which kernel PyTorch takes is set for all threads.
        for name, launch in theirs.items():
            failed |= sweep.warm({name: launch})
        times = {
            name: sweep.time([launch])
            for name, launch in (theirs | launches).items()
            if name not in failed
        }
        for name in sorted(times, key=lambda name: times[name]):
            rate = shape.flops / times[name] / 1e12
            ratio = times["sdpa"] / times[name]
            text = f"{name:<20} {rate:5.0f} TFLOP/s  {ratio:.2f} of sdpa{wrong.get(name, '')}"
            sweep.report(shape.describe(), text, seconds=times[name], config=name)
        for name, error in failed.items():
            sweep.report(shape.describe(), f"{name} failed: {error}")


def make_decode_config(
    work: Work, scratch: AttentionScratch, setting: tuple[int, int, int]
) -> DecodeConfig:
    """The configuration of so many programs a processor, with these warps and stages."""
    programs, warps, stages = setting
    wanted = -(-programs * scratch.processors // (work.step.decode_rows.shape[0] * work.kv_heads))
    blocks = -(-work.step.longest // BLOCK_TOKENS)
    most = min(blocks, scratch.places // work.step.decode_rows.shape[0])
    return DecodeConfig(max(1, min(wanted, most)), 1, warps, stages)


def sweep_decode(sweep: Sweep, shapes: Sequence[Shape]) -> None:
    """Each setting on each shape; the choice that the table makes is marked."""
    for shape in shapes:
        layers = max(2, ROTATED_BYTES // shape.kv_bytes) if sweep.is_gpu else 1
        works = make_works(shape, sweep.device, layers)
        sizes = (shape.rows, shape.heads, shape.head_dim, shape.context)
        scratch = AttentionScratch.allocate(sweep.device, *sizes)
        chosen = attention.choose_decode(works[0], scratch)
        configs = {chosen} | {make_decode_config(works[0], scratch, each) for each in DECODES}
        names = {f"runs {c.runs} w{c.warps} s{c.stages}": c for c in configs}
        launches: dict[str, Launch] = {
            name: partial(decode, works[0], scratch, config) for name, config in names.items()
        }
        failed = sweep.warm(launches)
        expected = prepare_sdpa(shape, works[0])()
        results = []
        for name, config in names.items():
            if name in failed:
                sweep.report(shape.describe(), f"{name} failed: {failed[name]}")
                continue
            wrong = check(works[0], launches[name], expected)
            seconds = sweep.time([partial(decode, work, scratch, config) for work in works])
            rate = shape.kv_bytes / seconds
            mark = " *" if config == chosen else ""
            text = f"{name} {rate / 1e9:.0f} GB/s ({rate / sweep.copy:.0%}){mark}{wrong}"
            results.append((seconds, text))
        best = "  ".join(text for _, text in sorted(results)[:4])
        starred = [text for _, text in sorted(results)[4:] if "*" in text or "WRONG" in text]
        sweep.report(shape.describe(), "  ".join([best, *starred]), results=sorted(results))


def sweep_other(sweep: Sweep) -> None:
    """The public call, as it is and exact, and the exact bits of tokens alone and in a chunk."""
    tiny = not sweep.is_gpu
    long = TINY_LONG[0] if tiny else LONG[1]
    short = TINY_SHORT[0] if tiny else SHORT[4]
    for shape in (long, short):
        work = make_works(shape, sweep.device, 1)[0]
        sizes = (shape.rows, shape.heads, shape.head_dim, shape.context)
        scratch = AttentionScratch.allocate(sweep.device, *sizes)
        expected = prepare_sdpa(shape, work)()
        times, wrong = [], []
        for exact in (False, True):
            look = replace(work.look, exact=exact)
            launch = partial(attention.attend, work.out, work.q, work.kv, work.step, look, scratch)
            wrong.append(check(work, launch, expected))
            times.append(sweep.time([launch]))
        text = f"exact takes {times[1] / times[0]:.2f} times as long{wrong[0]}{wrong[1]}"
        sweep.report(shape.describe(), text, seconds=times)
    sweep.report("exact bits", f"{count_differing(sweep, long)} outputs differ")


def count_differing(sweep: Sweep, shape: Shape) -> int:
    """Outputs of single tokens that differ from the same tokens' in one chunk."""
    work = make_works(shape, sweep.device, 1)[0]
    sizes = (1, shape.heads, shape.head_dim, shape.context)
    scratch = AttentionScratch.allocate(sweep.device, *sizes)
    look = replace(work.look, exact=True)
    attention.attend(work.out, work.q, work.kv, work.step, look, scratch)
    differing = 0
    for token in sorted({0, shape.tokens // 3, shape.tokens // 2, shape.tokens - 1}):
        numbers = torch.tensor([0, 1, token + 1], dtype=torch.int32, device=sweep.device)
        step = replace(
            work.step,
            row_offsets=numbers[:2].clone(),
            contexts=numbers[2:].clone(),
            decode_rows=numbers[:1].clone(),
            tiles=work.step.tiles[:0],
        )
        out = torch.full_like(work.out[:1], torch.nan)
        attention.attend(out, work.q[token : token + 1], work.kv, step, look, scratch)
        differing += int((out != work.out[token : token + 1]).sum())
    return differing


def sweep(device: torch.device, parts: Sequence[str] = PARTS) -> list[dict[str, Any]]:
    """Measure these parts, print a line each, and return the numbers."""
    run = Sweep(device)
    if "prefill" in parts:
        sweep_prefill(run, LONG if run.is_gpu else TINY_LONG, PREFILLS)
    if "decode" in parts:
        sweep_decode(run, SHORT if run.is_gpu else TINY_SHORT)
    if "other" in parts:
        sweep_other(run)
    return run.rows


if __name__ == "__main__":
    cuda = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sweep(cuda, sys.argv[1:] or PARTS)
