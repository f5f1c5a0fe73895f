"""How an engine schedules: from what a user asked for to policies and the scheduler's config.

It owns the defaults of scheduling and their reasons: prefixes are shared, newcomers leave a
watermark of free blocks, steps are filled unless a target between tokens is given. What policies
and targets may be is the same for engines that are simulated. Step times are predicted only where a
choice needs them, because measuring a machine's limits takes a third of a second.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from twostroke.cli.settings import (
    Choice,
    EngineSettings,
    ResolvedSettings,
    check_name,
    format_bytes,
)
from twostroke.core.policy import Policies
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import SchedulerConfig
from twostroke.errors import InvalidParameter
from twostroke.policies.names import ORDERS, PACES, PolicyChoice, build_policies
from twostroke.policies.target import get_least_itl_ns
from twostroke.policies.watermark import choose_watermark
from twostroke.spec.cost import StepCost
from twostroke.spec.model import ModelSpec

MAX_TARGET_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Scheduling:
    """A scheduler that was made, and why it is so.

    ttft_ns: target for the first token of every request; 0 for none.
    """

    scheduler: Scheduler
    ttft_ns: int
    choices: tuple[Choice, ...]


def read_scheduling(wanted: EngineSettings, settings: ResolvedSettings) -> tuple[PolicyChoice, int]:
    """What is chosen, and the target for a first token in nanoseconds, 0 for none.

    Needs no engine, so that a mistake is told before one is built. Raises InvalidParameter for a
    policy or pace that does not exist, or that needs step times where nobody predicts them.
    """
    choice = choose_policy(wanted.policy, wanted.pace, wanted.itl_target_ms)
    ttft_ns = read_target("ttft_target_ms", wanted.ttft_target_ms)
    itl_ns = read_target("itl_target_ms", wanted.itl_target_ms)
    if settings.is_on_gpu and _needs_cost(choice):
        raise _refuse_prediction(wanted, choice)
    return replace(choice, itl_ns=itl_ns, drafts=bool(wanted.drafts)), ttft_ns


def build_scheduling(
    wanted: EngineSettings, settings: ResolvedSettings, spec: ModelSpec
) -> Scheduling:
    """Make the scheduler that `wanted` asks for, over the KV pool of `settings`.

    Raises InvalidParameter as `read_scheduling` does, and for a target that cannot be kept.
    """
    choice, ttft_ns = read_scheduling(wanted, settings)
    config = _build_config(settings, spec)
    cost = None
    if not settings.is_on_gpu and (_needs_cost(choice) or config.host_blocks):
        from twostroke.cli.step_cost import find_step_cost

        cost = find_step_cost(spec, settings)
        check_target("itl_target_ms", choice.itl_ns, get_least_itl_ns(cost), "one decode alone")
    policies = _build_policies(choice, settings, cost)
    return Scheduling(
        Scheduler(config, policies), ttft_ns, _explain(wanted, choice, config, settings)
    )


def choose_policy(order: str, pace: str | None, itl_target_ms: float | None) -> PolicyChoice:
    """Order and pace by name; a target between tokens asks for the pace that keeps it.

    Raises InvalidParameter for a name that nothing has.
    """
    if pace is None:
        pace = "fixed" if itl_target_ms is None else "target"
    return PolicyChoice(
        order=check_name("policy", order, ORDERS), pace=check_name("pace", pace, PACES)
    )


def read_target(parameter: str, target_ms: float | None) -> int:
    """A latency target in nanoseconds; 0 where there is none. Raises InvalidParameter."""
    if target_ms is None:
        return 0
    if not 0 < target_ms <= MAX_TARGET_MS:
        raise InvalidParameter(
            parameter, f"must be above 0 and at most {MAX_TARGET_MS:,} ms, not {target_ms:g}"
        )
    return max(1, round(target_ms * 1e6))


def check_target(parameter: str, target_ns: int, least_ns: int, what: str) -> None:
    """Raises InvalidParameter for a target, if there is one, that `what` alone would miss.

    least_ns: the predicted time of it.
    """
    if 0 < target_ns < least_ns:
        # Rounded up, so that what is named passes.
        raise InvalidParameter(
            parameter,
            f"{target_ns / 1e6:g} ms cannot be kept: {what} is predicted to take "
            f"{-(-least_ns // 10_000) / 100:.2f} ms",
        )


def name_model(spec: ModelSpec, settings: ResolvedSettings) -> str:
    """What KV depends on beside the tokens: the seed of prefix names."""
    facts = repr((spec, settings.backend, settings.kv_element.value, settings.weights))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _needs_cost(choice: PolicyChoice) -> bool:
    return choice.pace == "target" or choice.order == "deadline"


def _build_config(settings: ResolvedSettings, spec: ModelSpec) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=settings.num_blocks,
        block_tokens=settings.block_tokens,
        step_tokens=settings.step_tokens,
        max_rows=settings.max_rows,
        context_tokens=spec.context_tokens,
        vocab_size=spec.vocab_size,
        host_blocks=settings.host_blocks,
        watermark_blocks=choose_watermark(settings.num_blocks, settings.max_rows),
        cache_seed=name_model(spec, settings),
        plans_ahead=settings.is_on_gpu,
    )


def _refuse_prediction(wanted: EngineSettings, choice: PolicyChoice) -> InvalidParameter:
    """The error for what needs the times of a GPU's steps, by the name of who asked for it."""
    name, value = "policy", choice.order
    if choice.pace == "target":
        name, value = ("itl_target_ms" if wanted.pace is None else "pace"), choice.pace
    why = "needs predicted step times, and a GPU's steps are not predicted yet; leave it out"
    return InvalidParameter(name, f"{value!r} {why}")


def _build_policies(
    choice: PolicyChoice, settings: ResolvedSettings, cost: StepCost | None
) -> Policies:
    block_bytes = settings.kv_bytes // settings.num_blocks if settings.host_blocks else 0
    return build_policies(
        choice, step_tokens=settings.step_tokens, block_bytes=block_bytes, cost=cost
    )


def _explain(
    wanted: EngineSettings,
    choice: PolicyChoice,
    config: SchedulerConfig,
    settings: ResolvedSettings,
) -> tuple[Choice, ...]:
    default = EngineSettings(model="")
    pace_reason = "default"
    if wanted.pace is not None:
        pace_reason = "as asked"
    elif choice.pace == "target":
        pace_reason = f"{wanted.itl_target_ms:g} ms between tokens are asked for"
    choices = [
        Choice(
            "policy", choice.order, "default" if wanted.policy == default.policy else "as asked"
        ),
        Choice("pace", choice.pace, pace_reason),
        Choice("prefix cache", "on", "tokens do not change, and it takes blocks that are free"),
    ]
    if config.watermark_blocks and config.max_rows > 1:
        free = f"{config.watermark_blocks:,} blocks"
        choices.append(Choice("watermark", free, "left free by newcomers: fewer preemptions"))
    if choice.drafts:
        choices.append(Choice("drafts", "by prompt lookup", "as asked"))
    if config.host_blocks:
        host = format_bytes(config.host_blocks * (settings.kv_bytes // settings.num_blocks))
        choices.append(Choice("host memory", host, "as asked, for preempted sequences"))
    return tuple(choices)
