"""Settings: from what a user asked for to one frozen value that says why.

It owns the defaults, the ranges and the automatic choices of the engine: the device, threads, the
KV pool's size, the step's token budget, the rows of a batch. They are resolved once, after the
model's description is known; every automatic choice carries its reason, and nothing changes
afterwards. Only a GPU's KV pool is settled later, when what is free beside the weights is known.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from twostroke.cli.device import resolve_device
from twostroke.cli.kv_accuracy import describe_int8
from twostroke.cli.machine import Machine
from twostroke.cli.options import MachineOptions
from twostroke.errors import InvalidParameter
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec

BACKENDS = ("cpu", "reference")
# The native kernels walk keys sixteen at a time, one vector register wide.
BLOCK_TOKENS = 16
# The GPU's kernels take a tile of keys from one piece of memory.
CUDA_BLOCK_TOKENS = 64
STEP_TOKENS = {"cpu": 512, "reference": 512, "cuda": 2048}
MAX_ROWS = {"cpu": 64, "reference": 64, "cuda": 256}
# The share of available memory that the KV pool may take unasked; the rest is for the weights'
# pages, for other programs, and for a second engine.
KV_MEMORY_SHARE = 4
# What each backend keeps, its default first; a GPU's is the type of its activations.
KV_ELEMENTS = {
    "cpu": (KvElement.F16, KvElement.F32, KvElement.INT8),
    "reference": (KvElement.F32, KvElement.F16, KvElement.INT8),
    "cuda": tuple(KvElement),
}
WEIGHTS = ("int8", "int4")

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a user asked for; None leaves the choice to the engine.

    model: name, path or org/name. device: "auto", "cpu", "cuda" or "cuda:n". backend: "cpu" or
    "reference", both of the CPU. exact: on a GPU, a request's tokens do not depend on the others;
    on the CPU they never do. kv: how keys and values are stored, one of KV_ELEMENTS. kv_memory:
    bytes, or text such as "512MiB". weights: "int8" or "int4" makes weights of floats so small on a
    GPU. step_tokens: token budget of one step. max_rows: most sequences in one step. policy, pace:
    who goes first, and how much of the prompts a step takes (policies/names.py). ttft_target_ms,
    itl_target_ms: longest times to the first token and between tokens. drafts: guess tokens by
    prompt lookup. host_memory: bytes or text, beside the pool, for preempted sequences. has_chat:
    False leaves the chat template alone, for those who send plain prompts only.
    """

    model: str
    device: str = "auto"
    backend: str | None = None
    exact: bool = False
    threads: int | None = None
    kv: str | None = None
    kv_memory: int | str | None = None
    weights: str | None = None
    step_tokens: int | None = None
    max_rows: int | None = None
    policy: str = "first-come"
    pace: str | None = None
    ttft_target_ms: float | None = None
    itl_target_ms: float | None = None
    drafts: bool | None = None
    host_memory: int | str | None = None
    has_chat: bool = True


class MachineSettings(TypedDict, total=False):
    """Fields of EngineSettings that say on what the engine runs."""

    device: str
    backend: str | None
    exact: bool
    threads: int | None
    kv: str | None
    weights: str | None


class LLMOptions(MachineSettings, total=False):
    """What `LLM` takes beside the model: fields of EngineSettings."""

    kv_memory: int | str | None
    step_tokens: int | None
    max_rows: int | None
    policy: str
    pace: str | None
    ttft_target_ms: float | None
    itl_target_ms: float | None
    drafts: bool | None
    host_memory: int | str | None


def keep_on_cpu(on: MachineOptions) -> MachineOptions:
    """The options for what only the CPU's engine can do. Raises InvalidParameter for a GPU."""
    if on.device not in ("auto", "cpu"):
        raise InvalidParameter(
            "device", f"only cpu is measured so, not {on.device!r}; use --device cpu"
        )
    return replace(on, device="cpu")


def get_machine_settings(on: MachineOptions) -> MachineSettings:
    """What a command line says of the machine, as settings."""
    return {
        "device": on.device,
        "backend": on.backend,
        "exact": on.exact,
        "threads": on.threads,
        "kv": on.kv,
        "weights": on.weights,
    }


