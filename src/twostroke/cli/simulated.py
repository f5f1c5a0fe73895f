"""The simulated hardware: from names to replicas, every automatic choice with its reason.

Owns what a name may be (a built-in model in some format, a device and its kind of engine), how
much of the devices' memory the KV pool gets, and what is refused: a model that does not fit, with
the fewest devices that would do; a target that no step can keep, with the smallest that could be.
Needs no model file and computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from twostroke.cli.options import SchedulingOptions
from twostroke.cli.question_options import SimulatedMachineOptions
from twostroke.cli.scheduling import choose_policy
from twostroke.cli.settings import Choice, check_name, format_bytes, parse_bytes
from twostroke.core.ports import ExecutorInfo
from twostroke.core.types import SchedulerConfig
from twostroke.errors import InvalidParameter
from twostroke.plan.roofline_cost import CAPTURED, EAGER, OURS, Overheads, RooflineCost
from twostroke.policies.names import build_policies
from twostroke.policies.watermark import choose_watermark
from twostroke.sim.replica import ReplicaSpec
from twostroke.sim.routers import ROUTERS
from twostroke.spec.catalog import get_known_model, list_known_models
from twostroke.spec.device import DeviceSpec, get_known_device, list_known_devices
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec, ShardAxis
from twostroke.spec.ranks import split_layers
from twostroke.spec.sharded_work import Sharding, get_rank_weight_bytes
from twostroke.spec.work import get_model_work

KV_ELEMENTS = tuple(each.value for each in KvElement)
STEP_TOKENS = 2048
MAX_ROWS = 256
MAX_REPLICAS = 100_000
# Of each device's memory: activations of a step, the runtime and its kernels, fragments.
KEPT_BACK = 0.10
# Longer strides save nothing more: a plan is then a small part of what its steps cost.
MAX_ITERATIONS = 1024
ENGINES: Mapping[str, tuple[Overheads, str]] = {
    "eager": (EAGER, "overheads fitted to published runs of an engine of 2023"),
    "captured": (CAPTURED, "assumed overheads of an engine that replays captured kernels"),
    "twostroke": (OURS, "overheads of this engine, fitted to its steps on an H100"),
}


@dataclass(frozen=True, slots=True)
class Hardware:
    """One replica's model on its devices. num_blocks: of KV, all devices together."""

    spec: ModelSpec
    device: DeviceSpec
    engine: str
    tp: int
    cost: RooflineCost
    num_blocks: int
    block_tokens: int
    block_bytes: int
    choices: tuple[Choice, ...]


def resolve_hardware(options: SimulatedMachineOptions) -> Hardware:
    """Find model and device by name, and see that one fits the other.

    Raises InvalidParameter, or DeviceError for a device file that is wrong.
    """
    spec = find_model(options.model)
    device, engine = find_device(options.device)
    tp = _check_sharing(spec, device, options.tp)
    element = KvElement(check_name("kv", options.kv or KvElement.F16.value, KV_ELEMENTS))
    cost = RooflineCost(spec, device, tp, ENGINES[engine][0], get_model_work(spec, element))
    block_bytes = options.block_tokens * spec.get_kv_bytes_per_token(element)
    num_blocks, pool_reason = _size_pool(options, spec, device, block_bytes)
    weights = format_bytes(spec.weight_bytes)
    pool_tokens = num_blocks * options.block_tokens
    pool = f"{format_bytes(num_blocks * block_bytes)} = {pool_tokens:,} tokens"
    longest, longest_reason = spec.context_tokens, "the model's context"
    if pool_tokens < longest:
        longest_reason = f"the KV pool; the model's context of {longest:,} does not fit"
        longest = pool_tokens
    on_tp = f"on {tp} devices" if tp > 1 else "on one device"
    return Hardware(
        spec=spec,
        device=device,
        engine=engine,
        tp=tp,
        cost=cost,
        num_blocks=num_blocks,
        block_tokens=options.block_tokens,
        block_bytes=block_bytes,
        choices=(
            Choice("model", f"{spec.name}, {weights} {on_tp}", "as asked"),
            Choice("device", f"{device.name}, {engine}", ENGINES[engine][1]),
            Choice("keys and values", element.value, _say(options.kv)),
            Choice("KV pool", f"{pool} a replica", pool_reason),
            Choice("longest request", f"{longest:,} tokens", longest_reason),
        ),
    )


