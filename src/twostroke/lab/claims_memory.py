"""Claims of memory and what fits into it: 8, 9, 10, 11, 17 and 18.

Sizes come from the catalogue's models and from the forms in arithmetic.py; the update of claim 11
is run, and its error measured.
"""

from __future__ import annotations

from twostroke.lab.arithmetic import count_requests, get_kv_bytes
from twostroke.lab.claim import Claim, Verdict
from twostroke.lab.online_softmax import measure_errors
from twostroke.spec.catalog import get_known_model, list_known_models
from twostroke.spec.device import get_known_device

_SMS, _SM_BYTES = 108, 192 * 1024  # NVIDIA A100 whitepaper (2020), table 4


def build_memory_claims() -> list[Claim]:
    """The claims, in order of their numbers."""
    return [
        _check_kv(),
        _check_paging(),
        _check_scores(),
        _check_update(),
        _check_thirteen(),
        _check_fitting(),
    ]


def _check_kv() -> Claim:
    spec = get_known_model("llama-2-7b")
    one = spec.get_kv_bytes_per_token() * 2048
    device = get_known_device("a100-80gb")
    lines = (
        f"2 · {spec.num_layers} · {spec.num_kv_heads} · {spec.head_dim} · 2,048 · 2 = {one:,} "
        f"bytes, which is {one / 2**30:g} GiB.",
        f"A hundred that all hold 2,048 tokens: {100 * one / 1e9:.1f} GB = {100 * one / 2**30:g} "
        f"GiB, more than an A100 of {device.memory_bytes / 1e9:.0f} GB has. A hundred that are "
        f"halfway: {50 * one / 1e9:.1f} GB.",
    )
    return Claim(
        8,
        "The size of the KV cache",
        "KV cache = 2 · layers · KV heads · head size · length · bytes; LLaMA-2 7B at 2,048 in "
        "FP16 is 1 GB, so 100 requests need 100 GB.",
        "The formula is right, and the gigabytes are GiB. A hundred requests need that much when "
        "all of them are that long at once.",
        lines,
        Verdict.CONDITION,
        "all hundred hold their full length at the same time",
    )


def _check_paging() -> Claim:
    count, mean, most, token_bytes, block = 100, 512, 4096, 128_000, 16
    reserved, used = count * most * token_bytes, count * mean * token_bytes
    exact = [
        name
        for name in list_known_models()
        if get_known_model(name).get_kv_bytes_per_token() == 128 * 1024
    ]
    # A length that is any number is as likely to end at any place of its last block.
    waste = (block - 1) / 2
    lines = (
        f"Reserved: {count} · {most:,} · {token_bytes:,} = {reserved / 1e9:.1f} GB; in use "
        f"{used / 1e9:.2f} GB, {used / reserved:.1%}.",
        f"Paged, every request exactly {mean} tokens: {count * mean // block:,} blocks of {block}, "
        f"{used / 1e9:.2f} GB, {1 - used / reserved:.1%} less, all of it in use.",
        f"Lengths that end anywhere in a block leave {waste:g} places of their last block empty "
        f"in the mean: {mean / (mean + waste):.1%} in use, about "
        f"{count * (mean + waste) / block:,.0f} blocks.",
        f"128 KiB a token have, in 16 bits: {', '.join(exact)}.",
    )
    return Claim(
        9,
        "What paging saves",
        "100 requests averaging 512 of at most 4,096 tokens at 128 KB a token: pre-allocated 52.4 "
        "GB at 12.5 % use; paged with blocks of 16: 3,200 blocks, 6.5 GB, 100 % use, 87.5 % saved.",
        "Right when every length is a multiple of the block; otherwise the last block of each "
        "request is half empty in the mean.",
        lines,
        Verdict.CONDITION,
        "every length is a multiple of 16",
    )


