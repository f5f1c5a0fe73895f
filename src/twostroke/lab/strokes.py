"""Unit 1: the two strokes, and why one token costs so differently in each."""

from __future__ import annotations

import random

from twostroke.lab.machines import open_station
from twostroke.lab.question import Question
from twostroke.lab.unit import Curves, Findings, Setup
from twostroke.spec.catalog import get_known_model
from twostroke.spec.device import get_known_device

IDEA = """Prefill reads a prompt: all its tokens go through the model at once, and every weight is
read once for all of them. Decode writes an answer: a token at a time, and every weight is read
again for each. So a prompt's token costs arithmetic and an answer's token costs memory. Rows that
decode together share the reading, which is why engines batch."""
_MODELS = ("llama-2-7b", "llama-2-13b", "llama-3.1-8b", "mistral-7b")
_DEVICES = ("a100-40gb", "a100-80gb", "h100-sxm", "h200", "l40s")


def run(setup: Setup) -> Findings:
    """Predicted time of a token by how many share its step, in both strokes."""
    station = open_station("llama-3.1-8b", "a100-80gb")
    counts = [2**power for power in range(12)]
    prefill = [station.predict_s(1, count, 0) * 1e3 / count for count in counts if count > 1]
    decode = [station.predict_s(count, 1, 512) * 1e3 / count for count in counts[:9]]
    ratio = decode[0] / prefill[8]
    lines = (
        f"llama-3.1-8b on an A100-80GB: a token decoded alone takes {decode[0]:.1f} ms,",
        f"one of a prompt of 512 takes {prefill[8]:.3f} ms: {ratio:.0f} times less.",
        f"256 rows decoding together: {decode[8]:.3f} ms a token.",
    )
    curves = Curves(
        "A token's time by how many share its step (llama-3.1-8b, A100-80GB, predicted)",
        ("tokens in the step (logarithmic)", "ms a token (logarithmic)"),
        {
            "prefill, by prompt tokens": (counts[1:], prefill),
            "decode at context 512, by rows": (counts[:9], decode),
        },
    )
    numbers = {"decode_ms": decode[0], "prefill_ms": prefill[8], "ratio": ratio}
    return Findings(lines, numbers, curves.draw)


def ask_decode_floor(model: str, device: str) -> Question:
    """The least time of a decode step: weights over bandwidth."""
    spec, known = get_known_model(model), get_known_device(device)
    weights_gb, bandwidth = round(spec.weight_bytes / 1e9, 2), known.memory_bandwidth
    seconds = weights_gb * 1e9 / bandwidth
    return Question(
        f"{model} has {weights_gb:.2f} GB of weights in 16 bits, {device} reads "
        f"{bandwidth / 1e12:g} TB/s. What is the least time of a decode step?",
        seconds,
        "s",
        f"Every weight is read once: {weights_gb:.2f} GB / {bandwidth / 1e12:g} TB/s = "
        f"{seconds * 1e3:.2f} ms.",
    )


def draw_decode_floor(rng: random.Random) -> Question:
    """The same of some model on some device."""
    return ask_decode_floor(rng.choice(_MODELS), rng.choice(_DEVICES))


def ask_prefill_floor(model: str, device: str, tokens: int) -> Question:
    """The least time of a prefill: 2·N·S over the 16-bit rate."""
    parameters, rate = get_known_model(model).num_weights, get_known_device(device).get_rate("f16")
    billions = round(parameters / 1e9, 2)
    seconds = 2 * billions * 1e9 * tokens / rate
    return Question(
        f"{model} has {billions:g} billion parameters, {device} computes {rate / 1e12:g} TFLOP/s "
        f"in 16 bits. What is the least time of a prompt of {tokens:,} tokens, attention left out?",
        seconds,
        "s",
        f"A multiply-add a parameter and token: 2 · {billions:g}e9 · {tokens:,} / "
        f"{rate / 1e12:g}e12 = "
        f"{seconds * 1e3:.2f} ms.",
    )


def draw_prefill_floor(rng: random.Random) -> Question:
    """The same of some model on some device."""
    return ask_prefill_floor(rng.choice(_MODELS), rng.choice(_DEVICES), rng.randint(5, 40) * 100)