def build_replica(
    hardware: Hardware,
    options: SimulatedMachineOptions,
    scheduling: SchedulingOptions,
    has_prefixes: bool,
) -> tuple[ReplicaSpec, tuple[Choice, ...]]:
    """What each replica is made of, and the choices made about it. Raises InvalidParameter."""
    spec, asked = hardware.spec, "as asked"
    if not 1 <= options.replicas <= MAX_REPLICAS:
        raise InvalidParameter("replicas", f"must be from 1 to {MAX_REPLICAS:,}")
    step_tokens = _pick("step_tokens", options.step_tokens, STEP_TOKENS)
    max_rows = _pick("max_rows", options.max_rows, min(MAX_ROWS, step_tokens))
    if max_rows > step_tokens:
        raise InvalidParameter("max_rows", f"must be at most the {step_tokens:,} step_tokens")
    config = SchedulerConfig(
        num_blocks=hardware.num_blocks,
        block_tokens=hardware.block_tokens,
        step_tokens=step_tokens,
        max_rows=max_rows,
        context_tokens=spec.context_tokens,
        vocab_size=spec.vocab_size,
        watermark_blocks=choose_watermark(hardware.num_blocks, max_rows),
        cache_seed=spec.name if has_prefixes else "",
    )
    policy = choose_policy(scheduling.policy, scheduling.pace, scheduling.itl_target_ms)
    make_policies = partial(
        build_policies,
        policy,
        step_tokens=step_tokens,
        block_bytes=hardware.block_bytes,
        cost=hardware.cost,
    )
    make_policies()  # a mistake is told now, and not by the first replica
    info = ExecutorInfo(
        device=hardware.device.name,
        backend="simulated",
        threads=0,
        num_blocks=hardware.num_blocks,
        block_tokens=hardware.block_tokens,
        kv_bytes=hardware.num_blocks * hardware.block_bytes,
        weight_bytes=spec.weight_bytes,
        max_step_tokens=step_tokens,
    )
    pace_reason = asked if scheduling.pace else "a target between tokens is given"
    if policy.pace == "fixed" and scheduling.pace is None:
        pace_reason = "no target between tokens is given"
    cache_reason = "prompts share beginnings" if has_prefixes else "no prompts share a beginning"
    router = check_name("router", options.router, ROUTERS)
    choices = (
        Choice("replicas", f"{options.replicas:,}, {router}", asked),
        Choice("policy", policy.order, asked),
        Choice("pace", policy.pace, pace_reason),
        Choice("step budget", f"{step_tokens:,} tokens", _say(options.step_tokens)),
        Choice("rows in a step", f"{max_rows:,}", _say(options.max_rows)),
        Choice("prefix cache", "on" if has_prefixes else "off", cache_reason),
        Choice(
            "watermark",
            f"{config.watermark_blocks:,} blocks",
            "left free by newcomers: fewer preemptions",
        ),
    )
    replica = ReplicaSpec(
        scheduler=config,
        info=info,
        cost=hardware.cost,
        make_policies=make_policies,
        max_iterations=MAX_ITERATIONS,
    )
    return replica, choices


def get_least_ttft_ns(cost: RooflineCost, prompt_tokens: int, step_tokens: int) -> int:
    """The predicted time of a prompt's steps when it is alone and nothing of it is cached."""
    total_ns = 0
    for start in range(0, prompt_tokens, step_tokens):
        tokens = min(step_tokens, prompt_tokens - start)
        sampled = int(start + tokens == prompt_tokens)
        total_ns += cost.predict_ns(cost.get_row_totals(tokens, start, sampled))
    return total_ns


def find_model(text: str | None) -> ModelSpec:
    """A built-in model, in another format behind a colon. Raises InvalidParameter."""
    known = list_known_models()
    if text is None:
        raise InvalidParameter("model", f"give one with --model: {', '.join(known)}")
    name, _, weight_format = text.partition(":")
    return get_known_model(check_name("model", name, known), weight_format or "bf16")


