"""Engines that only say how long they took, and results made of numbers chosen by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tiny_models import TINY_SPECS
from twostroke.bench.engines import BenchEngineFailed
from twostroke.bench.measure import Bench, Pace
from twostroke.bench.results import Agreement, Measurement, ModelResult, Sample
from twostroke.bench.served import Answer, Arrival, summarise_answers
from twostroke.bench.servers import Served
from twostroke.spec.device import DeviceSpec

# Slow memory beside its arithmetic: one token is bound by bytes, a full step by operations.
DEVICE = DeviceSpec("plain", 1e9, (("int8", 4e11), ("fp32", 4e10)), 1, 2**30)
Reply = Callable[[int, dict[str, Any]], dict[str, Any]]


class FakeEngine:
    """Answers by a function of how often it was asked before, and of the request."""

    def __init__(self, name: str, reply: Reply, pause_s: float = 0.0) -> None:
        self.name = name
        self.asked = 0
        self.is_closed = False
        self._reply = reply
        self._pause_s = pause_s

    def ask(self, **request: Any) -> dict[str, Any]:
        """The next answer."""
        time.sleep(self._pause_s)
        self.asked += 1
        return self._reply(self.asked - 1, request)

    def close(self) -> None:
        """Notes that it was closed."""
        self.is_closed = True


def answer_plainly(turn: int, request: dict[str, Any]) -> dict[str, Any]:
    """One second, and the same tokens always."""
    rows = [[row, 7, 7] for row in range(len(request.get("prompts", ())))]
    return {"seconds": 1.0, "tokens": rows or [1, 2, 3]}


def die(turn: int, request: dict[str, Any]) -> dict[str, Any]:
    """Ends instead of answering."""
    raise BenchEngineFailed("out of memory")


def make_bench(engines: Sequence[FakeEngine], **pace: float) -> Bench:
    """A bench of these engines that pauses nowhere."""
    rounds = int(pace.get("rounds", 2))
    limits = Pace(rounds, pace.get("budget_s", 60.0), pace.get("longest_s", 60.0))
    return Bench(TINY_SPECS["llama"], list(engines), limits, lambda: DEVICE)  # type: ignore[arg-type]


def make_measurement(name: str = "decode-0") -> Measurement:
    """Three rounds: we take 1, 2 and 4 s for 100 tokens, the peer four times as long."""
    floors = (0.5, 1.0, 2.0)
    return Measurement(
        name,
        100,
        {
            "twostroke": [Sample(2 * floor, floor) for floor in floors],
            "llama.cpp": [Sample(8 * floor, floor) for floor in floors],
        },
        {"llama.cpp": Agreement(1, 1, 3, 5)},
    )


def make_result() -> ModelResult:
    """A model with one workload, one served load, and a peer that is missing."""
    arrivals = [Arrival(0.0, (1, 2), 3)]
    served = {
        name: Served(
            1.0, 2**20, {"burst": summarise_answers(arrivals, [Answer((end / 2, end), 3)])}
        )
        for name, end in (("twostroke", 1.0), ("openvino", 2.0))
    }
    return ModelResult(
        "smollm2-135m",
        "model.gguf",
        1000,
        measurements=[make_measurement()],
        peak_bytes={"twostroke": 1500, "llama.cpp": 2000},
        kv_bytes=500,
        served={name: [one] for name, one in served.items()},
        load_floors={"burst": {"output_tokens_per_s": 6.0, "ttft_s_p50": 0.1}},
        refused={"vllm": "no\nsuch library"},
    )
