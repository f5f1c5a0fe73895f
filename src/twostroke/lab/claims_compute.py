"""Claims of operations, bytes and the times that follow: 1, 2, 4, 5, 6, 12, 13 and 16.

Numbers come from spec/work.py, the data sheets in spec/devices and plan/roofline_cost.py, and from
what was measured on a GPU. Nothing here is a result that somebody typed.
"""

from __future__ import annotations

from twostroke.lab.arithmetic import get_ridge
from twostroke.lab.claim import Claim, Evidence, Verdict
from twostroke.lab.machines import Station, open_station
from twostroke.plan.roofline_cost import CAPTURED, EAGER
from twostroke.policies.target import find_most_tokens
from twostroke.spec.device import get_known_device, list_known_devices

A100 = "a100-80gb"
# Claimed for 512 prompt tokens and one decode step: seconds of each.
_CLAIMED = {
    "llama-2-70b": (1.1, 15e-3),
    "llama-2-13b": (180e-3, 3.2e-3),
    "llama-2-7b": (95e-3, 1.8e-3),
}
_GPT3_BYTES = 2 * 175e9  # its name says how many parameters; 16 bits each


def build_compute_claims(evidence: Evidence) -> list[Claim]:
    """The claims, in order of their numbers."""
    return [
        _check_times(evidence),
        _check_per_token(evidence),
        _check_prefill_work(),
        _check_ridge(),
        _check_decode_intensity(),
        _check_blocking(),
        _check_chunk_rule(),
        _check_graphs(evidence),
    ]


