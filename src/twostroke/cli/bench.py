"""`twostroke bench`: a load on the real engine, and the same load as the simulator predicts it.

Composes three runs of one scheduler: the engine that serves, recorded; the recording replayed plan
for plan (parity); and the simulator alone, with this machine's calibration, its pace just before
the run and just after it, and nothing of what the run measured (fidelity). It looks at the measured
run only to print it, and to tell how much of an error is the machine's: steps that took longer than
calibrated, and what the simulator says of such.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from twostroke.cli.bench_load import Load, settle_load
from twostroke.cli.bench_probe import average_paces, probe
from twostroke.cli.bench_replay import replay_file
from twostroke.cli.bench_run import RealRun, run_load
from twostroke.cli.bench_steps import ALONE, WITH_PROMPTS, list_paces
from twostroke.cli.bench_table import Compared, describe_bench, print_bench
from twostroke.cli.calibrate import BUDGET_S, run_calibrate
from twostroke.cli.compose import BuiltEngine, build_engine
from twostroke.cli.options import MachineOptions, SchedulingOptions
from twostroke.cli.question_options import BenchOptions, LoadOptions
from twostroke.cli.scheduling import choose_policy, read_target
from twostroke.cli.settings import (
    Choice,
    EngineSettings,
    ResolvedSettings,
    get_machine_settings,
    keep_on_cpu,
)
from twostroke.cli.simulated import MAX_ITERATIONS
from twostroke.cli.simulation_table import print_choices
from twostroke.cli.step_cost import find_step_cost
from twostroke.cli.timed_steps import fill_pool
from twostroke.core.policy import Policies
from twostroke.core.ports import ExecutorInfo
from twostroke.core.types import SchedulerConfig
from twostroke.engine.recording import Header
from twostroke.engine.recording_file import write_recording
from twostroke.errors import EngineError, InvalidParameter
from twostroke.exec.local import LocalExecutor
from twostroke.plan.step_time import MeasuredCost, Pace
from twostroke.policies.names import PolicyChoice, build_policies
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster
from twostroke.sim.recorded import list_steps, measure_recording, replay_recording
from twostroke.sim.records import Records
from twostroke.sim.replica import ReplicaSpec
from twostroke.sim.results import Summary, summarise
from twostroke.sim.routers import make_router
from twostroke.sim.sources import Targets

MAX_SECONDS = 86_400
_POOL_BYTES = 2**30  # calibrated with as much
_TOUCHED = Choice("KV memory", "written to before", "as after a while of serving")


@dataclass(frozen=True, slots=True)
class Predictor:
    """The simulator of one engine: the same sizes and policies, whose step times are calibrated.

    pace: of the machine as it is now; policies do not know.
    """

    config: SchedulerConfig
    info: ExecutorInfo
    cost: MeasuredCost
    policy: PolicyChoice
    pace: Pace = field(default_factory=Pace)

    def make_policies(self) -> Policies:
        """Fresh policies, as the engine's own."""
        block_bytes = self.info.kv_bytes // self.info.num_blocks if self.config.host_blocks else 0
        return build_policies(
            self.policy,
            step_tokens=self.config.step_tokens,
            block_bytes=block_bytes,
            cost=self.cost,
        )

    def simulate(self, arrivals: Sequence[Arrival]) -> Records:
        """What the requests would go through."""
        replica = ReplicaSpec(
            scheduler=self.config,
            info=self.info,
            cost=self.cost.slow_down(self.pace).add_engine(),
            make_policies=self.make_policies,
            max_iterations=MAX_ITERATIONS,
        )
        return Cluster(replica, 1, make_router("round-robin", 1)).run(arrivals)

    def predict_seconds(self, arrivals: Sequence[Arrival]) -> float:
        """When the last of them would have ended."""
        return self.simulate(arrivals).end_ns / 1e9