def _check_scores() -> Claim:
    tokens, heads, layers = 2048, 32, 32
    spec = get_known_model("llama-2-7b")
    matrix = tokens * tokens
    sides = 4 * tokens * spec.width * 2
    with_scores = sides + heads * matrix * 4
    lines = (
        f"One head: {tokens:,}² scores, {matrix * 4 / 2**20:g} MiB in 32 bits "
        f"({matrix * 2 / 2**20:g} "
        f"in 16); {heads} heads: {heads * matrix * 4 / 2**20:g} MiB.",
        f"Over {layers} layers: still {heads * matrix * 4 / 2**20:g} MiB, for layers run one after "
        f"another and use the same memory again; {layers * heads * matrix * 4 / 2**30:g} GiB would "
        "be all of them kept at once, as training does for the backward pass and inference does "
        "not.",
        "Memory of one layer's attention, queries, keys, values and result in 16 bits included: "
        f"{with_scores / 1e6:.0f} MB with scores, {sides / 1e6:.0f} MB without, "
        f"{with_scores / sides:.0f} times; the ratio grows with the length, at {2 * tokens:,} "
        f"tokens it is {1 + 2 * (with_scores / sides - 1):.0f}.",
        f"An A100 has {_SMS} processors with {_SM_BYTES // 1024} KiB of fast memory each, "
        f"{_SMS * _SM_BYTES / 1e6:.0f} MB together; but a tile lies in one of them and must fit "
        f"its {_SM_BYTES // 1024} KiB.",
        "How much faster depends on length and device; on this engine's CPU kernels "
        "[the ablation](ablation.md) measures it.",
    )
    return Claim(
        10,
        "What attention's scores take",
        "Standard attention at 2,048 tokens: 16 MB a head, 512 MB a layer of 32 heads, 16 GB over "
        "32 layers; FlashAttention is 3–5 times faster with 10–20 times less memory, its tiles "
        "fitting in about 20 MB of SRAM.",
        "The sizes a head and a layer are right in 32 bits. Layers do not add up in inference, "
        "and a tile has the memory of one processor and not of the whole chip.",
        lines,
        Verdict.WRONG,
    )


def _check_update() -> Claim:
    wrong, right = (measure_errors(64, 256, keeps) for keeps in (False, True))
    lines = ["| key blocks seen | error of the claimed update | with l |", "|---|---|---|"]
    for at, (claimed, kept) in enumerate(zip(wrong, right, strict=True), 1):
        lines.append(f"| {at} | {_tell(claimed)} | {_tell(kept)} |")
    lines += [
        "",
        "Largest error against softmax over all scores, relative to the largest value; 8 queries, "
        "blocks of 64 keys, 64-bit arithmetic (`lab/online_softmax.py`).",
    ]
    return Claim(
        11,
        "The online softmax update",
        "O = (exp(m − m') · O + exp(S − m') · V) / l' at every key block.",
        "The old O was divided by l, so it must be multiplied by it: O = (l · exp(m − m') · O + "
        "exp(S − m') · V) / l'. Or O is kept undivided and divided once at the end. The mistake "
        "does not show with one key block.",
        tuple(lines),
        Verdict.WRONG,
    )


def _tell(error: float) -> str:
    return f"{error:.0%}" if error > 1e-3 else "below 1e-12" if error < 1e-12 else f"{error:.0e}"


def _check_thirteen() -> Claim:
    spec = get_known_model("llama-2-13b")
    heads, dim, layers = spec.num_kv_heads, spec.head_dim, spec.num_layers
    true = get_kv_bytes(layers, heads, dim, 4096)
    assert true == 4096 * spec.get_kv_bytes_per_token()
    claimed = 4_194_304_000
    lines = (
        f"2 · {layers} · {heads} · {dim} · 4,096 · 2 = {true:,} bytes = {true / 2**30:g} GiB.",
        f"The claim is {claimed / true:g} times that, what {layers * claimed // true} layers would "
        "have.",
    )
    return Claim(
        17,
        "The KV cache of LLaMA-2 13B",
        "40 layers, 40 heads of 128, at 4,096 tokens in FP16: 4,194,304,000 bytes, 4 GB.",
        f"{true:,} bytes.",
        lines,
        Verdict.WRONG,
    )


def _check_fitting() -> Claim:
    memory, weights, each = 24e9, 14e9, 356e6
    exact = (memory - weights) / each
    cap = (weights + 24 * each) / memory
    lines = (
        f"(24 GB − 14 GB) / 356 MB = {exact:.2f}: {count_requests(memory, weights, each)} "
        "requests.",
        f"With 0.9 of the memory, as engines use by default: (21.6 GB − 14 GB) / 356 MB = "
        f"{(0.9 * memory - weights) / each:.2f}: {count_requests(memory, weights, each, 0.9)}.",
        f"24 requests are what a share of {cap:.2f} holds.",
    )
    return Claim(
        18,
        "How many requests fit",
        "24 GB of memory, 14 GB of weights, 256 MB of KV and 100 MB of activations a request: at "
        "most 28 requests, 24 in practice.",
        "28 is right if all of the memory can be used. What is kept back comes off the memory and "
        "not off the requests: with the usual 0.9 there are 21. Activations are also not one "
        "share for each request: they are those of one step.",
        lines,
        Verdict.CONDITION,
        f"{cap:.0%} of the memory can be used, for 24",
    )