def find_device(text: str | None) -> tuple[DeviceSpec, str]:
    """The device and which of ENGINES runs on it."""
    known = list_known_devices()
    if text is None:
        raise InvalidParameter("device", f"give one with --device: {', '.join(known)}")
    name, colon, engine = text.rpartition(":")
    if not colon:
        name, engine = text, "eager"
    engine = check_name("device", engine, tuple(ENGINES))
    if not name.endswith(".toml"):
        name = check_name("device", name.lower(), known)
    return get_known_device(name), engine


def _check_sharing(spec: ModelSpec, device: DeviceSpec, tp: int) -> int:
    """`tp` where so many devices can share the model and hold it."""
    possible = [n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0]
    if device.link_bandwidth == 0:
        possible = [1]
    fitting = [n for n in possible if _get_free_bytes(spec, device, n) > 0]
    if tp not in possible:
        which = ", ".join(map(str, possible))
        why = f"{spec.num_heads} heads" if device.link_bandwidth else "devices without a link"
        raise InvalidParameter("tp", f"{spec.name} on {device.name} has {why}: it can be {which}")
    if tp in fitting:
        return tp
    held, memory = format_bytes(_get_weight_bytes(spec, tp)), format_bytes(device.memory_bytes)
    hint = f"--tp {fitting[0]} is the least that fits" if fitting else "no number of them would do"
    if spec.weight_bytes > 1.5 * spec.num_weights:
        hint += f"; or take a smaller format such as {spec.name}:q8_0"
    raise InvalidParameter(
        "tp",
        f"{spec.name} takes {held} on each of {tp} {device.name}, which has {memory} less "
        f"{KEPT_BACK:.0%}: {hint}",
    )


def _size_pool(
    options: SimulatedMachineOptions, spec: ModelSpec, device: DeviceSpec, block_bytes: int
) -> tuple[int, str]:
    """Blocks of a replica's KV pool, and why so many."""
    tp = options.tp
    room = get_pool_bytes(spec, device, tp)
    reason = f"what weights leave of {tp} × {format_bytes(device.memory_bytes)}"
    reason += f" less {KEPT_BACK:.0%} for activations and the runtime"
    if options.kv_memory is not None:
        asked = parse_bytes(options.kv_memory)
        if asked > room:
            raise InvalidParameter(
                "kv_memory",
                f"must be at most {format_bytes(room)}: {reason}; not {options.kv_memory}",
            )
        room, reason = asked, "as asked"
    if room < block_bytes:
        raise InvalidParameter(
            "kv_memory", f"must hold one block of {block_bytes:,} bytes, not {room:,}"
        )
    return room // block_bytes, reason


def get_pool_bytes(spec: ModelSpec, device: DeviceSpec, tp: int, stages: int = 1) -> int:
    """KV that `tp` devices hold beside the weights, every token's counted once; may be negative.

    stages: so many times `tp` devices, of which the fullest stage bounds all.
    """
    # Beyond one head a device, heads are held several times.
    held = -(-spec.num_kv_heads // tp) * tp / spec.num_kv_heads
    if stages == 1:
        return int(_get_free_bytes(spec, device, tp) * tp / held)
    weights = get_rank_weight_bytes(spec, Sharding(tp, stages))
    free = int(device.memory_bytes * (1 - KEPT_BACK)) - weights
    share = max(map(len, split_layers(spec, stages))) / spec.num_layers
    return int(free * tp / held / share)


def _get_free_bytes(spec: ModelSpec, device: DeviceSpec, tp: int) -> int:
    """Memory of one device that neither weights nor what is kept back take; may be negative."""
    return int(device.memory_bytes * (1 - KEPT_BACK)) - _get_weight_bytes(spec, tp)


def _get_weight_bytes(spec: ModelSpec, tp: int) -> int:
    """Weights that one of `tp` devices holds: its share, and those that are not divided."""
    return sum(
        tensor.bytes if tensor.shard is ShardAxis.NONE else -(-tensor.bytes // tp)
        for tensor in spec.tensors()
    )


def _pick(name: str, wanted: int | None, default: int) -> int:
    if wanted is None:
        return default
    if not 1 <= wanted <= 2**20:
        raise InvalidParameter(name, f"must be from 1 to {2**20:,}, not {wanted}")
    return wanted


def _say(wanted: object) -> str:
    return "default" if wanted is None else "as asked"