@dataclass(frozen=True, slots=True)
class Choice:
    """One resolved setting, as it is printed: its name, its value and the reason."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """What the engine runs with; choices explain the values.

    device: "cpu" or "cuda:n". backend: one of BACKENDS, or "cuda". threads: 0 on a GPU. weights: ""
    where they stay as stored. kv_bytes: the pool's size. On a GPU num_blocks and kv_bytes are 0
    until `settle_pool`; asked_kv_bytes is the size that was asked for, if any. host_bytes: memory
    beside the pool for preempted sequences.
    """

    device: str
    backend: str
    exact: bool
    threads: int
    kv_element: KvElement
    weights: str
    num_blocks: int
    block_tokens: int
    step_tokens: int
    max_rows: int
    kv_bytes: int
    asked_kv_bytes: int | None
    host_bytes: int
    choices: tuple[Choice, ...]

    @property
    def is_on_gpu(self) -> bool:
        """True where the engine runs on a GPU."""
        return self.backend == "cuda"

    @property
    def host_blocks(self) -> int:
        """Blocks that host memory holds."""
        return self.host_bytes * self.num_blocks // self.kv_bytes if self.kv_bytes else 0


def resolve_settings(wanted: EngineSettings, spec: ModelSpec, machine: Machine) -> ResolvedSettings:
    """Settle every setting for a model on a machine, but the size of a GPU's KV pool.

    Raises InvalidParameter for a value out of range, or a KV memory too small for one block, and
    DeviceError for a device that cannot be had.
    """
    device, backend, placed = _pick_device(wanted, machine)
    budget, budget_reason = _pick("step_tokens", wanted.step_tokens, STEP_TOKENS[backend], 2**20)
    # More rows than tokens in a step would let some decodes wait for others.
    rows, rows_reason = _pick("max_rows", wanted.max_rows, min(MAX_ROWS[backend], budget), budget)
    element, element_reason = _pick_element(wanted, backend, spec)
    resolved = ResolvedSettings(
        device=device,
        backend=backend,
        exact=wanted.exact or backend != "cuda",
        threads=0,
        kv_element=element,
        weights=wanted.weights or "",
        num_blocks=0,
        block_tokens=CUDA_BLOCK_TOKENS if backend == "cuda" else BLOCK_TOKENS,
        step_tokens=budget,
        max_rows=rows,
        kv_bytes=0,
        asked_kv_bytes=_read_bytes("kv_memory", wanted.kv_memory),
        host_bytes=_read_bytes("host_memory", wanted.host_memory) or 0,
        choices=(
            *placed,
            Choice("KV element", element.value, element_reason),
            Choice("step budget", f"{budget} tokens", budget_reason),
            Choice("rows in a step", str(rows), rows_reason),
        ),
    )
    block_bytes = _get_block_bytes(resolved, spec)
    if resolved.asked_kv_bytes is not None and resolved.asked_kv_bytes < block_bytes:
        raise InvalidParameter(
            "kv_memory",
            f"must hold one block of {block_bytes:,} bytes, not {resolved.asked_kv_bytes:,}",
        )
    if resolved.is_on_gpu:
        return resolved
    threads, threads_reason = machine.cores, machine.cores_reason
    if wanted.threads is not None:
        threads, threads_reason = _check_count("threads", wanted.threads, 1024), "as asked"
    threading = Choice("threads", str(threads), threads_reason)
    resolved = replace(resolved, threads=threads, choices=(threading, *resolved.choices))
    return settle_pool(resolved, spec, *_size_pool(resolved, spec, machine))


def settle_pool(
    settings: ResolvedSettings, spec: ModelSpec, blocks: int, reason: str
) -> ResolvedSettings:
    """The settings with a KV pool of so many blocks, and why."""
    kv_bytes = blocks * _get_block_bytes(settings, spec)
    shown = f"{format_bytes(kv_bytes)} = {blocks * settings.block_tokens:,} tokens"
    choices = settings.choices
    place = next(index for index, each in enumerate(choices) if each.name == "KV element") + 1
    pool = Choice("KV pool", shown, reason)
    return replace(
        settings,
        num_blocks=blocks,
        kv_bytes=kv_bytes,
        choices=(*choices[:place], pool, *choices[place:]),
    )


def check_name(parameter: str, name: str, known: Sequence[str]) -> str:
    """`name` when it is known; else InvalidParameter with those that look like it first."""
    if name in known:
        return name
    begun = [each for each in known if name and each.startswith(name.lower())]
    near = begun or difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise InvalidParameter(parameter, f"there is no {name!r}; {hint}choose from {', '.join(known)}")


def parse_bytes(text: str, parameter: str = "kv_memory") -> int:
    """Bytes of a size such as "300000000", "512MiB" or "1.5G"; units are powers of 1024.

    Raises InvalidParameter, for the parameter named.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidParameter(parameter, f"must be a size such as 512MiB or 2GiB, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: int) -> str:
    """A size for people: three digits and a unit of 1024."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count} B"


def _pick_device(wanted: EngineSettings, machine: Machine) -> tuple[str, str, list[Choice]]:
    """The device, the backend, and what is to be said of them."""
    if wanted.backend is not None and wanted.backend not in BACKENDS:
        raise InvalidParameter(
            "backend", f"must be one of {', '.join(BACKENDS)}, not {wanted.backend!r}"
        )
    asked = {"backend": wanted.backend, "threads": wanted.threads}
    for_cpu = next((name for name, value in asked.items() if value is not None), "")
    device, reason = resolve_device(wanted.device, for_cpu, machine.find_gpus)
    if device == "cpu":
        if wanted.weights is not None:
            raise InvalidParameter("weights", "can be made smaller on a GPU only; leave it out")
        return device, wanted.backend or "cpu", [Choice("device", device, reason)]
    choices = [Choice("device", device, reason)]
    if wanted.weights is not None:
        if wanted.weights not in WEIGHTS:
            raise InvalidParameter(
                "weights", f"must be one of {', '.join(WEIGHTS)}, not {wanted.weights!r}"
            )
        choices.append(Choice("weights", wanted.weights, "as asked, those stored as floats"))
    exact = "tokens do not depend on other requests" if wanted.exact else "--exact makes them so"
    choices.append(Choice("exact", "yes" if wanted.exact else "no", exact))
    return device, "cuda", choices


def _read_bytes(parameter: str, asked: int | str | None) -> int | None:
    count = parse_bytes(asked, parameter) if isinstance(asked, str) else asked
    if count is not None and count < 0:
        raise InvalidParameter(parameter, f"must not be negative, like {count:,}")
    return count


def _get_block_bytes(settings: ResolvedSettings, spec: ModelSpec) -> int:
    return settings.block_tokens * spec.get_kv_bytes_per_token(settings.kv_element)


def _size_pool(settings: ResolvedSettings, spec: ModelSpec, machine: Machine) -> tuple[int, str]:
    """Blocks of the KV pool and why, on the CPU."""
    block_bytes, rows = _get_block_bytes(settings, spec), settings.max_rows
    if settings.asked_kv_bytes is not None:
        return settings.asked_kv_bytes // block_bytes, "as asked"
    needed = rows * -(-spec.context_tokens // settings.block_tokens)
    share = machine.available_bytes // KV_MEMORY_SHARE
    if needed * block_bytes <= share:
        whole = f"{spec.context_tokens:,}-token context"
        return needed, f"the {whole}" if rows == 1 else f"{rows} rows of the {whole}"
    left = f"a quarter of the {format_bytes(machine.available_bytes)}"
    return max(1, share // block_bytes), f"{left} of {machine.memory_reason}"


def _pick_element(wanted: EngineSettings, backend: str, spec: ModelSpec) -> tuple[KvElement, str]:
    """How keys and values are stored and why."""
    known = KV_ELEMENTS[backend]
    if wanted.kv is None:
        if backend != "cuda":
            return known[0], "default"
        from twostroke.exec.cuda_formats import choose_activations

        element, reason = choose_activations(spec)
        return element, f"that of the activations: {reason}"
    for element in known:
        if element.value == wanted.kv:
            cost = f": {describe_int8(spec)}" if element is KvElement.INT8 else ""
            return element, f"as asked{cost}"
    names = ", ".join(element.value for element in known)
    raise InvalidParameter("kv", f"must be one of {names}, not {wanted.kv!r}")


def _pick(name: str, wanted: int | None, default: int, most: int) -> tuple[int, str]:
    if wanted is None:
        return default, "default"
    return _check_count(name, wanted, most), "as asked"


def _check_count(name: str, value: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidParameter(name, f"must be a whole number from 1 to {most:,}, not {value!r}")
    return value
