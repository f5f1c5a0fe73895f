"""What each technique buys on this machine: the same load with it and without, on the real engine.

Owns the loads, which are drawn from one seed, and which numbers tell of each technique. With and
without take turns, so that a machine that slows down slows both; every number is a median over
rounds. Where a technique promises the same tokens they are compared; where it does not (other
weights, other keys) it is said how many differ.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from twostroke.bench.attention_ablation import measure_attention
from twostroke.bench.variants import Arrival, Variant, VariantBench, VariantRun
from twostroke.errors import InvalidParameter
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.floats import to_float
from twostroke.exec.local import LocalExecutor, RunnerSizes
from twostroke.policies.names import PolicyChoice
from twostroke.spec.kv import KvElement
from twostroke.spec.quant import Format
from twostroke.weights.load import OpenModel
from twostroke.weights.tensor import HostTensor

SEED = 20
ROUNDS = 3
POOL_TOKENS = 16_384
STEP_TOKENS = 512
LONG_PROMPT = 1536
LEAST_CONTEXT = 2048
ATTENTION_TOKENS = 1024
_BLOCK = 16

Numbers = Mapping[str, float]
Load = Sequence[Arrival]


@dataclass(frozen=True, slots=True)
class Number:
    """One number of an ablation, in `unit`, without the technique and with it."""

    name: str
    unit: str
    without: float
    with_it: float
    is_better_high: bool = False

    @property
    def gain(self) -> float:
        """How many times better it is with the technique; below 1 it is worse."""
        ratio = (self.with_it or 1e-12) / (self.without or 1e-12)
        return ratio if self.is_better_high else 1 / ratio


@dataclass(frozen=True, slots=True)
class Ablation:
    """What one technique buys. same_tokens: the share of equal answers; promised: whether it must
    be all of them."""

    technique: str
    instead_of: str
    numbers: tuple[Number, ...]
    same_tokens: float
    promised: bool


@dataclass(frozen=True, slots=True)
class Side:
    """A technique's load under one variant, on one bench."""

    bench: VariantBench
    variant: Variant
    load: Load