def run_bench(
    bench: BenchOptions, load: LoadOptions, scheduling: SchedulingOptions, on: MachineOptions
) -> None:
    """Run, replay, simulate and compare; or replay a recording. Raises TwostrokeError."""
    if bench.replay is not None:
        replay_file(Path(bench.replay), bench.json)
        return
    if bench.model is None:
        raise InvalidParameter("model", "name the model to run, or a recording with --replay")
    if not 0 < bench.seconds <= MAX_SECONDS:
        raise InvalidParameter(
            "seconds", f"must be above 0 and at most {MAX_SECONDS:,}, not {bench.seconds:g}"
        )
    path = None if bench.record is None else _check_record(bench.record)
    wanted = EngineSettings(
        model=bench.model,
        **get_machine_settings(keep_on_cpu(on)),
        policy=scheduling.policy,
        pace=scheduling.pace,
        ttft_target_ms=scheduling.ttft_target_ms,
        itl_target_ms=scheduling.itl_target_ms,
        kv_memory=_POOL_BYTES,
        has_chat=False,
    )
    built, cost, note = _build_calibrated(wanted, on)
    parts, settings = built.parts, built.settings
    try:
        itl_ns = read_target("itl_target_ms", scheduling.itl_target_ms)
        named = choose_policy(scheduling.policy, scheduling.pace, scheduling.itl_target_ms)
        policy = PolicyChoice(order=named.order, pace=named.pace, itl_ns=itl_ns)
        config = parts.scheduler.config
        predictor = Predictor(config, parts.executor.describe(), cost, policy)
        targets = Targets(
            context_tokens=parts.spec.context_tokens,
            ttft_ns=read_target("ttft_target_ms", scheduling.ttft_target_ms),
            itl_ns=itl_ns,
        )
        before = _probe(built, cost)
        predictor = replace(predictor, pace=before)
        settled = settle_load(load, targets, bench.seconds, predictor.predict_seconds)
        choices = (*settings.choices, note, _TOUCHED, *settled.choices)
        print_choices(choices)
        sys.stdout.flush()
        header = Header(
            parts.model_name, config, _describe_policies(predictor, bench.model, settings)
        )
        run = run_load(parts, settled.arrivals, header)
    finally:
        parts.executor.close()
        built.model.close()
    if path is not None:
        write_recording(run.recording, path)
        print(f"wrote {path}")
    after = _probe_again(wanted, cost)
    compared = compare(run, settled, predictor, (before, after))
    print_bench(compared, settled.fitted)
    if bench.json:
        print(json.dumps(describe_bench(compared, settled.fitted, choices)))


def compare(run: RealRun, load: Load, predictor: Predictor, probed: tuple[Pace, Pace]) -> Compared:
    """Replay the run, simulate its load, and put both beside each other.

    probed: the machine's pace before the run and after it.
    """
    replayed = replay_recording(run.recording, predictor.make_policies())
    measured = measure_recording(run.recording, predictor.make_policies())
    paces = tuple(list_paces(list_steps(run.recording), predictor.cost))
    found = {each.kind: each.ratio for each in paces}
    now = average_paces(*probed)
    own = Pace(found.get(ALONE, now.decode), found.get(WITH_PROMPTS, now.prefill))
    return Compared(
        replayed=replayed,
        measured=summarise(measured, predictor.config.num_blocks, measured.end_ns / 1e9),
        predicted=_summarise_simulated(replace(predictor, pace=now), load),
        at_pace=_summarise_simulated(replace(predictor, pace=own), load),
        paces=paces,
        probed=probed,
        late_ns=run.late_ns,
        part_seconds=run.stats.part_seconds,
        others_share=run.others_share,
        spare_share=max(0.0, 1 - predictor.info.threads / (os.cpu_count() or 1)),
    )


def _summarise_simulated(predictor: Predictor, load: Load) -> Summary:
    began = time.perf_counter()
    records = predictor.simulate(load.arrivals)
    return summarise(records, predictor.config.num_blocks, time.perf_counter() - began)


def _describe_policies(
    predictor: Predictor, model: str, settings: ResolvedSettings
) -> dict[str, object]:
    """What a replay needs to make the policies again."""
    return {
        "choice": asdict(predictor.policy),
        "block_bytes": predictor.info.kv_bytes // predictor.info.num_blocks,
        "model": model,
        "kv": settings.kv_element.value,
        "fit": json.loads(predictor.cost.fit.to_json()),
    }


def _build_calibrated(
    wanted: EngineSettings, on: MachineOptions
) -> tuple[BuiltEngine, MeasuredCost, Choice]:
    """The engine and its calibration, made first where there is none; what was done, to print.

    Raises EngineError where what was stored just now cannot be read again.
    """
    stored = "stored by `twostroke calibrate` on this machine"
    for reason in (stored, "just now, because there was no calibration"):
        built = build_engine(wanted)
        cost = find_step_cost(built.parts.spec, built.settings)
        if isinstance(cost, MeasuredCost):
            return built, cost, Choice("step times", "calibrated", reason)
        built.parts.executor.close()
        built.model.close()
        if reason is stored:
            print(f"no calibration of this model here: measuring its steps for {BUDGET_S:g} s")
            sys.stdout.flush()
            run_calibrate(wanted.model, on)
    raise EngineError("the calibration that was stored just now cannot be read")


def _probe(built: BuiltEngine, cost: MeasuredCost) -> Pace:
    """The machine's pace now; leaves a KV pool that was written to."""
    executor = built.parts.executor
    assert isinstance(executor, LocalExecutor)  # of this process, as it is calibrated
    fill_pool(executor)
    return probe(executor, cost, built.parts.spec, built.settings)


def _probe_again(wanted: EngineSettings, cost: MeasuredCost) -> Pace:
    """The machine's pace after a run, which has closed its engine."""
    built = build_engine(wanted)
    try:
        return _probe(built, cost)
    finally:
        built.parts.executor.close()
        built.model.close()


def _check_record(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidParameter("record", f"{path}: must be a file in a folder that exists")
    return path
