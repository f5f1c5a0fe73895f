"""The sections that need a model: steps, exactness, peers, the host's gap, the served trace."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from twostroke.bench.gpu import hf
from twostroke.bench.gpu.engine import EngineSizes
from twostroke.bench.gpu.served import run_trace
from twostroke.bench.gpu.session import (
    Clock,
    Plan,
    Session,
    measure_steps,
)
from twostroke.bench.gpu.timing import Launch, Timed, time_interleaved, time_launch
from twostroke.bench.gpu.torch_llama import TorchLlama
from twostroke.bench.gpu.traces import (
    Lifetime,
    TraceRequest,
    TraceShape,
    describe_trace,
    make_requests,
    summarise_lives,
)
from twostroke.bench.gpu.workloads import BLOCK_TOKENS, PREFILL, Cell, split_cells
from twostroke.core.types import SchedulerConfig

MOST_DIFFERENT = 0.25
OURS, PYTORCH, TRANSFORMERS = "twostroke", "pytorch", "transformers"

Section = Callable[[Session, Plan, Clock], None]


def run_steps(session: Session, plan: Plan, clock: Clock) -> None:
    """Every prefill and decode that fits."""
    cells, refused = split_cells(session.spec, plan.cells, session.ceilings.memory_bytes)
    for name, why in refused.items():
        session.run.missing[f"{session.model.name} {name}"] = why
    measure_steps(session, cells, False, clock, plan.pace)


def run_exact(session: Session, plan: Plan, clock: Clock) -> None:
    """The steps that peers are compared on, once more with exactness asked for."""
    cells, _ = split_cells(session.spec, plan.peer_cells, session.ceilings.memory_bytes)
    measure_steps(session, cells, True, clock, plan.pace)


def run_peers(session: Session, plan: Plan, clock: Clock) -> None:
    """Our engine, plain PyTorch and Transformers on the same steps and memory, in turns."""
    cells, _ = split_cells(session.spec, plan.peer_cells, session.ceilings.memory_bytes)
    if not cells:
        return
    sizes = session.get_sizes(cells)
    torch_llama = TorchLlama(session.spec, session.source, session.device.type == "cuda")
    try:
        theirs = hf.build_model(session.spec, session.source)
    except hf.TransformersAbsent as error:
        theirs = None
        session.run.missing[TRANSFORMERS] = str(error)
    with session.open_engine(sizes) as engine:
        for cell in cells:
            what = f"{session.model.name} {cell.name} peers"
            if clock.left_s <= 0:
                session.run.missing[what] = "the section's time was spent"
                continue
            step = session.make_plan(cell, sizes.num_blocks)
            ids = torch.tensor([row.tokens for row in step.rows], device=session.device)
            launches: dict[str, Launch] = {
                OURS: engine.prepare(step),
                PYTORCH: torch_llama.prepare(engine.kv_memory, ids, cell.context),
            }
            if theirs is not None:
                launches[TRANSFORMERS] = hf.prepare_step(
                    theirs, engine.kv_memory, ids, cell.context
                )
            differences = compare(launches) if cell.kind == PREFILL else {}
            times = time_interleaved(launches, session.device, plan.pace)
            _note_peers(session, cell, times, differences)
            del launches


def compare(launches: Mapping[str, Launch]) -> dict[str, float]:
    """How far our logits are from each peer's, by norms, of the same prompt and weights.

    Decodes cannot be compared: each engine reads the random KV memory in its own layout. Raises
    AssertionError for what rounding does not explain, NaN included: two unrelated vectors of the
    same size are 1.4 apart.
    """
    ours = launches[OURS]().float().clone()
    found = {}
    for name, launch in launches.items():
        if name != OURS:
            theirs = launch().float()
            found[name] = float((ours - theirs).norm() / theirs.norm())
            assert found[name] < MOST_DIFFERENT, f"logits differ from {name}'s by {found[name]:.2f}"
    return found


def _note_peers(
    session: Session, cell: Cell, times: dict[str, Timed], differences: dict[str, float]
) -> None:
    for engine, timed in times.items():
        row = {**session.describe_row(cell), "engine": engine, **timed.describe()}
        if engine in differences:
            row["difference"] = differences[engine]
        session.run.add("peers", [row])
    words = ", ".join(f"{name} {timed.seconds * 1e3:.3f} ms" for name, timed in times.items())
    session.say(f"  {session.model.name} {cell.name}: {words}")


def run_gap(session: Session, plan: Plan, clock: Clock) -> None:
    """How long the device idles between decode steps that come through the scheduler and the loop.

    Wall time from one committed decode step to the next, beside the device's own time of the same
    step launched back to back. Rows decode together from about the cell's context on.
    """
    cell = plan.gap_cell
    longest = replace(cell, context=cell.context + plan.gap_steps)
    sizes = replace(session.get_sizes([longest]), max_step_tokens=plan.step_tokens)
    shape = TraceShape(vocab_size=session.spec.vocab_size)
    prompt_tokens = max(1, cell.context - plan.gap_steps)
    drawn = make_requests(shape, None)[0].prompt
    prompt = (drawn * -(-prompt_tokens // len(drawn)))[:prompt_tokens]
    # Other first tokens, so that nothing is shared.
    requests = [
        TraceRequest(0.0, (row, *prompt[1:]), 2 * plan.gap_steps) for row in range(cell.batch)
    ]
    with session.open_engine(sizes) as engine:
        launch = engine.prepare(session.make_plan(cell, sizes.num_blocks))
        device = time_launch(launch, session.device, plan.pace)
        config = _make_config(session, sizes)
        _, listener = run_trace(engine.executor, config, requests, max(1.0, clock.left_s))
    whole = [when for when, rows, tokens in listener.commits if rows == tokens == cell.batch]
    walls = [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(whole)]
    # The last steps of the run, when each row's context is nearest to the cell's.
    walls = walls[len(walls) // 4 : -len(walls) // 4 or None]
    row = {
        **session.describe_row(cell),
        "device_s": device.seconds,
        "wall_s": statistics.median(walls),
        "wall_mean_s": statistics.mean(walls),
        "steps": len(walls),
    }
    session.run.add("gap", [row])
    gap = 1 - device.seconds / row["wall_s"]
    session.say(f"  {session.model.name} gap at {cell.name}: {gap:.1%} of {len(walls)} steps")


def run_served(session: Session, plan: Plan, clock: Clock) -> None:
    """The same requests through our engine, then through Transformers' continuous batching."""
    requests = make_requests(plan.shape, plan.trace)
    words = describe_trace(plan.shape, plan.trace, requests)
    warm = [TraceRequest(0.0, one.prompt, 4) for one in requests[:8]]
    lengths = [len(one.prompt) + one.new_tokens for one in requests]
    most_blocks = sum(1 + length // BLOCK_TOKENS for length in lengths)
    sizes = session.get_serving_sizes(plan, max(lengths) + BLOCK_TOKENS, most_blocks)
    with session.open_engine(sizes) as engine:
        config = _make_config(session, sizes)
        run_trace(engine.executor, config, warm, plan.trace_limit_s)
        lives, _ = run_trace(engine.executor, config, requests, plan.trace_limit_s)
        _note_served(session, OURS, lives, words)
    try:
        model = hf.build_model(session.spec, session.source)
        limit_s = min(plan.trace_limit_s, max(5.0, clock.left_s))
        lives = hf.run_trace(model, warm, requests, limit_s)
    except hf.TransformersAbsent as error:
        session.run.missing[f"{session.model.name} served {TRANSFORMERS}"] = str(error)
        return
    _note_served(session, TRANSFORMERS, lives, words)
    del model


def _note_served(session: Session, engine: str, lives: list[Lifetime], words: str) -> None:
    summary = summarise_lives(lives)
    row = {"model": session.model.name, "engine": engine, "trace": words, **summary}
    session.run.add("served", [row])
    rate, done = summary["output_tokens_per_s"], summary["finished"]
    session.say(f"  {session.model.name} served by {engine}: {rate:,.0f} tok/s, {done} finished")


def _make_config(session: Session, sizes: EngineSizes) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=sizes.num_blocks,
        block_tokens=BLOCK_TOKENS,
        step_tokens=sizes.max_step_tokens,
        max_rows=sizes.max_rows,
        context_tokens=min(session.spec.context_tokens, sizes.context_tokens),
        vocab_size=session.spec.vocab_size,
        plans_ahead=True,
    )
