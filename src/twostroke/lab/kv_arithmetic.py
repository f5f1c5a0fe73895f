"""Unit 3: what keys and values weigh, and how many requests fit beside the weights."""

from __future__ import annotations

import random

from twostroke.lab.arithmetic import count_requests, get_kv_bytes
from twostroke.lab.machines import get_pool_tokens, open_station
from twostroke.lab.question import Question
from twostroke.lab.unit import Curves, Findings, Setup

IDEA = """Every token leaves a key and a value behind in every layer and KV head: 2 · layers · KV
heads · head size · bytes. That is paid for each token of each request as long as it lives, so
memory, not arithmetic, usually says how many requests decode at once. Fewer KV heads (grouped
queries) and fewer bits are the two ways to pay less."""
_MODELS = ("llama-2-7b", "llama-2-13b", "llama-3.1-8b")
_CONTEXTS = (256, 512, 1024, 2048, 4096)


def run(setup: Setup) -> Findings:
    """Requests that fit an A100-80GB by their length."""
    curves, numbers, lines = {}, {}, []
    for name in _MODELS:
        station = open_station(name, "a100-80gb")
        tokens = get_pool_tokens(station)
        curves[name] = (_CONTEXTS, [tokens // context for context in _CONTEXTS])
        each = station.spec.get_kv_bytes_per_token()
        numbers[name] = tokens // 2048
        lines.append(
            f"{name}: {each / 1e3:.0f} kB a token, {each * 2048 / 1e9:.2f} GB at 2,048 tokens; "
            f"{tokens // 2048} such requests fit an A100-80GB."
        )
    picture = Curves(
        "Requests that fit an A100-80GB beside 16-bit weights, a tenth kept back",
        ("tokens each holds (logarithmic)", "requests (logarithmic)"),
        curves,
        ticks=_CONTEXTS,
    )
    return Findings(lines, numbers, picture.draw)


def ask_kv(name: str, layers: int, heads: int, dim: int, tokens: int) -> Question:
    """Bytes of keys and values in 16 bits."""
    return Question(
        f"{name} has {layers} layers and {heads} KV heads of {dim}. How much are keys and values "
        f"of {tokens:,} tokens in FP16?",
        get_kv_bytes(layers, heads, dim, tokens),
        "bytes",
        f"2 · {layers} · {heads} · {dim} · {tokens:,} · 2 bytes = "
        f"{get_kv_bytes(layers, heads, dim, tokens):,} bytes.",
    )


def draw_kv(rng: random.Random) -> Question:
    """The same of a model that nobody has looked up."""
    layers, heads = rng.choice((24, 28, 32, 40, 48)), rng.choice((4, 8, 16, 32, 40))
    tokens = rng.choice((512, 1000, 1024, 3000, 4096, 8192))
    return ask_kv("A model", layers, heads, rng.choice((64, 96, 128)), tokens)


def ask_fit(memory_gb: int, weights_gb: float, request_mb: int, cap: float) -> Question:
    """Requests beside the weights, where a share `cap` of the memory may be used."""
    memory, weights, each = memory_gb * 1e9, weights_gb * 1e9, request_mb * 1e6
    share = "All of it" if cap == 1 else f"A share of {cap:g}"
    return Question(
        f"A device has {memory_gb} GB. {share} may be used, {weights_gb:g} GB are weights, and "
        f"each request needs {request_mb} MB. How many requests does it hold?",
        count_requests(memory, weights, each, cap),
        "requests",
        f"({memory_gb} GB · {cap:g} − {weights_gb:g} GB) / {request_mb} MB = "
        f"{(memory * cap - weights) / each:.2f}, and there is no part of a request. The cap comes "
        "off the memory, not off the requests.",
        tolerance=0.0,
    )


def draw_fit(rng: random.Random) -> Question:
    """The same with other sizes."""
    memory = rng.choice((24, 40, 48, 80))
    weights = round(memory * rng.uniform(0.2, 0.6))
    return ask_fit(memory, weights, rng.randint(120, 900), rng.choice((1.0, 0.9, 0.85)))