def _check_times(evidence: Evidence) -> Claim:
    lines = [
        "| model | claimed decode | bytes of weights | bandwidth it needs | single devices that "
        "have it | claimed ratio | floors on one A100-80GB | their ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (prefill_s, decode_s) in _CLAIMED.items():
        station = open_station(name, A100)
        work = station.get_work(1, 1, 512)
        prefill, decode = station.get_floor(1, 512, 0), station.get_floor(1, 1, 512)
        lines.append(
            f"| {name} | {decode_s * 1e3:g} ms | {work.bytes / 1e9:.1f} GB | "
            f"{work.bytes / decode_s / 1e12:.2f} TB/s | {_list_fast(work.bytes / decode_s)} | "
            f"{prefill_s / decode_s:.0f} | {prefill.seconds * 1e3:.1f} ms and "
            f"{decode.seconds * 1e3:.1f} ms | {prefill.seconds / decode.seconds:.1f} |"
        )
    needed = _GPT3_BYTES / 23e-3
    lines.append(
        f"| GPT-3 175B | 23 ms | {_GPT3_BYTES / 1e9:.0f} GB | {needed / 1e12:.1f} TB/s | "
        f"{_list_fast(needed)} | {2.3 / 23e-3:.0f} | – | – |"
    )
    prefill_s = evidence.get_gpu_step_s("llama-2-7b", "prefill-512")
    decode_s = evidence.get_gpu_step_s("llama-2-7b", "decode-1x128")
    lines += [
        "",
        f"Measured on an H100 (docs/gpu/results.json), llama-2-7b in 16 bits: 512 tokens "
        f"{prefill_s * 1e3:.1f} ms, a decode step at context 128 {decode_s * 1e3:.1f} ms, "
        f"{prefill_s / decode_s:.1f} to 1.",
    ]
    return Claim(
        1,
        "Prefill of 512 tokens against one decode step",
        "GPT-3 175B 2.3 s / 23 ms (100:1); LLaMA-2 70B 1.1 s / 15 ms (73:1); 13B 180 / 3.2 ms "
        "(56:1); 7B 95 / 1.8 ms (53:1).",
        "A decode step reads every weight once, so it cannot be shorter than the weights' bytes "
        "over the bandwidth. On one device the claimed times are below that nearly everywhere; "
        "devices that share a model shorten both strokes alike. The prefill times are several "
        "times above their floors; the ratio of the two is a few, not fifty.",
        tuple(lines),
        Verdict.WRONG,
    )


def _list_fast(bandwidth: float) -> str:
    devices = [get_known_device(name) for name in list_known_devices()]
    fast = [device.name for device in devices if device.memory_bandwidth >= bandwidth]
    return ", ".join(fast) if fast else "none"


def _check_per_token(evidence: Evidence) -> Claim:
    lines = ["| model | prefill of 512, a token | decode, a token | decode / prefill | whole "
         "prefill / "
             "one decode |", "|---|---|---|---|---|"]  # fmt: skip
    for name in reversed(_CLAIMED):
        station = open_station(name, A100)
        prefill, decode = station.get_floor(1, 512, 0).seconds, station.get_floor(1, 1, 512).seconds
        lines.append(
            f"| {name} | {prefill / 512 * 1e3:.3f} ms | {decode * 1e3:.1f} ms | "
            f"{decode / (prefill / 512):.0f} | {prefill / decode:.2f} |"
        )
    prefill_s = evidence.get_gpu_step_s("llama-2-7b", "prefill-2048") / 2048
    decode_s = evidence.get_gpu_step_s("llama-2-7b", "decode-1x2048")
    lines += ["", f"Measured on an H100, llama-2-7b (docs/gpu/results.json): {prefill_s * 1e3:.3f} "
         "ms a "
              f"prompt token of 2,048, {decode_s * 1e3:.1f} ms a decoded one: decode is "
              f"{decode_s / prefill_s:.0f} times slower."]  # fmt: skip
    return Claim(
        2,
        "Which stroke is slower for each token",
        "Prefill is 50 to 100 times slower than decode per token, and the ratio rises with model "
        "size.",
        "The other way round: a token costs far less in prefill, because all tokens of a prompt "
        "share one reading of the weights. The ratio of a whole prefill to a decode step hardly "
        "depends on the model's size, for both grow with the parameters (floors on an A100-80GB).",
        tuple(lines),
        Verdict.WRONG,
    )


def _check_prefill_work() -> Claim:
    station = open_station("llama-2-7b", A100)
    spec, work = station.spec, station.get_work(1, 512, 0)
    rounded = 2 * 7e9 * 512
    lines = [
        f"llama-2-7b has {spec.num_weights:,} parameters: 2·N·S = {2 * spec.num_weights * 512:,}; "
        f"with N rounded to 7 billion {rounded / 1e12:.2f} TFLOP, as claimed.",
        f"Counted part by part (the embedding is no product, the head runs for one position, "
        f"attention is added): {work.flops:,} = {work.flops / 1e12:.2f} TFLOP, of which attention "
        f"{work.get_part('attention').flops / work.flops:.1%}.",
        "",
        "| tokens | FLOP | 2·N·S is | bytes | FLOP per byte | of that attention |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in (128, 512, 4096, 16_384):
        step = station.get_work(1, tokens, 0)
        lines.append(
            f"| {tokens:,} | {step.flops / 1e12:.2f} T | "
            f"{2 * spec.num_weights * tokens / step.flops:.0%} of it | {step.bytes / 1e9:.1f} GB | "
            f"{step.flops / step.bytes:,.0f} | "
            f"{step.get_part('attention').flops / step.flops:.0%} |"
        )
    return Claim(
        4,
        "The work of a prefill",
        "FLOPs 2NS, bytes 2N, so intensity equals the sequence length S; LLaMA-2 7B at 512 tokens "
        "is 7.2 TFLOP.",
        "2NS over 2N is S, which is a good estimate while the prompt is short. Attention grows "
        "with S², keys and values are written, and the bytes are 2N only with 16-bit weights.",
        tuple(lines),
        Verdict.CONDITION,
        "16-bit weights, and prompts of some hundred to a few thousand tokens",
    )


def _check_ridge() -> Claim:
    lines = [f"312 TFLOP/s over 1.5 TB/s is {get_ridge(312e12, 1.5e12):.0f}. By data sheet:", ""]
    for name in ("a100-40gb", "a100-80gb"):
        device = get_known_device(name)
        lines.append(
            f"- {name}: {device.get_rate('f16') / 1e12:.0f} TFLOP/s over "
            f"{device.memory_bandwidth / 1e12:.3f} TB/s is {device.get_ridge('f16'):.1f}"
        )
    for name in ("a100-40gb", "a100-80gb"):
        station = open_station("llama-2-7b", name)
        work, floor = station.get_work(1, 512, 0), station.get_floor(1, 512, 0)
        lines.append(
            f"- llama-2-7b at 512 tokens on {name}: {work.flops / work.bytes:.0f} FLOP per byte, "
            "most of its floor is set by "
            f"{'arithmetic' if floor.bound_by == 'compute' else 'memory'}"
        )
    return Claim(
        5,
        "The ridge of an A100",
        "312 TFLOP/s FP16 over 1.5 TB/s puts the ridge at 208 FLOP per byte; prefill at 512 is "
        "compute-bound.",
        "The division is right and so is the conclusion; but the bandwidth is rounded, and that of "
        "the larger card is another.",
        tuple(lines),
        Verdict.CONDITION,
        "the card with 40 GB, its bandwidth rounded down",
    )


def _check_decode_intensity() -> Claim:
    station = open_station("llama-2-7b", A100)
    spec = station.spec
    work = station.get_work(1, 1, 2047)
    kv = spec.get_kv_bytes_per_token() * 2048
    lines = [
        f"KV of 2,048 tokens: 2 · {spec.num_layers} layers · {spec.num_kv_heads} heads · "
        f"{spec.head_dim} · 2 bytes · 2,048 = {kv:,} bytes, half of the 2 GB claimed.",
        f"A step of one row there: {work.flops / 1e9:.2f} GFLOP over {work.bytes / 1e9:.2f} GB is "
        f"{work.flops / work.bytes:.3f} FLOP per byte.",
        "",
        "| rows | context 128 | context 2,048 |",
        "|---|---|---|",
    ]
    for rows in (1, 8, 32, 128):
        found = [station.get_work(rows, 1, context - 1) for context in (128, 2048)]
        cells = [f"{step.flops / step.bytes:.2f}" for step in found]
        lines.append(f"| {rows} | {' | '.join(cells)} |")
    return Claim(
        6,
        "The intensity of decode",
        "About 1, a constant; 7B at context 2,048 reads 14 GB of weights and 2 GB of KV cache, "
        "0.875 FLOP per byte.",
        "About 1 for one row. Rows share the weights, so it grows with the batch until keys and "
        "values, which nobody shares, are most of the bytes. The KV cache is counted twice.",
        tuple(lines),
        Verdict.WRONG,
    )


def _check_blocking() -> Claim:
    lines = ["| model | device | 10,000 tokens at once | a step of 512 of them (in the middle) | "
         "with 32 "
             "decodes along |", "|---|---|---|---|---|"]  # fmt: skip
    cases = (("llama-3.1-8b", "h100-sxm", 1), ("llama-3.1-8b", A100, 1), ("llama-3.1-8b", "l4", 1),
             ("llama-3.1-70b", A100, 2), ("llama-3.1-70b", A100, 8))  # fmt: skip
    for model, device, tp in cases:
        station = open_station(model, device, tp=tp)
        whole, chunk = station.predict_s(1, 10_000, 0), station.predict_s(1, 512, 5_000)
        mixed = station.predict_mixed_s([(1, 512, 5_000), (32, 1, 1_000)])
        lines.append(
            f"| {model} | {f'{tp} × ' if tp > 1 else ''}{device} | {whole:.2f} s | "
            f"{chunk * 1e3:.0f} ms | {mixed * 1e3:.0f} ms |"
        )
    return Claim(
        12,
        "A long prompt in the way",
        "A 10,000-token prefill blocks a GPU for about 5 s; chunks of 512 let decodes through.",
        "That it blocks, and that chunks let others through, is right. How long depends on model "
        "and device: predicted here from a fraction of a second to several.",
        tuple(lines),
        Verdict.CONDITION,
        "some 70 billion parameters on two A100, or as much work for as little arithmetic",
    )


def _check_chunk_rule() -> Claim:
    lines = ["| model | device | step of 512 | step of 999, taken whole | largest chunk with 32 "
         "decodes "
             "that keeps 50 ms |", "|---|---|---|---|---|"]  # fmt: skip
    for model, device in (("llama-3.1-8b", "h100-sxm"), ("llama-3.1-8b", A100),
                          ("llama-3.1-8b", "l4"), ("llama-2-13b", A100)):  # fmt: skip
        station = open_station(model, device)
        chunk, whole = (station.predict_s(1, tokens, 0) * 1e3 for tokens in (512, 999))
        most = _find_chunk(station, 50_000_000)
        told = f"{most:,}" if most else "none: decodes alone take longer"
        lines.append(f"| {model} | {device} | {chunk:.0f} ms | {whole:.0f} ms | {told} |")
    return Claim(
        13,
        "How large a chunk should be",
        "512; half of it when load exceeds 0.8 or the prompt exceeds 10,000 tokens; prompts under "
        "1,000 whole.",
        "The right size follows from the time between tokens that was promised, the device and "
        "what else is in the step; the pace `target` computes it. The rule contradicts itself: a "
        "prompt of 999 tokens makes a longer step than any chunk of a long one.",
        tuple(lines),
        Verdict.WRONG,
    )


def _find_chunk(station: Station, limit_ns: int) -> int:
    def predict(tokens: int) -> int:
        return round(station.predict_mixed_s([(1, tokens, 0), (32, 1, 1_000)]) * 1e9)

    return find_most_tokens(predict, 8192, limit_ns)


def _check_graphs(evidence: Evidence) -> Claim:
    launched, captured = (open_station("llama-2-7b", A100, over) for over in (EAGER, CAPTURED))
    lines = ["| step | launched kernel by kernel | replayed | saved |", "|---|---|---|---|"]
    for name, shape in (("decode, 1 row", (1, 1, 512)), ("decode, 32 rows", (32, 1, 512)),
                        ("prefill of 2,048", (1, 2048, 0))):  # fmt: skip
        before, after = launched.predict_s(*shape), captured.predict_s(*shape)
        lines.append(
            f"| {name} | {before * 1e3:.1f} ms | {after * 1e3:.1f} ms | {1 - after / before:.0%} |"
        )
    cell = "prefill launched call by call"
    lines += ["", "Predicted for llama-2-7b on an A100-80GB, from the overheads fitted to an "
         "engine of 2023 "
              "and its other Python, and assumed for one that replays. Measured on an H100 "
              "(docs/log.md, \"The GPU backend\"), prefills launched call by call against "
              f"captured: {evidence.get_log_cell(cell, 2)}; "
              "the shorter the step, the more there is to gain."]  # fmt: skip
    return Claim(
        16,
        "What CUDA graphs do",
        "CUDA graphs fuse kernels and belong to prefill optimisation.",
        "A graph replays the same kernels with one launch; it fuses none. It saves the host's time "
        "between kernels, which is a large share where kernels are short: in decode, and in short "
        "prefills.",
        tuple(lines),
        Verdict.WRONG,
    )
