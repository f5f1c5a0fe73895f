"""Claims of serving: batching (3, 7), money (14) and recovery (15).

Batching is simulated with the scheduler that serves, from a fixed seed; the rest is arithmetic with
plan/recovery.py and the devices' data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.lab.claim import Claim, Verdict
from twostroke.lab.machines import Station, build_replica, draw_arrivals, open_station, simulate
from twostroke.plan.recovery import plan_checkpoints, plan_replay
from twostroke.policies.names import PolicyChoice
from twostroke.spec.device import get_known_device

_HOURS = 730  # of a month
_BATCH = 32


def build_serving_claims() -> list[Claim]:
    """The claims, in order of their numbers."""
    return [_check_batching(), _check_origin(), _check_cost(), _check_checkpoints()]


@dataclass(frozen=True, slots=True)
class Batching:
    """One way of batching under a load. busy: share of the time in steps; filled: of the rows a
    step may have; flops: of the device's 16-bit rate."""

    tokens_per_s: float
    busy: float
    filled: float
    flops: float


def simulate_batching(station: Station, pace: str, seed: int = 1) -> Batching:
    """256 requests at once, answers of very different lengths, under "static" or "fixed" pace."""
    policies = PolicyChoice(pace=pace, batch_size=_BATCH)
    replica = build_replica(station, policies, max_rows=_BATCH, pool_tokens=64_000)
    arrivals = draw_arrivals(256, 0, (128, 128), seed)
    records = simulate(replica, arrivals)
    columns, totals = records.get_columns(), records.totals[0]
    end_ns = int(columns["ended_ns"].max())
    tokens = int(columns["new_tokens"].sum())
    computed = tokens + int(columns["prompt_tokens"].sum())
    peak = station.device.get_rate("bf16") * end_ns / 1e9
    return Batching(
        tokens_per_s=tokens * 1e9 / end_ns,
        busy=totals.busy_ns / end_ns,
        filled=totals.step_rows / totals.steps / _BATCH,
        flops=2 * station.spec.num_weights * computed / peak,
    )


def _check_batching() -> Claim:
    station = open_station("llama-2-7b", "a100-80gb")
    static, continuous = (simulate_batching(station, pace) for pace in ("static", "fixed"))
    lines = ["| | static batches of 32 | continuous |", "|---|---|---|"]
    shown = (
        ("busy with steps", [f"{one.busy:.0%}" for one in (static, continuous)]),
        ("rows of a step in use", [f"{one.filled:.0%}" for one in (static, continuous)]),
        ("of the 16-bit rate", [f"{one.flops:.1%}" for one in (static, continuous)]),
        ("new tokens a second", [f"{one.tokens_per_s:,.0f}" for one in (static, continuous)]),
    )
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in shown]
    gain = continuous.tokens_per_s / static.tokens_per_s
    lines += [
        "",
        f"Continuous batching completes {gain:.1f} times as many tokens. Simulated with the "
        "scheduler that serves: llama-2-7b on an A100-80GB, 256 requests waiting at once, prompts "
        "and answers of 128 tokens in the mean with exponential lengths.",
    ]
    return Claim(
        3,
        "What continuous batching does for utilisation",
        "GPU utilisation is 30–40 % without continuous batching and 80–95 % with it; throughput "
        "rises 2–3 times.",
        "A GPU under load is busy nearly always either way, and computes at a few per cent of its "
        "rate either way, because decode is bound by memory. What rises is how many rows of a "
        "step are still wanted, and throughput with it: by as much as answers differ in length, "
        "and not at all when they are all alike.",
        tuple(lines),
        Verdict.CONDITION,
        "utilisation means rows in use, requests are always waiting, and answers differ in length",
    )


def _check_origin() -> Claim:
    station = open_station("llama-2-7b", "a100-80gb")
    alone = station.predict_mixed_s([(32, 1, 1000)])
    mixed = station.predict_mixed_s([(32, 1, 1000), (1, 128, 0)])
    apart = alone + station.predict_s(1, 128, 0)
    return Claim(
        7,
        "Whose innovation continuous batching is",
        "Continuous batching is vLLM's innovation; vLLM mixes prefill chunks and decodes in one "
        "batch.",
        "Batching at the level of iterations is Orca's (Yu et al., OSDI 2022). vLLM's is "
        "PagedAttention (Kwon et al., SOSP 2023); as published it ran prompts and decodes in "
        "steps of their own. Chunks of prompts beside decodes are Sarathi's (Agrawal et al. 2023; "
        "Sarathi-Serve, OSDI 2024), and vLLM took them over.",
        (
            "Why they are mixed: predicted for llama-2-7b on an A100-80GB, 32 decodes at context "
            f"1,000 take {alone * 1e3:.1f} ms, with a chunk of 128 beside them {mixed * 1e3:.1f} "
            f"ms, and one step after the other {apart * 1e3:.1f} ms. Together they read the "
            "weights once.",
        ),
        Verdict.WRONG,
    )


