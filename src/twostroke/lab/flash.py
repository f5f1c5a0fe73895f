"""Unit 6: FlashAttention's update, and a wrong one that passes every test with one key block."""

from __future__ import annotations

import random

from twostroke.lab.online_softmax import measure_errors
from twostroke.lab.question import Question
from twostroke.lab.unit import Curves, Findings, Setup

IDEA = """Attention needs no matrix of scores: keys are taken block by block, with a running
maximum m and sum l. When a block raises the maximum, what was gathered before is scaled down by
exp(m − m'). Where the result so far is kept divided by l, it must be multiplied by l again before
it joins the next block. The update that circulates forgets this, and with a single key block
nobody notices."""
_BLOCK, _KEYS = 64, 512
_LEAST = 1e-17  # to be drawn on a scale of ratios


def run(setup: Setup) -> Findings:
    """The error of both updates after each key block, in NumPy."""
    wrong, right = (measure_errors(_BLOCK, _KEYS, keeps) for keeps in (False, True))
    blocks = list(range(1, len(wrong) + 1))
    lines = (
        f"With one block of {_BLOCK} keys the wrong update is right: error {wrong[0]:.0e}.",
        f"At the second block it fails: {wrong[1]:.0%} of the largest value.",
        f"With l kept the largest error over {len(right)} blocks is {max(right):.0e}.",
        f"Memory of a head's scores over {_KEYS} keys: {_KEYS * _KEYS * 4:,} bytes; of a tile of "
        f"16 queries by {_BLOCK} keys: {16 * _BLOCK * 4:,}.",
    )
    picture = Curves(
        "Error after each key block, against all scores at once",
        ("key blocks seen", "error relative to the largest value (logarithmic)"),
        {
            "as claimed, without l": (blocks, [max(_LEAST, each) for each in wrong]),
            "with l": (blocks, [max(_LEAST, each) for each in right]),
        },
        ("linear", "log"),
    )
    numbers = {"first_wrong": wrong[0], "second_wrong": wrong[1], "most_right": max(right)}
    return Findings(lines, numbers, picture.draw)


def ask_scores(tokens: int, heads: int) -> Question:
    """Bytes of one layer's scores in 32 bits."""
    count = heads * tokens * tokens * 4
    return Question(
        f"How much memory do the scores of one layer take, all at once, for a prompt of {tokens:,} "
        f"tokens and {heads} heads in 32 bits?",
        count,
        "bytes",
        f"{heads} · {tokens:,}² · 4 bytes = {count:,} bytes. Layers run one after another and use "
        "the same memory again.",
    )


def draw_scores(rng: random.Random) -> Question:
    """The same with other sizes."""
    return ask_scores(rng.choice((512, 1000, 1536, 2048, 4096)), rng.choice((9, 16, 32, 40)))
