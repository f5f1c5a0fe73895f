"""Unit 7: chunked prefill, or how long a prompt may keep others waiting."""

from __future__ import annotations

import random

from twostroke.lab.machines import build_replica, open_station, simulate
from twostroke.lab.question import Question
from twostroke.lab.unit import Curves, Findings, Setup
from twostroke.sim.arrivals import Arrival

IDEA = """A step ends when its longest part has ended, so a long prompt computed at once holds up
every answer that is being written. In chunks it shares its steps with the decodes: the pause of
the others is one chunk long, and the prompt itself takes a little longer, because every chunk
reads the weights and the keys before it again (Sarathi-Serve, Agrawal et al. 2024)."""
_BUDGETS = (128, 256, 512, 1024, 2048, 4096, 8192)
_PROMPT = 8000


def run(setup: Setup) -> Findings:
    """Sixteen answers are being written when a prompt of 8,000 tokens comes, by token budget."""
    station = open_station("llama-3.1-8b", "a100-80gb")
    others = [Arrival(0, 64, 400) for _ in range(16)]
    arrivals = [*others, Arrival(1_000_000_000, _PROMPT, 4)]
    pauses, firsts = [], []
    for budget in _BUDGETS:
        replica = build_replica(station, step_tokens=budget, max_rows=32)
        columns = simulate(replica, arrivals).get_columns()
        pauses.append(float(columns["worst_gap_ns"][:16].max()) / 1e6)
        firsts.append(float(columns["first_token_ns"][16] - columns["arrival_ns"][16]) / 1e6)
    lines = [
        f"budget {budget:>5,}: longest pause of the others {pause:6.0f} ms, first token of the "
        f"long prompt after {first:6.0f} ms"
        for budget, pause, first in zip(_BUDGETS, pauses, firsts, strict=True)
    ]
    picture = Curves(
        f"A prompt of {_PROMPT:,} tokens among 16 decodes (llama-3.1-8b, A100-80GB, simulated)",
        ("token budget of a step (logarithmic)", "ms (logarithmic)"),
        {
            "longest pause of the others": (_BUDGETS, pauses),
            "first token of the long prompt": (_BUDGETS, firsts),
        },
        ticks=_BUDGETS,
    )
    numbers = {"pause_whole_ms": pauses[-1], "pause_512_ms": pauses[2], "ttft_512_ms": firsts[2]}
    return Findings(lines, numbers, picture.draw)


def ask_steps(prompt: int, budget: int, decodes: int) -> Question:
    """Steps of a prompt beside decodes, which go first."""
    room = budget - decodes
    return Question(
        f"A step has room for {budget} tokens and {decodes} requests decode, which go first. How "
        f"many steps does a prompt of {prompt:,} tokens take?",
        -(-prompt // room),
        "steps",
        f"{budget} − {decodes} = {room} tokens of it go into each: {prompt:,} / {room} = "
        f"{prompt / room:.2f}, rounded up.",
        tolerance=0.0,
    )


def draw_steps(rng: random.Random) -> Question:
    """The same with other numbers."""
    return ask_steps(rng.randint(900, 12_000), rng.choice((128, 256, 512)), rng.randint(4, 60))