def _check_cost() -> Claim:
    h100, a100 = get_known_device("h100-sxm"), get_known_device("a100-80gb")
    used_before, used_after = 10 * 0.4, 3 * 0.9 + 12 * 0.85
    rates = (
        ("arithmetic", a100.get_rate("f16") / h100.get_rate("f16")),
        ("bandwidth", a100.memory_bandwidth / h100.memory_bandwidth),
    )
    lines = [
        f"- $30,000 / (10 · 0.4) is ${30_000 / used_before:,.0f} for each GPU's worth of use; "
        f"$30,000 / 0.4 = ${30_000 / 0.4:,.0f} is what the fleet would cost at full use.",
        f"- $27,000 / (3 · 0.9 + 12 · 0.85) is ${27_000 / used_after:,.0f}; divided by the mean "
        "use of "
        f"{used_after / 15:.0%} the fleet comes to ${27_000 * 15 / used_after:,.0f}, the $31,000.",
        f"- But an A100 is no H100: by data sheet it has {rates[0][1]:.0%} of its 16-bit "
        "arithmetic and "
        f"{rates[1][1]:.0%} of its bandwidth. In H100s' worth:",
    ]
    for what, share in rates:
        worth = 3 * 0.9 + 12 * 0.85 * share
        saved = 1 - 27_000 / worth / (30_000 / used_before)
        lines.append(f"    - by {what} {worth:.1f}, ${27_000 / worth:,.0f} each, {saved:.0%} less")
    ten = 10 * h100.hourly_price * _HOURS
    split = (3 * h100.hourly_price + 12 * a100.hourly_price) * _HOURS
    lines += [
        f"- At the example prices in spec/devices ten H100 are ${ten:,.0f} a month and the split "
        f"fleet ${split:,.0f}.",
        "- The use after the split is put in, not found: `twostroke plan` computes it for a load, "
        "and one pool at the same use would save as much.",
    ]
    return Claim(
        14,
        "What disaggregation saves",
        "Ten H100 at $30,000 a month and 40 % use cost $75,000 per utilised GPU; 3 H100 (90 %) + "
        "12 A100 (85 %) at $27,000 cost $31,000: 59 % less.",
        "The divisions are of the fleets' costs by their use, not per GPU. They compare GPUs of "
        "different speed as if they were alike, and the whole saving comes from a use that is "
        "assumed for one fleet and not for the other.",
        tuple(lines),
        Verdict.WRONG,
    )


def _check_checkpoints() -> Claim:
    checkpoint_s, token_s, restart_s, interval_s = 0.05, 0.02, 2.0, 20 * 0.02
    lines = [
        f"A checkpoint of 50 ms every {interval_s * 1e3:.0f} ms costs "
        f"{checkpoint_s / interval_s:.1%}, "
        f"not 2.5 %; 2.5 % is one every {checkpoint_s / 0.025 / token_s:.0f} tokens.",
        f"A failure costs the restart and half an interval: {restart_s + interval_s / 2:.1f} s, "
        "not 400 ms.",
        f"20 tokens are the best interval (Young 1974: τ = √(2·C·M)) when a failure comes every "
        f"{interval_s**2 / (2 * checkpoint_s):.1f} s. Otherwise:",
        "",
        "| a failure every | best interval (Daly 2006) | tokens | overhead | replay of the token "
        "log |",
        "|---|---|---|---|---|",
    ]
    station = open_station("llama-2-7b", "a100-80gb")
    prefill_s = station.predict_s(1, 1024, 0)
    for name, failure_s in (("day", 86_400.0), ("week", 7 * 86_400.0), ("month", _HOURS * 3600.0)):
        best = plan_checkpoints(checkpoint_s, failure_s, restart_s)
        replay = plan_replay(prefill_s, 32, failure_s, restart_s)
        lines.append(
            f"| {name} | {best.interval_s:,.0f} s | {best.interval_s / token_s:,.0f} | "
            f"{best.overhead:.3%} | {replay.overhead:.4%} |"
        )
    lines += ["", "Replay: no checkpoints; 32 live requests of 1,024 tokens of llama-2-7b are "
         "prefilled "
              f"again on an A100-80GB, {prefill_s * 1e3:.0f} ms each."]  # fmt: skip
    return Claim(
        15,
        "The best checkpoint interval",
        "With 50 ms a checkpoint, 20 ms a token and 2 s to restart, the best interval is about 20 "
        "tokens; overhead 2.5 %, recovery 400 ms.",
        "There is no best interval without a rate of failures. For those of real machines it is "
        "thousands of tokens, and keeping the tokens alone costs less than any checkpoint.",
        tuple(lines),
        Verdict.WRONG,
    )
