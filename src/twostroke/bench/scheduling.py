"""What scheduling and paging are worth on this machine: the same requests, the same kernels.

Each section runs one load under two or more variants of the scheduler and checks that no token
differs: continuous against static batches, paged against pre-allocated KV, a long prompt amid
streams, a pool ten times too small, the second turn of a conversation. Lines are for people; the
last one is a JSON object. `--plot` draws the long prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twostroke.bench.variants import Arrival, Variant, VariantBench, VariantRun
from twostroke.cli.machine import read_machine
from twostroke.cli.settings import EngineSettings, resolve_settings
from twostroke.cli.step_cost import find_step_cost
from twostroke.errors import EngineError
from twostroke.exec.local import RunnerSizes
from twostroke.policies.names import PolicyChoice
from twostroke.policies.watermark import choose_watermark
from twostroke.sim.traces import read_trace
from twostroke.spec.cost import StepCost

BATCH = 16
BLOCK_TOKENS = 16
LONG_PROMPT = 6_000
STREAMS = 8
# What a long prompt may add to the gap between two tokens of those who are being answered.
ALLOWED_S = 0.050

CONTINUOUS = Variant(name="continuous")
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """A model on this machine, its predicted step times, and recorded lengths (prompt, answer)."""

    bench: VariantBench
    cost: StepCost
    lengths: tuple[tuple[int, int], ...]

    def make_load(self, count: int, scale: float, at_s: float = 0.0) -> list[Arrival]:
        """The first recorded requests, all at once, their lengths scaled."""
        return [
            Arrival(
                at_s, self.make_prompt(index, round(prompt * scale)), max(1, round(new * scale))
            )
            for index, (prompt, new) in enumerate(self.lengths[:count])
        ]

    def make_prompt(self, seed: int, tokens: int) -> tuple[int, ...]:
        """Random ids of ordinary tokens; equal seeds begin equally."""
        draw, vocabulary = random.Random(seed), self.bench.spec.vocab_size
        return tuple(
            draw.randrange(vocabulary // 4, vocabulary // 2) for _ in range(max(1, tokens))
        )


def measure_batching(setup: Setup) -> Report:
    """Recorded lengths, offline: batches that anybody joins against batches that nobody joins.

    A static batch in three degrees: ended answers leave it ("early"), all of them end together with
    the longest ("static", as batches of one tensor must), and prompts are padded to the longest too
    ("padded", as rectangular kernels must).
    """
    load = setup.make_load(96, 0.1)
    pace = PolicyChoice(pace="static", batch_size=BATCH)
    static = Variant(name="static", policies=pace, max_rows=BATCH)
    cases = [
        (replace(CONTINUOUS, max_rows=BATCH), load),
        (replace(static, name="early"), load),
        (static, extend_batches(load, setup.make_prompt, pads=False)),
        (replace(static, name="padded"), extend_batches(load, setup.make_prompt, pads=True)),
    ]
    continuous, early, together, padded = _run_all(setup, cases)
    _check_answers([continuous, early])
    return {
        "requests": len(load),
        "time_ratio": continuous.seconds / together.seconds,
        "time_ratio_early": continuous.seconds / early.seconds,
        "time_ratio_padded": continuous.seconds / padded.seconds,
        "useful_slots": _get_useful_slots(continuous),
        "useful_slots_static": _get_useful_slots(early),
        "prefill_share": _get_prefill_share(continuous),
    }


def measure_paging(setup: Setup) -> Report:
    """One pool that pre-allocation divides into four of 4,096 tokens: who fits at a time."""
    load = setup.make_load(64, 0.25)
    blocks = 4 * 4_096 // BLOCK_TOKENS
    paged = replace(CONTINUOUS, name="paged", num_blocks=blocks)
    reserved = replace(paged, name="pre-allocated", reserve_tokens=4_096)
    run, old = _run_all(setup, [(paged, load), (reserved, load)])
    _check_answers([run, old])
    waste = max(
        (step.held_blocks * BLOCK_TOKENS - step.filled_tokens - step.tokens) / step.rows
        for step in run.steps
        if step.tokens == step.rows  # rows that wait for their turn hold blocks for it
    )
    return {
        "concurrent": max(step.rows for step in run.steps),
        "concurrent_pre_allocated": max(step.rows for step in old.steps),
        "most_waste_tokens_a_sequence": waste,
        "time_ratio": run.seconds / old.seconds,
    }


def measure_long_prompt(setup: Setup) -> Report:
    """A prompt of 6,000 tokens comes while eight streams are answered: their longest gap."""
    streams = [Arrival(0.0, setup.make_prompt(seed, 64), 320) for seed in range(STREAMS)]
    late = Arrival(0.5, setup.make_prompt(99, LONG_PROMPT), 8)
    quiet, whole = (setup.bench.run(CONTINUOUS, load) for load in (streams, [*streams, late]))
    usual_s = statistics.median(gap for one in quiet.requests for gap in one.gaps_s)
    target_ns = round((usual_s + ALLOWED_S) * 1e9)
    paced = Variant(name="paced", policies=PolicyChoice(pace="target", itl_ns=target_ns))
    chunked = setup.bench.run(paced, [*streams, late], setup.cost)
    _check_answers([whole, chunked])
    runs = {"undisturbed": quiet, "whole prompt": whole, "paced": chunked}
    gaps = {name: _list_gaps(run) for name, run in runs.items()}
    lengths = {name: [gap for _, gap in each] for name, each in gaps.items()}
    return {
        "usual_gap_s": usual_s,
        "worst_gap_s": {name: max(each) for name, each in lengths.items()},
        "p99_gap_s": {name: find_share(each, 0.99) for name, each in lengths.items()},
        "target_s": target_ns / 1e9,
        "ttft_of_the_long_s": {
            "whole prompt": whole.requests[-1].ttft_s,
            "paced": chunked.requests[-1].ttft_s,
        },
        "gaps": gaps,
    }


def measure_oversubscription(setup: Setup) -> Report:
    """A pool that holds a tenth of what all requests hold in the end.

    Answers are as long as recorded prompts and prompts as recorded answers: it is answers that grow
    beyond the pool.
    """
    load = [
        Arrival(0.0, setup.make_prompt(index, max(16, new // 6)), max(1, prompt // 6))
        for index, (prompt, new) in enumerate(setup.lengths[:64])
    ]
    needed = sum(-(-(len(one.prompt) + one.new_tokens) // BLOCK_TOKENS) for one in load)
    blocks = max(needed // 10, max(len(one.prompt) for one in load) // BLOCK_TOKENS + 40)
    tight = replace(CONTINUOUS, name="no watermark", num_blocks=blocks)
    marked = replace(
        tight, name="watermark", watermark_blocks=choose_watermark(blocks, tight.max_rows)
    )
    alone = setup.bench.run(replace(CONTINUOUS, name="alone", max_rows=1), load)
    without, with_mark = _run_all(setup, [(tight, load), (marked, load)])
    _check_answers([alone, without, with_mark])
    return {
        "requests": len(load),
        "blocks": blocks,
        "times_the_pool": needed / blocks,
        "watermark_blocks": marked.watermark_blocks,
        "preemptions_a_thousand": {
            run.variant.name: run.stats.gauges.preemptions * 1_000 / len(load)
            for run in (without, with_mark)
        },
        "most_held": max(step.held_blocks for step in with_mark.steps) / blocks,
        "time_ratio": with_mark.seconds / without.seconds,
    }


def measure_second_turn(setup: Setup) -> Report:
    """A conversation of 2,000 tokens goes on: the time to the first token of its second turn."""
    cached = replace(CONTINUOUS, name="cached", has_prefix_cache=True)
    ratios = []
    for seed in range(5):
        first = Arrival(0.0, setup.make_prompt(seed, 2_000), 32)
        (one,) = setup.bench.run(CONTINUOUS, [first]).requests
        more = setup.make_prompt(1_000 + seed, 30)
        second = Arrival(3.0, (*first.prompt, *one.tokens, *more), 32)
        hit = setup.bench.run(cached, [first, second])
        miss = setup.bench.run(CONTINUOUS, [first, second])
        _check_answers([hit, miss])
        ratios.append(hit.requests[1].ttft_s / hit.requests[0].ttft_s)
    return {"ttft_ratio": statistics.median(ratios)}


SECTIONS: dict[str, Callable[[Setup], Report]] = {
    "batching": measure_batching,
    "paging": measure_paging,
    "long prompt": measure_long_prompt,
    "oversubscription": measure_oversubscription,
    "second turn": measure_second_turn,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the sections asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--trace", type=Path, required=True, help="where lengths come from")
    parser.add_argument("--only", choices=list(SECTIONS), action="append")
    parser.add_argument("--plot", type=Path, help="a .png or .svg of the long prompt")
    chosen = parser.parse_args(arguments)
    lengths = tuple((one.prompt_tokens, one.new_tokens) for one in read_trace(chosen.trace))
    machine = read_machine()
    sizes = RunnerSizes(
        threads=machine.cores,
        num_blocks=4_096,
        block_tokens=BLOCK_TOKENS,
        max_step_tokens=LONG_PROMPT + 512,
    )
    reports: dict[str, Report] = {}
    with VariantBench(chosen.model, sizes) as bench:
        wanted = EngineSettings(model=chosen.model)
        cost = find_step_cost(bench.spec, resolve_settings(wanted, bench.spec, machine))
        setup = Setup(bench, cost, lengths)
        for name in chosen.only or SECTIONS:
            reports[name] = SECTIONS[name](setup)
            print(f"{name}:")
            for key, value in reports[name].items():
                if key != "gaps":
                    print(f"  {key.replace('_', ' ')}: {_show(value)}")
    if chosen.plot is not None and "long prompt" in reports:
        draw_gaps(reports["long prompt"], chosen.plot)
    for report in reports.values():
        report.pop("gaps", None)
    print(json.dumps(reports))


def draw_gaps(report: Report, path: Path) -> None:
    """Every gap of the eight streams over time, with and without chunks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    looks = {"undisturbed": (".", "0.7"), "whole prompt": ("x", "0.0"), "paced": ("+", "C0")}
    for name, (marker, colour) in looks.items():
        times, gaps = zip(*report["gaps"][name], strict=True)
        axes.plot(times, [gap * 1e3 for gap in gaps], marker, color=colour, label=name, ms=5)
    axes.axhline(report["target_s"] * 1e3, color="C3", ls="--", lw=1, label="target")
    axes.set(
        xlabel="time (s)",
        ylabel="gap between two tokens of a stream (ms)",
        yscale="log",
        title=f"{STREAMS} streams; a prompt of {LONG_PROMPT:,} tokens comes after 0.5 s",
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def extend_batches(
    load: Sequence[Arrival], make_prompt: Callable[[int, int], tuple[int, ...]], pads: bool
) -> list[Arrival]:
    """The load with every answer as long as the longest of its batch, and prompts too if padded."""
    longer = []
    for index, one in enumerate(load):
        batch = load[index // BATCH * BATCH :][:BATCH]
        longest = max(len(each.prompt) for each in batch) if pads else 0
        padding = make_prompt(-1, max(1, longest))[: max(0, longest - len(one.prompt))]
        new_tokens = max(each.new_tokens for each in batch)
        longer.append(replace(one, prompt=(*padding, *one.prompt), new_tokens=new_tokens))
    return longer


def find_share(values: Sequence[float], share: float) -> float:
    """The value that such a share of all does not exceed; one that occurred."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _run_all(setup: Setup, cases: Sequence[tuple[Variant, Sequence[Arrival]]]) -> list[VariantRun]:
    """Each variant with its load three times, interleaved; its run of median time."""
    rounds = [[setup.bench.run(each, load, setup.cost) for each, load in cases] for _ in range(3)]
    for runs in zip(*rounds, strict=True):
        _check_answers(runs)
    return [sorted(runs, key=lambda run: run.seconds)[1] for runs in zip(*rounds, strict=True)]


def _check_answers(runs: Sequence[VariantRun]) -> None:
    for run in runs[1:]:
        if run.answers != runs[0].answers:
            raise EngineError(f"{run.variant.name} and {runs[0].variant.name} answer differently")


def _get_useful_slots(run: VariantRun) -> float:
    """Rows computed of the slots there were, until nobody waited any more."""
    last_s = max(one.timings.first_planned_ns for one in run.requests)
    first_s = min(one.timings.first_planned_ns for one in run.requests)
    end_s = run.steps[0].begin_s + (last_s - first_s) / 1e9
    rows = [step.rows for step in run.steps if step.begin_s <= end_s]
    return sum(rows) / (BATCH * len(rows))


def _get_prefill_share(run: VariantRun) -> float:
    """Of the time of steps, that of steps with a prompt."""
    total = sum(step.seconds for step in run.steps)
    return sum(step.seconds for step in run.steps if step.prompt_tokens) / total


def _list_gaps(run: VariantRun) -> list[tuple[float, float]]:
    """When each gap of the streams ended, and how long it was."""
    return [
        (later, later - earlier)
        for one in run.requests[:STREAMS]
        for earlier, later in zip(one.token_s, one.token_s[1:], strict=False)
        if later > earlier
    ]


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
