"""Unit 10: quantisation, which buys decode its bytes and prefill nothing of the kind."""

from __future__ import annotations

import random

from twostroke.lab.machines import get_pool_tokens, open_station
from twostroke.lab.question import Question
from twostroke.lab.unit import Curves, Findings, Setup
from twostroke.spec.quant import Format

IDEA = """Decode reads every weight for every step, so weights of half the bits are read in half
the time, and the memory they leave holds more keys and values. Prefill is bound by arithmetic:
fewer bits help it only where the device also computes faster with them. And with many rows keys
and values are most of the bytes, so that there the weights' bits matter little."""
_FORMATS = ("bf16", "q8_0", "q4_0")
_ROWS = (1, 4, 16, 64, 256)


def run(setup: Setup) -> Findings:
    """Least time of steps with weights in 16, 8 and 4 bits."""
    curves, lines = {}, []
    numbers: dict[str, float] = {}
    for name in _FORMATS:
        station = open_station("llama-3.1-8b", "a100-80gb", weights=name)
        decode = [station.get_floor(rows, 1, 1024).seconds * 1e3 for rows in _ROWS]
        prefill = station.get_floor(1, 2048, 0).seconds * 1e3
        curves[name] = (_ROWS, decode)
        numbers |= {f"{name}: decode": decode[0], f"{name}: prefill": prefill}
        lines.append(
            f"{name}: {station.spec.weight_bytes / 1e9:.1f} GB; at least {decode[0]:.1f} ms a step "
            f"of one row, {decode[-1]:.1f} of 256, {prefill:.0f} ms a prompt of 2,048; room for "
            f"{get_pool_tokens(station):,} tokens"
        )
    picture = Curves(
        "Least time of a decode step at context 1,024 (llama-3.1-8b, A100-80GB)",
        ("rows (logarithmic)", "ms (logarithmic)"),
        curves,
        ticks=_ROWS,
    )
    return Findings(lines, numbers, picture.draw)


def ask_size(billions: int, name: str) -> Question:
    """Bytes of weights in a block format."""
    weights = billions * 10**9
    block = Format[name].block
    return Question(
        f"{name} stores {block.weights} weights in {block.bytes} bytes. How much are {billions} "
        "billion of them?",
        weights / block.weights * block.bytes,
        "bytes",
        f"{billions}e9 / {block.weights} · {block.bytes} = "
        f"{weights / block.weights * block.bytes:,.0f} "
        f"bytes, {8 * block.bytes / block.weights:g} bits a weight: a block's scale counts too.",
    )


def draw_size(rng: random.Random) -> Question:
    """The same with other numbers."""
    return ask_size(rng.choice((1, 3, 7, 8, 13, 70)), rng.choice(("Q4_0", "Q4_1", "Q8_0", "Q5_0")))
