"""Plans for people, side by side and formula by formula, and for programs, as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from twostroke.cli.plan_check import Checked
from twostroke.cli.settings import format_bytes
from twostroke.plan.capacity import (
    Demand,
    get_largest_batch,
    get_mixing,
    get_prefill_s,
    get_step_s,
    get_wait_s,
)
from twostroke.plan.recovery import plan_checkpoints, plan_replay
from twostroke.plan.search import HOURS_A_MONTH, MOST_LINK_BUSY, Candidate, Pool

if TYPE_CHECKING:
    from twostroke.cli.plan import Answer

_RESTART_S = 30.0  # a process, its weights and its first step
_TABLE_WIDTH = 132


def print_plan(answer: Answer, seconds: float) -> None:
    """What is asked, then the best few plans as columns."""
    from rich.console import Console
    from rich.table import Table

    demand = answer.question.demand
    targets = ", ".join(
        f"{name} ≤ {target * 1e3:,.4g} ms"
        for name, target in (("TTFT", demand.ttft_s), ("TPOT", demand.tpot_s))
        if target
    )
    print(
        f"{demand.rate:.4g} requests/s of {demand.prompt_tokens:,} + {demand.new_tokens:,} tokens "
        f"in the mean; {targets or 'no targets'}"
    )
    fitted = answer.question.fitted
    if fitted.clipped:
        print(f"cut to the model's context: {fitted.clipped:,} of {fitted.requests:,} requests")
    for reason in answer.question.refused:
        print(f"left out: {reason}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    checks = {id(each.candidate): each for each in answer.checked}
    columns = [dict(_list_lines(each, demand, checks.get(id(each)))) for each in answer.shown]
    for at in range(len(columns)):
        table.add_column("best" if at == 0 else f"no. {at + 1}", overflow="fold")
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    Console(highlight=False, width=_TABLE_WIDTH).print(table)
    print(f"{len(answer.candidates):,} plans keep the targets; found in {seconds:.2f} s")
    if answer.checked:
        requests = min(each.requests for each in answer.checked)
        print(f"simulated under {requests:,} requests or more; {answer.seconds:.1f} s in all")
        if any(each.requests < each.steady_requests for each in answer.checked):
            print("fewer than a steady state takes: simulated waits and batches are too small")
    if not answer.shown[0].hourly_cost:
        print("no price is known for every device: give --price for costs")


def _list_lines(
    candidate: Candidate, demand: Demand, checked: Checked | None
) -> Iterator[tuple[str, str]]:
    """(name, value) of one plan, in order."""
    first, last = candidate.pools[0], candidate.pools[-1]
    option = first.option
    yield "device", option.device
    yield "weights, KV", f"{option.weights}, {option.kv}"
    if candidate.link is None:
        yield "pools", f"one: {name_pool(first)}"
    else:
        yield "pools", f"prefill {name_pool(first)}, decode {name_pool(last)}"
    yield "devices", f"{candidate.devices:,}"
    yield "step budget", f"{first.option.engine.step_tokens:,} tokens"
    yield "KV a request", format_bytes(option.kv_token_bytes * demand.held_tokens)
    yield "largest batch", f"{get_largest_batch(last.option.engine, demand):,}"
    yield "decoding at once", f"{last.load.rows:,.1f} a replica"
    yield "utilisation", " / ".join(f"{pool.utilisation:.0%}" for pool in candidate.pools)
    if candidate.link is not None:
        link = candidate.link
        yield "KV link", f"{format_gbits(link.needed)} a prefill replica needed"
        yield "one transfer", f"{link.transfer_s * 1e3:,.3g} ms at {format_gbits(link.bandwidth)}"
    yield "TTFT p90", f"{candidate.ttft_s * 1e3:,.4g} ms"
    yield "TPOT mean", f"{candidate.tpot_s * 1e3:,.4g} ms"
    if checked is not None:
        yield "simulated TTFT p90", f"{checked.ttft_p90_s * 1e3:,.4g} ms"
        yield "simulated TPOT p90", f"{checked.tpot_p90_s * 1e3:,.4g} ms"
        yield "kept both targets", f"{checked.share:.1%}{'' if checked.is_kept else ': too few'}"
    if candidate.hourly_cost:
        yield "cost", f"${candidate.hourly_cost * HOURS_A_MONTH:,.0f} a month"
        yield "a million new tokens", f"${candidate.get_token_cost(demand):,.3g}"
    yield "breaks first", f"{candidate.breaks}, at {candidate.growth:.2f} × the rate"


def name_pool(pool: Pool) -> str:
    """A pool in a few words: "3 × (tp 2)"."""
    stages = f", pp {pool.option.pp}" if pool.option.pp > 1 else ""
    return f"{pool.replicas:,} × (tp {pool.option.tp}{stages})"


def explain(answer: Answer, failures: float) -> None:
    """Each formula of the best plan with its numbers, and recovery."""
    best, demand = answer.shown[0], answer.question.demand
    print("\nHow the best plan was found:")
    for line in _explain(best, demand):
        print(f"  {line}")
    print("\nRecovery of a replica, if it fails as often as is given:")
    for line in _explain_recovery(best, demand, failures):
        print(f"  {line}")


def _explain(best: Candidate, demand: Demand) -> Iterator[str]:
    pool = best.pools[-1]
    option, engine, load = pool.option, pool.option.engine, pool.load
    held = demand.held_tokens
    yield (
        f"KV a request = KV a token × (prompt + new tokens) = {option.kv_token_bytes:,} B × "
        f"{held:,} = {format_bytes(option.kv_token_bytes * held)}"
    )
    yield (
        f"largest batch = min(rows of a step, pool / request) = min({engine.max_rows:,}, "
        f"{engine.pool_tokens:,} / {held:,}) = {get_largest_batch(engine, demand):,}"
    )
    rows = load.rows
    yield (
        f"step of {rows:,.1f} decodes at context {demand.prompt_tokens + demand.new_tokens // 2:,}"
        f" = {get_step_s(engine, demand, rows, 0) * 1e3:,.4g} ms"
    )
    if pool.role == "all":
        mixing = get_mixing(engine, demand, rows)
        mixed_s = get_step_s(engine, demand, rows, mixing.chunk, mixing.together)
        chunks = f"{mixing.together:,} chunks" if mixing.together > 1 else "a chunk"
        what = f"{chunks} of {mixing.chunk:,} prompt tokens"
        yield f"the same with {what} = {mixed_s * 1e3:,.4g} ms"
        yield f"share of steps that have one = prompts in a step's time = {load.mixed:.1%}"
    yield f"TPOT = mean step = {load.tpot_s * 1e3:,.4g} ms"
    yield (
        f"rows = rate × new tokens × TPOT (Little) = {load.rate:,.4g}/s × {demand.new_tokens:,} × "
        f"{load.tpot_s * 1e3:,.4g} ms = {load.rate * demand.new_tokens * load.tpot_s:,.4g}"
    )
    first = best.pools[0]
    if pool.role == "all":
        prefill_s, begun_s = mixing.steps * mixed_s, load.tpot_s / 2
    else:
        prefill_s, begun_s = get_prefill_s(first.option.engine, demand), 0.0
    times = (prefill_s, begun_s, get_wait_s(first.load.busy, prefill_s))
    yield (
        f"TTFT p90 = prefill + rest of a step + wait of M/D/1 at {first.load.busy:.0%} busy = "
        f"{' + '.join(f'{each * 1e3:,.4g}' for each in times)} ms"
    )
    for each in best.pools:
        yield (
            f"{each.role}: replicas = ⌈rate / most of one⌉ = ⌈{demand.rate:.4g} / "
            f"{each.capacity.load.rate:.4g}⌉ = {each.replicas:,}; beyond, {each.capacity.breaks}"
        )
    if best.link is not None:
        link = best.link
        yield (
            f"link = rate of a prefill replica × KV of a prompt / {MOST_LINK_BUSY} = "
            f"{first.load.rate:.4g}/s × {format_bytes(link.request_bytes)} / {MOST_LINK_BUSY} = "
            f"{format_gbits(link.needed)}"
        )
    if best.hourly_cost:
        yield (
            f"cost = devices × price × {HOURS_A_MONTH} h = ${best.hourly_cost:,.4g}/h × "
            f"{HOURS_A_MONTH} = ${best.hourly_cost * HOURS_A_MONTH:,.0f} a month"
        )


def _explain_recovery(best: Candidate, demand: Demand, failures: float) -> Iterator[str]:
    pool = best.pools[-1]
    rows = pool.load.rows
    tokens = demand.prompt_tokens + demand.new_tokens // 2
    kv_bytes = rows * tokens * pool.option.kv_token_bytes
    copy_s = max(1e-6, pool.option.engine.cost.predict_copy_ns(round(kv_bytes)) / 1e9)
    if failures <= 0:
        yield "none fail: neither costs anything"
        return
    failure_s = HOURS_A_MONTH * 3600 / failures
    points = plan_checkpoints(copy_s, failure_s, _RESTART_S)
    prefill_s = get_prefill_s(pool.option.engine, replace(demand, prompt_tokens=tokens))
    replay = plan_replay(prefill_s, rows, failure_s, _RESTART_S)
    yield (
        f"{failures:g} failures a month, one in {failure_s / 3600:,.4g} h; restart {_RESTART_S:g} s"
    )
    yield (
        f"checkpoints: the KV of {rows:,.1f} requests, {format_bytes(round(kv_bytes))}, is copied "
        f"in C = {copy_s:.3g} s; Young √(2CM) = {points.young_s:,.4g} s, Daly "
        f"{points.interval_s:,.4g} s; rework {points.rework_s:,.4g} s in the mean; overhead "
        f"{points.overhead:.3%}"
    )
    yield (
        f"token log: {rows:,.1f} prompts with their answers so far are prefilled again in "
        f"{replay.rework_s:,.4g} s; overhead {replay.overhead:.4%}, none of it while nothing fails"
    )
    better = "the token log" if replay.overhead <= points.overhead else "checkpoints"
    yield f"better here: {better}"


def describe_plan(answer: Answer, seconds: float) -> dict[str, Any]:
    """All of it as plain values."""
    demand = answer.question.demand
    checks = {id(each.candidate): each for each in answer.checked}
    return {
        "demand": asdict(demand),
        "plans": [_describe(each, demand, checks.get(id(each))) for each in answer.shown],
        "kept": len(answer.candidates),
        "left_out": list(answer.question.refused),
        "closed_form_s": seconds,
        "seconds": answer.seconds,
    }


def _describe(candidate: Candidate, demand: Demand, checked: Checked | None) -> dict[str, Any]:
    cost = candidate.hourly_cost
    return {
        "pools": [_describe_pool(pool, demand) for pool in candidate.pools],
        "link": None if candidate.link is None else asdict(candidate.link),
        "devices": candidate.devices,
        "ttft_p90_s": candidate.ttft_s,
        "tpot_mean_s": candidate.tpot_s,
        "monthly_cost": cost * HOURS_A_MONTH if cost else None,
        "million_new_tokens_cost": candidate.get_token_cost(demand) if cost else None,
        "growth": candidate.growth,
        "breaks_first": candidate.breaks,
        "simulated": None if checked is None else {
            "requests": checked.requests,
            "steady_requests": checked.steady_requests,
            "ttft_p50_s": checked.ttft_p50_s,
            "ttft_p90_s": checked.ttft_p90_s,
            "tpot_p50_s": checked.tpot_p50_s,
            "tpot_p90_s": checked.tpot_p90_s,
            "share_within_targets": checked.share,
            "link_busy": checked.link_busy,
        },
    }  # fmt: skip


def _describe_pool(pool: Pool, demand: Demand) -> dict[str, Any]:
    option = pool.option
    return {
        "role": pool.role,
        "model": option.spec.name,
        "device": option.device,
        "weights": option.weights,
        "kv": option.kv,
        "tp": option.tp,
        "pp": option.pp,
        "replicas": pool.replicas,
        "step_tokens": option.engine.step_tokens,
        "largest_batch": get_largest_batch(option.engine, demand),
        "kv_request_bytes": option.kv_token_bytes * demand.held_tokens,
        "rows": pool.load.rows,
        "utilisation": pool.utilisation,
        "new_tokens_per_s": pool.load.rate * demand.new_tokens,
        "requests_per_s": pool.load.rate,
    }


def format_gbits(bandwidth: float) -> str:
    """Bytes a second as bits."""
    return f"{bandwidth * 8 / 1e9:,.3g} Gbit/s"
