"""Unit 2: the roofline, and on which side of its ridge a step is."""

from __future__ import annotations

import random
from functools import partial

from twostroke.lab.arithmetic import get_ridge
from twostroke.lab.machines import open_station
from twostroke.lab.question import Question
from twostroke.lab.unit import Findings, Setup
from twostroke.plan.roofline import Shapes, build_points, find_kv_batch
from twostroke.plan.roofline_plot import RooflinePicture, draw_roofline
from twostroke.spec.work import get_model_work

IDEA = """A step takes at least its operations over the device's rate and at least its bytes over
the bandwidth. Operations a byte are its intensity, and where both take equally long is the ridge:
left of it memory decides, right of it arithmetic. Prefill lies right of it from a few hundred
tokens on; decode moves right with its batch, until keys and values, which no two rows share, hold
it back."""


def run(setup: Setup) -> Findings:
    """Points of llama-2-7b under an A100's roof."""
    station = open_station("llama-2-7b", "a100-80gb")
    shapes = Shapes((64, 128, 256, 1024, 4096), (1, 4, 16, 64, 256), (512, 4096))
    work = get_model_work(station.spec)
    points = build_points(work, station.device, station.cost, shapes)
    ridge = station.device.get_ridge("bf16")
    first = next(point for point in points if point.bound_by == "compute")
    last = next(point for point in points if point.rows == 256 and point.context == 4096)
    lines = (
        f"The ridge of an A100-80GB is at {ridge:.0f} FLOP per byte.",
        f"Of these prefills {first.new_tokens} tokens is the shortest that arithmetic bounds.",
        f"256 rows at context 4,096 reach {last.intensity:.1f} FLOP per byte: {last.kv_share:.0%} "
        "of their bytes are keys and values, which are most of them from "
        f"{find_kv_batch(work, 4096)} rows on.",
    )
    picture = RooflinePicture("llama-2-7b on an A100-80GB", station.device, ("bf16",), points)
    numbers = {"ridge": ridge, "first_bound": float(first.new_tokens), "kv_share": last.kv_share}
    return Findings(lines, numbers, partial(draw_roofline, picture))


def ask_bound(parameters: float, tokens: int, flops_per_s: float, bytes_per_s: float) -> Question:
    """Ridge and side of a prefill whose intensity is about its length."""
    ridge = get_ridge(flops_per_s, bytes_per_s)
    word = "compute" if tokens > ridge else "memory"
    return Question(
        f"A model of {parameters / 1e9:g} billion parameters in 16 bits prefills {tokens:,} tokens "
        f"on {flops_per_s / 1e12:g} TFLOP/s and {bytes_per_s / 1e12:g} TB/s. Where is the ridge, "
        "in FLOP "
        'per byte, and what bounds the prefill? (as in "100 FLOP/byte, memory")',
        ridge,
        "FLOP/byte",
        f"Ridge: {flops_per_s / 1e12:g}e12 / {bytes_per_s / 1e12:g}e12 = {ridge:.1f}. 2·N·S "
        f"operations over 2·N bytes are S = {tokens:,} FLOP per byte, "
        f"{'right' if tokens > ridge else 'left'} of it: {word}-bound.",
        words=("compute", "memory"),
        word=word,
    )


def draw_bound(rng: random.Random) -> Question:
    """The same with other numbers; never close to the ridge."""
    flops, bandwidth = rng.choice(
        ((312e12, 1.5e12), (312e12, 2e12), (990e12, 3.3e12), (120e12, 3e11))
    )
    ridge = flops / bandwidth
    tokens = rng.choice((ridge / rng.randint(3, 9), ridge * rng.randint(2, 9)))
    return ask_bound(rng.choice((7e9, 13e9, 70e9)), max(1, round(tokens)), flops, bandwidth)