class Ablations:
    """The techniques by name over one model; each is measured when it is asked for.

    threads: that compute.
    """

    def __init__(self, model: str, threads: int, rounds: int = ROUNDS) -> None:
        self._model = model
        self._rounds = rounds
        self.sizes = RunnerSizes(threads, POOL_TOKENS // _BLOCK, _BLOCK, 2048)
        self.known: dict[str, Callable[[VariantBench], Ablation]] = {
            "continuous batching": self.compare_batching,
            "paged KV": self.compare_paging,
            "chunked prefill": self.compare_chunking,
            "prefix cache": self.compare_prefix_cache,
            "tiled attention": self.compare_attention,
            "quantised weights": self.compare_weights,
            "int8 KV": self.compare_kv,
            "prompt lookup": self.compare_drafts,
        }

    def open(self) -> VariantBench:
        """The engine that most of them run on. Raises InvalidParameter for a context too short."""
        bench = VariantBench(self._model, self.sizes)
        if bench.spec.context_tokens < LEAST_CONTEXT:
            bench.close()
            raise InvalidParameter(
                "model", f"has a context of {bench.spec.context_tokens}; {LEAST_CONTEXT} are needed"
            )
        bench.run(Variant(name="warm"), self._draw_load(bench, 2, 64, 4))
        return bench

    def compare_batching(self, bench: VariantBench) -> Ablation:
        """Answers of very different lengths, all waiting at once."""
        load = self._draw_load(bench, 24, 32, 120)
        static = PolicyChoice(pace="static", batch_size=8, batch_timeout_ns=10_000_000)
        return self._compare(
            ("continuous batching", "static batches of 8"),
            Side(bench, Variant(name="without", policies=static, step_tokens=STEP_TOKENS), load),
            Side(bench, Variant(name="with", step_tokens=STEP_TOKENS, max_rows=8), load),
            {
                "output": ("tokens/s", lambda run: run.tokens_per_s, True),
                "mean latency": ("ms", _get_latency_ms, False),
            },
        )

    def compare_paging(self, bench: VariantBench) -> Ablation:
        """A pool of 2,304 tokens, and requests that could grow to 1,024 but do not."""
        load = self._draw_load(bench, 16, 48, 48)
        paged = Variant(name="with", step_tokens=STEP_TOKENS, num_blocks=144)
        return self._compare(
            ("paged KV", "1,024 tokens reserved each"),
            Side(bench, replace(paged, name="without", reserve_tokens=1024), load),
            Side(bench, paged, load),
            {
                "output": ("tokens/s", lambda run: run.tokens_per_s, True),
                "sequences a step": ("", lambda run: run.mean_rows, True),
                "held KV in use": ("%", lambda run: 100 * run.filled_share, True),
            },
        )

    def compare_chunking(self, bench: VariantBench) -> Ablation:
        """Four answers are being written when a long prompt arrives."""
        short = [Arrival(0.0, self._draw_prompt(bench, 16, row), 64) for row in range(4)]
        load = [*short, Arrival(0.15, self._draw_prompt(bench, LONG_PROMPT, 9), 4)]
        whole = Variant(name="without", step_tokens=2048)
        return self._compare(
            ("chunked prefill", "whole prompts in a step"),
            Side(bench, whole, load),
            Side(bench, replace(whole, name="with", step_tokens=128), load),
            {
                "longest pause of the four": ("ms", _get_longest_gap_ms, False),
                "TTFT of the long one": ("ms", lambda run: 1e3 * run.requests[-1].ttft_s, False),
            },
        )

    def compare_prefix_cache(self, bench: VariantBench) -> Ablation:
        """Six requests one after another, whose prompts begin with the same 512 tokens."""
        shared = self._draw_prompt(bench, 512, 3)
        load = [
            Arrival(0.6 * at, shared + self._draw_prompt(bench, 24, 50 + at), 4) for at in range(6)
        ]
        plain = Variant(name="without", step_tokens=STEP_TOKENS)
        return self._compare(
            ("prefix cache", "every prompt computed"),
            Side(bench, plain, load),
            Side(bench, replace(plain, name="with", has_prefix_cache=True), load),
            {"TTFT behind the first": ("ms", _get_later_ttft_ms, False)},
        )

    def compare_attention(self, bench: VariantBench) -> Ablation:
        """One layer over one prompt; not the whole engine, which has no other attention."""
        times = measure_attention(bench.spec, ATTENTION_TOKENS, self.sizes.threads)
        return Ablation(
            "tiled attention",
            "the scores in memory",
            (
                Number(
                    f"one layer, {times.tokens:,} tokens",
                    "ms",
                    times.materialised_s * 1e3,
                    times.tiled_s * 1e3,
                ),
                Number("memory", "MB", times.materialised_bytes / 1e6, times.tiled_bytes / 1e6),
            ),
            float(times.largest_error < 1e-4),
            True,
        )

    def compare_weights(self, bench: VariantBench) -> Ablation:
        """The file's weights, and the same values stored as 16-bit floats."""
        load = [Arrival(0.0, self._draw_prompt(bench, 256, 4), 24)]
        plain = Variant(name="with", step_tokens=STEP_TOKENS)
        with VariantBench(self._model, self.sizes, build_float_executor) as floats:
            large, small = (one.executor.describe().weight_bytes / 1e6 for one in (floats, bench))
            ablation = self._compare(
                ("quantised weights", "the same in 16 bits"),
                Side(floats, replace(plain, name="without"), load),
                Side(bench, plain, load),
                {
                    "TPOT": ("ms", _get_tpot_ms, False),
                    "TTFT": ("ms", lambda run: 1e3 * run.requests[0].ttft_s, False),
                },
                promised=False,
            )
        return replace(ablation, numbers=(*ablation.numbers, Number("weights", "MB", large, small)))

    def compare_kv(self, bench: VariantBench) -> Ablation:
        """Four sequences deep in their context, where reading keys and values weighs most."""
        load = [Arrival(0.0, self._draw_prompt(bench, 1400, row), 24) for row in range(4)]
        sizes = replace(self.sizes, kv_element=KvElement.INT8)
        with VariantBench(self._model, sizes) as small:
            large_kb, small_kb = (
                one.spec.get_kv_bytes_per_token(one.sizes.kv_element) / 1e3
                for one in (bench, small)
            )
            ablation = self._compare(
                ("int8 KV", "16-bit KV"),
                Side(bench, Variant(name="without", step_tokens=STEP_TOKENS), load),
                Side(small, Variant(name="with", step_tokens=STEP_TOKENS), load),
                {"TPOT of four": ("ms", _get_last_tpot_ms, False)},
                promised=False,
            )
        return replace(
            ablation, numbers=(*ablation.numbers, Number("a token", "kB", large_kb, small_kb))
        )

    def compare_drafts(self, bench: VariantBench) -> Ablation:
        """A prompt that repeats itself, as code and quotations do."""
        phrase = self._draw_prompt(bench, 24, 5)
        load = [Arrival(0.0, phrase * 8, 96)]
        plain = Variant(name="without", step_tokens=STEP_TOKENS)
        return self._compare(
            ("prompt lookup", "a token a step"),
            Side(bench, plain, load),
            Side(bench, replace(plain, name="with", policies=PolicyChoice(drafts=True)), load),
            {
                "TPOT": ("ms", _get_tpot_ms, False),
                "steps": ("", lambda run: float(len(run.steps)), False),
            },
        )

    def _compare(
        self,
        names: tuple[str, str],
        without: Side,
        with_it: Side,
        numbers: Mapping[str, tuple[str, Callable[[VariantRun], float], bool]],
        promised: bool = True,
    ) -> Ablation:
        """Both sides in turns; the median of each number."""
        runs: tuple[list[VariantRun], list[VariantRun]] = ([], [])
        for turn in range(self._rounds):
            order = ((0, without), (1, with_it))
            for place, side in order if turn % 2 == 0 else order[::-1]:
                runs[place].append(side.bench.run(side.variant, side.load))
        found = tuple(
            Number(
                name,
                unit,
                statistics.median(get(run) for run in runs[0]),
                statistics.median(get(run) for run in runs[1]),
                is_better_high,
            )
            for name, (unit, get, is_better_high) in numbers.items()
        )
        pairs = [
            one == other
            for first, second in zip(*runs, strict=True)
            for one, other in zip(first.answers, second.answers, strict=True)
        ]
        return Ablation(*names, found, sum(pairs) / len(pairs), promised)

    def _draw_load(self, bench: VariantBench, count: int, prompt: int, most: int) -> list[Arrival]:
        """`count` requests at once, of prompts around `prompt` tokens and answers up to `most`."""
        draw = random.Random(SEED)
        return [
            Arrival(
                0.0,
                self._draw_prompt(bench, draw.randrange(prompt // 2, 2 * prompt), row),
                draw.choice((most // 12 + 1, most // 6 + 1, most // 3, most)),
            )
            for row in range(count)
        ]

    def _draw_prompt(self, bench: VariantBench, length: int, row: int) -> tuple[int, ...]:
        """Ordinary tokens at random; other rows have others."""
        draw = random.Random(SEED * 1000 + row)
        vocab = min(bench.spec.vocab_size, 40_000)
        return tuple(draw.randrange(min(300, vocab // 2), vocab) for _ in range(length))


def build_float_executor(model: OpenModel, sizes: RunnerSizes) -> LocalExecutor:
    """The model's weights as 16-bit floats of the values that they stand for."""
    tensors = {}
    for name, tensor in model.tensors.items():
        if tensor.spec.format.is_quantised:
            values = to_float(model.spec, tensor).astype(np.float16)
            data = values.view(np.uint8).reshape(-1)
            data.flags.writeable = False
            tensor = HostTensor(replace(tensor.spec, format=Format.F16), data)
        tensors[name] = tensor
    return LocalExecutor(CpuRunner(model.spec, tensors, sizes), sizes)


def _get_latency_ms(run: VariantRun) -> float:
    return 1e3 * statistics.mean(one.ended_s - one.arrived_s for one in run.requests)


def _get_longest_gap_ms(run: VariantRun) -> float:
    return 1e3 * max(max(one.gaps_s) for one in run.requests[:-1])


def _get_later_ttft_ms(run: VariantRun) -> float:
    return 1e3 * statistics.median(one.ttft_s for one in run.requests[1:])


def _get_tpot_ms(run: VariantRun) -> float:
    return 1e3 * run.requests[0].tpot_s


def _get_last_tpot_ms(run: VariantRun) -> float:
    """Of the request whose prompt came last: from then on all of them decode together."""
    last = max(run.requests, key=lambda one: one.token_s[0])
    return 1e3 * last.tpot_s
