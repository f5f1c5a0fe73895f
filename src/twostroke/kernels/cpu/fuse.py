"""Joins recorded calls that are faster as one, without changing what they compute.

So far one joint: the middle of a gated layer, where two products of the same rows, their gate and
the quantising of the result become one call that never writes the wide rows out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twostroke.kernels.cpu.weights import PackedMatrix
from twostroke.kernels.ops import F32

BLOCK = 32  # values a block of quantised rows

Emit = Callable[[Any, list[int], bool], None]


@dataclass(frozen=True, slots=True)
class Product:
    """What a linear call multiplies with."""

    weight: PackedMatrix
    bias: F32


@dataclass(frozen=True, slots=True)
class Gate:
    """What a gated call does: GELU by its tanh form, or SiLU."""

    gelu: bool


@dataclass(frozen=True, slots=True)
class Quantise:
    """A call that quantises rows."""


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded op: the slots it reads and writes, and how to emit it.

    `by_row`: every row of the result depends on that row of what is read alone, and threads divide
    it by rows. `kv`: the layer whose KV it reads or writes (sign tells: ~layer writes), None for
    neither. `kind`: what it is, where joining needs to know.
    """

    emit: Emit
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    by_row: bool
    head: bool
    kv: int | None = None
    kind: Product | Gate | Quantise | None = None


def join_calls(calls: Sequence[Call]) -> list[Call]:
    """The same calls with every gated middle joined; the order stays."""
    readers = Counter(slot for call in calls for slot in call.reads)
    joined: list[Call] = []
    index = 0
    while index < len(calls):
        four = calls[index : index + 4]
        if _is_gated_middle(four, readers):
            joined.append(_join_gated(four))
            index += 4
        else:
            joined.append(calls[index])
            index += 1
    return joined


def _is_gated_middle(calls: Sequence[Call], readers: Counter[int]) -> bool:
    """True for gate product, up product, gate, quantise, whose results nobody else reads."""
    if len(calls) < 4:
        return False
    gate, up, gated, quantise = calls
    if not (isinstance(gate.kind, Product) and isinstance(up.kind, Product)):
        return False
    if not (isinstance(gated.kind, Gate) and isinstance(quantise.kind, Quantise)):
        return False
    inner = (*gate.writes, *up.writes, *gated.writes)
    return (
        gate.reads == up.reads
        and gated.reads == (*gate.writes, *up.writes)
        and quantise.reads == gated.writes
        and all(readers[slot] == 1 for slot in inner)
        and gate.kind.weight.is_quantised
        and up.kind.weight.is_quantised
        and gate.kind.weight.outputs % BLOCK == 0
    )


def _join_gated(calls: Sequence[Call]) -> Call:
    gate, up, gated, quantise = calls
    assert isinstance(gate.kind, Product)
    assert isinstance(up.kind, Product)
    assert isinstance(gated.kind, Gate)
    first, second, gelu = gate.kind, up.kind, gated.kind.gelu
    name = f"{first.weight.kind}+{second.weight.kind}"
    return Call(
        lambda p, at, wait: p.gated_linear(
            first.weight.native,
            second.weight.native,
            *at,
            first.bias,
            second.bias,
            gelu,
            wait,
            name,
        ),
        gate.reads,
        quantise.writes,
        by_row=False,
        head=gate.head,
    )
