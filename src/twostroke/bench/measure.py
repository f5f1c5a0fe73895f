"""Measures: engines turn by turn, round after round, limits measured in each round.

In each round every engine runs the workload once, in an order that alternates, and the machine's
limits are measured right before our turn: on a shared machine they change within seconds. The first
round warms and does not count. An engine that has spent its seconds on a workload is not asked
again, and one that spent them all in the first round is measured by it. Our tokens must be the same
in every round, and in every batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from twostroke.bench.engines import BenchEngine, BenchEngineFailed
from twostroke.bench.lineup import OURS
from twostroke.bench.results import Measurement, Sample, compare_tokens
from twostroke.bench.workloads import Workload, get_floor, make_request
from twostroke.errors import TwostrokeError
from twostroke.spec.device import DeviceSpec
from twostroke.spec.model import ModelSpec

PAUSE_S = 0.1  # threads of the engine before stop waiting for work in a loop


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to measure: rounds, seconds an engine may spend on a workload, and the most that one
    run may take by what the engine's reading took so far."""

    rounds: int
    budget_s: float
    longest_s: float


@dataclass(slots=True)
class Bench:
    """Started engines and what was learnt of them. measure_limits: this machine's, now."""

    spec: ModelSpec
    engines: list[BenchEngine]
    pace: Pace
    measure_limits: Callable[[], DeviceSpec]
    ended: dict[str, str] = field(default_factory=dict)
    _reading_rates: dict[str, float] = field(default_factory=dict)
    _rows: dict[int, list[int]] = field(default_factory=dict)

    def measure(self, workload: Workload) -> Measurement:
        """One workload over all rounds. Raises BenchEngineFailed when ours died."""
        result = Measurement(workload.name, workload.timed_tokens)
        if workload.context > self.spec.context_tokens:
            why = f"the model's context is {self.spec.context_tokens} tokens"
            result.missing = {engine.name: why for engine in self.engines}
            return result
        request = make_request(self.spec, workload)
        spent: dict[str, float] = {}
        tokens: dict[str, Any] = {}
        for turn in range(self.pace.rounds + 1):
            asked = self._choose(workload, spent, result)
            if not asked:
                break
            floor, seconds = 0.0, {}
            for engine in asked if turn % 2 else asked[::-1]:
                if engine.name == OURS:
                    floor = get_floor(self.spec, workload, self.measure_limits())
                begin = time.perf_counter()
                answer = self._ask(engine, request, result)
                if answer is None:
                    continue
                spent[engine.name] = spent.get(engine.name, 0.0) + time.perf_counter() - begin
                if turn or spent[engine.name] > self.pace.budget_s:
                    seconds[engine.name] = answer["seconds"]
                self._check(workload, engine, tokens.get(engine.name), answer["tokens"])
                tokens[engine.name] = answer["tokens"]
            floor = floor or get_floor(self.spec, workload, self.measure_limits())
            for name, taken in seconds.items():
                result.samples.setdefault(name, []).append(Sample(taken, floor))
        self._learn(workload, result)
        for name in tokens:
            if name != OURS and OURS in tokens:
                result.agreed[name] = compare_tokens(tokens[OURS], tokens[name])
        return result

    def _choose(
        self, workload: Workload, spent: dict[str, float], result: Measurement
    ) -> list[BenchEngine]:
        """The engines to ask in the next round."""
        asked = []
        for engine in self.engines:
            rate = self._reading_rates.get(engine.name)
            if engine.name in result.missing or spent.get(engine.name, 0) > self.pace.budget_s:
                continue
            if rate and workload.rows * workload.prompt / rate > self.pace.longest_s:
                result.missing[engine.name] = f"would take more than {self.pace.longest_s:.0f} s"
                continue
            asked.append(engine)
        return asked

    def _ask(
        self, engine: BenchEngine, request: dict[str, object], result: Measurement
    ) -> dict[str, Any] | None:
        """The answer, or None, and the reason in `result.missing`."""
        time.sleep(PAUSE_S)
        try:
            answer = engine.ask(**request)
        except BenchEngineFailed as error:
            if engine.name == OURS:
                raise
            self.ended[engine.name] = result.missing[engine.name] = str(error)
            self.engines.remove(engine)
            engine.close()
            return None
        if "refused" in answer:
            result.missing[engine.name] = answer["refused"]
            return None
        return answer

    def _check(self, workload: Workload, engine: BenchEngine, before: Any, tokens: Any) -> None:
        """Ours must write the same again, and each row of a batch what it writes in any other."""
        if engine.name != OURS:
            return
        if before not in (None, tokens):
            raise TwostrokeError(f"{workload.name}: our tokens changed between rounds")
        if workload.op == "batch":
            for row, mine in enumerate(tokens):
                if self._rows.setdefault(row, mine) != mine:
                    raise TwostrokeError(f"{workload.name}: row {row} differs from other batches")

    def _learn(self, workload: Workload, result: Measurement) -> None:
        if workload.op == "prefill":
            for name in result.samples:
                self._reading_rates[name] = result.get_rate(name)[0]


def collect_peaks(engines: Sequence[BenchEngine]) -> dict[str, int]:
    """Peak memory of every engine so far, in bytes."""
    return {engine.name: engine.get_peak_bytes() for engine in engines}
