"""The server's CPU executor in a child process: what is put together for it.

Owns how long a child may take for a step. Everything else is the supervisor's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from twostroke.cli.step_cost import CPU
from twostroke.core.ports import Executor
from twostroke.core.types import StepPlan
from twostroke.engine.loop import LoopPolicy
from twostroke.exec.child_cpu import describe_child, measure_memory
from twostroke.exec.child_executor import Deadline
from twostroke.exec.child_supervisor import ChildSupervisor
from twostroke.exec.local import RunnerSizes
from twostroke.plan.roofline_cost import RooflineCost
from twostroke.spec.device import ARITHMETIC, DeviceSpec
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import add_totals, get_model_work
from twostroke.weights.load import OpenModel

# A machine slower than any this runs on, for each thread; on it a step is predicted, and then has
# ten times as long and ten seconds more. A stopped process is found out otherwise, and at once:
# what is left are deadlocks, and nobody whose machine swaps shall lose a step.
_SLOW_BYTES_S, _SLOW_OPERATIONS_S = 1e9, 2e9
_MARGIN, _LEAST_NS = 10, 10 * 10**9


@dataclass(frozen=True, slots=True)
class Isolated:
    """An executor in a process of its own, and the policy of a loop that replaces it."""

    executor: Executor
    policy: LoopPolicy


def isolate_executor(model: OpenModel, sizes: RunnerSizes, packed: Path) -> Isolated:
    """Start a child that runs `model` on the CPU, and wait until it can take steps.

    packed: the folder where packed weights are kept. Raises DeviceError, and the ModelError that
    the child met; nothing is left running then.
    """
    deadline = make_deadline(model.spec, sizes)
    supervisor = ChildSupervisor(
        describe_child(model, sizes, packed), measure_memory(model, sizes), deadline
    )
    executor = supervisor.open()
    policy = LoopPolicy(replace_executor=supervisor.replace, on_closed=supervisor.close)
    return Isolated(executor, policy)


def make_deadline(spec: ModelSpec, sizes: RunnerSizes) -> Deadline:
    """How long a step may take before its executor is taken to hang, in nanoseconds."""
    rates = tuple((name, _SLOW_OPERATIONS_S * sizes.threads) for name in ARITHMETIC)
    slow = DeviceSpec("slow", _SLOW_BYTES_S * sizes.threads, rates, sizes.threads, 0)
    work = get_model_work(spec, sizes.kv_element)
    cost = RooflineCost(spec, slow, 1, CPU, work)

    def get_deadline_ns(plan: StepPlan) -> int:
        rows = (
            cost.get_row_totals(len(row.tokens), row.start, row.drafts + 1 + len(row.scored))
            for row in plan.rows
        )
        return _LEAST_NS + _MARGIN * plan.iterations * cost.predict_ns(reduce(add_totals, rows))

    return get_deadline_ns
