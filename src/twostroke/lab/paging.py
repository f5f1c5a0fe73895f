"""Unit 5: PagedAttention, or memory given out by the block as it is needed."""

from __future__ import annotations

import random

from twostroke.lab.arithmetic import count_blocks
from twostroke.lab.machines import build_replica, draw_arrivals, open_station, simulate
from twostroke.lab.question import Question
from twostroke.lab.unit import Curves, Findings, Setup

IDEA = """Nobody knows how long an answer will be. Who reserves room for the longest one keeps
most of the memory empty. Paging gives out blocks of a few tokens as they are filled, and a table
says where each request's blocks are, so that only the last block of each is partly empty (Kwon et
al. 2023)."""
_LONGEST = 4096


def run(setup: Setup) -> Findings:
    """The same load with 4,096 tokens reserved for each request, and paged."""
    station = open_station("llama-2-7b", "a100-80gb")
    arrivals = draw_arrivals(300, 0, (256, 256), 5)
    curves, lines = {}, []
    numbers: dict[str, float] = {}
    for name, reserve in (("4,096 reserved each", _LONGEST), ("paged", 0)):
        records = simulate(build_replica(station, reserve_tokens=reserve), arrivals)
        columns, samples = records.get_columns(), records.samples.get_columns()
        seconds = int(columns["ended_ns"].max()) / 1e9
        rate = int(columns["new_tokens"].sum()) / seconds
        rows = records.totals[0].step_rows / records.totals[0].steps
        numbers |= {f"{name}: tokens/s": rate, f"{name}: rows": rows}
        lines.append(f"{name}: {rows:.0f} rows in a step, {rate:,.0f} tokens/s, {seconds:.1f} s")
        chosen = range(0, len(samples["time_ns"]), max(1, len(samples["time_ns"]) // 40))
        times = [float(samples["time_ns"][at]) / 1e9 for at in chosen]
        curves[name] = (times, [float(samples["running"][at]) for at in chosen])
    picture = Curves(
        "300 requests at once, llama-2-7b on an A100-80GB, simulated",
        ("seconds", "requests running"),
        curves,
        ("linear", "linear"),
    )
    return Findings(lines, numbers, picture.draw)


def ask_blocks(lengths: list[int], block: int) -> Question:
    """Blocks that requests of these lengths hold."""
    each = [-(-length // block) for length in lengths]
    return Question(
        f"Requests hold {', '.join(map(str, lengths))} tokens; a block has room for {block}. How "
        "many blocks do they hold together?",
        count_blocks(lengths, block),
        "blocks",
        f"Each rounds up for itself: {' + '.join(map(str, each))} = {sum(each)}.",
        tolerance=0.0,
    )


def draw_blocks(rng: random.Random) -> Question:
    """The same with other lengths."""
    return ask_blocks(
        [rng.randint(10, 400) for _ in range(rng.randint(3, 5))], rng.choice((8, 16, 32))
    )


def ask_share(mean: int, longest: int, block: int) -> Question:
    """Share of the memory held that is in use: reserved for the longest, or paged."""
    share = 100 * mean / (mean + (block - 1) / 2)
    return Question(
        f"Requests hold {mean:,} tokens in the mean, of any length up to {longest:,}. Reserved "
        f"for the longest, {mean / longest:.1%} of the memory would be in use. How much is it "
        f"with blocks of {block}?",
        share,
        "%",
        f"The last block of each is as likely to end anywhere: ({block} − 1) / 2 = "
        f"{(block - 1) / 2:g} places are empty in the mean, {mean:,} / ({mean:,} + "
        f"{(block - 1) / 2:g}) = {share:.2f} %.",
        tolerance=0.002,
    )


def draw_share(rng: random.Random) -> Question:
    """The same with other numbers."""
    return ask_share(
        rng.randint(10, 60) * 10, rng.choice((2048, 4096, 8192)), rng.choice((16, 32, 64))
    )
