"""Settings: from what a user asked for to one frozen value that says why.

It owns the defaults, the ranges and the automatic choices of the engine: threads, the KV pool's
size, the step's token budget, the rows of a batch. They are resolved once, after the model's
description is known; every automatic choice carries its reason, and nothing changes afterwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypedDict

from twostroke.cli.kv_accuracy import describe_int8
from twostroke.cli.machine import Machine
from twostroke.errors import InvalidParameter
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec

BACKENDS = ("cpu", "reference")
# The native kernels walk keys sixteen at a time, one vector register wide.
BLOCK_TOKENS = 16
STEP_TOKENS = 512
MAX_ROWS = 64
# The share of available memory that the KV pool may take unasked; the rest is for the weights'
# pages, for other programs, and for a second engine.
KV_MEMORY_SHARE = 4
KV_ELEMENTS = {"cpu": KvElement.F16, "reference": KvElement.F32}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a user asked for; None leaves the choice to the engine.

    model: name, path or org/name. kv: how keys and values are stored, "f16", "int8" or "f32".
    kv_memory: bytes, or text such as "512MiB". step_tokens: token budget of one step. max_rows:
    most sequences in one step. has_chat: False leaves the chat template alone, for those who send
    plain prompts only.
    """

    model: str
    backend: str = "cpu"
    threads: int | None = None
    kv: str | None = None
    kv_memory: int | str | None = None
    step_tokens: int | None = None
    max_rows: int | None = None
    has_chat: bool = True


class LLMOptions(TypedDict, total=False):
    """What `LLM` takes beside the model: fields of EngineSettings."""

    backend: str
    threads: int | None
    kv: str | None
    kv_memory: int | str | None
    step_tokens: int | None
    max_rows: int | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One resolved setting, as it is printed: its name, its value and the reason."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """What the engine runs with. kv_bytes is the pool's size; choices explain the values."""

    backend: str
    threads: int
    kv_element: KvElement
    num_blocks: int
    block_tokens: int
    step_tokens: int
    max_rows: int
    kv_bytes: int
    choices: tuple[Choice, ...]


def resolve_settings(wanted: EngineSettings, spec: ModelSpec, machine: Machine) -> ResolvedSettings:
    """Settle every setting for a model on a machine.

    Raises InvalidParameter for a value out of range, or a KV memory too small for one block.
    """
    if wanted.backend not in BACKENDS:
        raise InvalidParameter(
            "backend", f"must be one of {', '.join(BACKENDS)}, not {wanted.backend!r}"
        )
    threads, threads_reason = machine.cores, machine.cores_reason
    if wanted.threads is not None:
        threads, threads_reason = _check_count("threads", wanted.threads, 1024), "as asked"
    budget, budget_reason = _pick("step_tokens", wanted.step_tokens, STEP_TOKENS, 2**20)
    # More rows than tokens in a step would let some decodes wait for others.
    rows, rows_reason = _pick("max_rows", wanted.max_rows, min(MAX_ROWS, budget), budget)
    element, element_reason = _pick_element(wanted, spec)
    block_bytes = BLOCK_TOKENS * spec.get_kv_bytes_per_token(element)
    blocks, pool_reason = _size_pool(wanted, spec, machine, rows, block_bytes)
    pool = f"{format_bytes(blocks * block_bytes)} = {blocks * BLOCK_TOKENS:,} tokens"
    return ResolvedSettings(
        backend=wanted.backend,
        threads=threads,
        kv_element=element,
        num_blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        step_tokens=budget,
        max_rows=rows,
        kv_bytes=blocks * block_bytes,
        choices=(
            Choice("threads", str(threads), threads_reason),
            Choice("KV element", element.value, element_reason),
            Choice("KV pool", pool, pool_reason),
            Choice("step budget", f"{budget} tokens", budget_reason),
            Choice("rows in a step", str(rows), rows_reason),
        ),
    )


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "300000000", "512MiB" or "1.5G"; units are powers of 1024.

    Raises InvalidParameter.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidParameter("kv_memory", f"must be a size such as 512MiB or 2GiB, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: int) -> str:
    """A size for people: three digits and a unit of 1024."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count} B"


def _size_pool(
    wanted: EngineSettings, spec: ModelSpec, machine: Machine, rows: int, block_bytes: int
) -> tuple[int, str]:
    """Blocks of the KV pool and why."""
    context_blocks = -(-spec.context_tokens // BLOCK_TOKENS)
    if wanted.kv_memory is not None:
        asked = wanted.kv_memory
        kv_bytes = parse_bytes(asked) if isinstance(asked, str) else asked
        if kv_bytes < block_bytes:
            raise InvalidParameter(
                "kv_memory", f"must hold one block of {block_bytes:,} bytes, not {kv_bytes:,}"
            )
        return kv_bytes // block_bytes, "as asked"
    needed = rows * context_blocks
    share = machine.available_bytes // KV_MEMORY_SHARE
    if needed * block_bytes <= share:
        whole = f"{spec.context_tokens:,}-token context"
        return needed, f"the {whole}" if rows == 1 else f"{rows} rows of the {whole}"
    left = f"a quarter of the {format_bytes(machine.available_bytes)}"
    return max(1, share // block_bytes), f"{left} of {machine.memory_reason}"


def _pick_element(wanted: EngineSettings, spec: ModelSpec) -> tuple[KvElement, str]:
    """How keys and values are stored and why."""
    default = KV_ELEMENTS[wanted.backend]
    if wanted.kv is None:
        return default, "default"
    for element in KvElement:
        if element.value == wanted.kv:
            cost = f": {describe_int8(spec)}" if element is KvElement.INT8 else ""
            return element, f"as asked{cost}"
    names = ", ".join(element.value for element in KvElement)
    raise InvalidParameter("kv", f"must be one of {names}, not {wanted.kv!r}")


def _pick(name: str, wanted: int | None, default: int, most: int) -> tuple[int, str]:
    if wanted is None:
        return default, "default"
    return _check_count(name, wanted, most), "as asked"


def _check_count(name: str, value: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidParameter(name, f"must be a whole number from 1 to {most:,}, not {value!r}")
    return value
