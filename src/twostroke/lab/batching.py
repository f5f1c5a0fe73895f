"""Unit 4: static, continuous and iteration-level batching, drawn from steps of the real engine."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from twostroke.bench.variants import Arrival, Variant, VariantBench, VariantRun
from twostroke.exec.local import RunnerSizes
from twostroke.lab.question import Question
from twostroke.lab.unit import Findings, Setup, save_figure
from twostroke.policies.names import PolicyChoice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IDEA = """A static batch runs until its longest answer has ended; whoever comes meanwhile waits,
and rows that have ended are computed for nobody. Continuous batching lets the next request take a
row as soon as one is free. Scheduling at every iteration goes further: prompts join in chunks
beside the decodes, so nobody stands still while another's prompt is read (Orca, Yu et al.
2022)."""
_ROWS = 4
_ANSWERS = (4, 40, 10, 6, 32, 8, 5, 24, 6, 12)


def run(setup: Setup) -> Findings:
    """The same ten requests under three ways of batching."""
    sizes = RunnerSizes(setup.threads, 256, 16, 512)
    static = PolicyChoice(pace="static", batch_size=_ROWS)
    variants = (
        Variant(name="static batches", policies=static, max_rows=_ROWS),
        Variant(name="continuous", max_rows=_ROWS),
        Variant(name="every iteration, chunks of 32", max_rows=_ROWS, step_tokens=32),
    )
    with VariantBench(setup.model, sizes) as bench:
        load = make_load(bench.spec.vocab_size)
        bench.run(Variant(name="warm"), load[:2])
        runs = {variant.name: bench.run(variant, load) for variant in variants}
    lines = [
        f"{name}: {len(one.steps)} steps, {one.mean_rows:.1f} rows in each, "
        f"{one.tokens_per_s:.0f} tokens/s"
        for name, one in runs.items()
    ]
    same = all(one.answers == runs["continuous"].answers for one in runs.values())
    lines.append(f"Answers are {'the same tokens' if same else 'NOT THE SAME'} in all three.")
    numbers = {name: float(len(one.steps)) for name, one in runs.items()} | {"same": float(same)}
    return Findings(lines, numbers, partial(_draw, runs))


def make_load(vocab: int) -> list[Arrival]:
    """Ten requests at once, of answers that differ tenfold."""
    rng = random.Random(4)
    return [
        Arrival(0.0, tuple(rng.randrange(300, min(vocab, 40_000)) for _ in range(48)), answer)
        for answer in _ANSWERS
    ]


def _draw(runs: Mapping[str, VariantRun], path: Path) -> None:
    save_figure(partial(_fill, runs), path, (8.5, 7))


def _fill(runs: Mapping[str, VariantRun], figure: Figure) -> None:
    panels = figure.subplots(len(runs), 1, sharex=True)
    for axes, (name, one) in zip(panels, runs.items(), strict=True):
        for row, request in enumerate(one.requests):
            begin, first, end = (
                1e3 * at for at in (request.arrived_s, request.ttft_s, request.ended_s)
            )
            axes.barh(row, first - begin, left=begin, height=0.6, color="0.9")
            axes.barh(row, end - first, left=first, height=0.6, color="0.45")
        for at, step in enumerate(one.steps):
            label = "begin of a step" if at == 0 else None
            axes.axvline(1e3 * step.begin_s, ymax=0.03, color="0.0", linewidth=0.6, label=label)
        axes.invert_yaxis()
        axes.set_title(f"{name}: {len(one.steps)} steps")
        axes.set_ylabel("request")
    panels[-1].set_xlabel(
        "ms since all ten arrived (light: waiting and prompt; dark: answer; ticks: steps begin)"
    )


def ask_steps(answers: list[int], rows: int) -> Question:
    """Decode steps of static batches against those of rows that are refilled."""
    batches = [answers[at : at + rows] for at in range(0, len(answers), rows)]
    static = sum(map(max, batches))
    return Question(
        f"Requests want {', '.join(map(str, answers))} tokens and come in this order; a batch has "
        f"{rows} rows and each step draws a token for each. How many steps do static batches take?",
        static,
        "steps",
        "Each batch takes as long as its longest: "
        f"{' + '.join(str(max(each)) for each in batches)} = "
        f"{static}. Rows would be full in {-(-sum(answers) // rows)}, the least for any batching.",
        tolerance=0.0,
    )


def draw_steps(rng: random.Random) -> Question:
    """The same with other answers."""
    rows = rng.randint(2, 4)
    return ask_steps([rng.randint(2, 60) for _ in range(rows * rng.randint(2, 3))], rows)
