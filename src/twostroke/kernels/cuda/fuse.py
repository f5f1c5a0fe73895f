"""Joins recorded calls into those that are launched: fewer launches, fewer trips to memory.

Pure functions from calls to calls; nothing is reordered but what joins. Always joined: products of
the same rows with parts of one matrix; norms of heads, rotation and storing; a sum and the norm of
it. Where rows are few, a product also takes in the gate or the sum behind it, a dense one the norm
before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from twostroke.errors import UnsupportedModel
from twostroke.kernels.cuda.calls import (
    Add,
    AddNorm,
    Attend,
    Call,
    Gated,
    Norm,
    Product,
    Rope,
    RopeWrite,
    Value,
    WriteKv,
    get_reads,
    get_writes,
)
from twostroke.kernels.cuda.types import DenseMatrix


def join_calls(calls: Sequence[Call], few_rows: bool) -> list[Call]:
    """The launches of a recorded list of calls; see the module text."""
    joined = _join_ropes(_join_products(calls))
    if few_rows:
        joined = _take_in_gates(joined)
        joined = _take_in_residuals(joined)
        return _take_in_norms(joined)
    return _join_sums(joined)


def _count_uses(calls: Sequence[Call]) -> Counter[Value]:
    return Counter(value for call in calls for value in get_reads(call))


def _join_products(calls: Sequence[Call]) -> list[Call]:
    """Neighbours that multiply the same x with consecutive parts of one matrix become one."""
    joined: list[Call] = []
    for call in calls:
        last = joined[-1] if joined else None
        if (
            isinstance(call, Product)
            and isinstance(last, Product)
            and call.matrix is last.matrix
            and call.x == last.x
            and call.first == last.last
        ):
            joined[-1] = replace(last, outs=last.outs + call.outs, last=call.last)
        else:
            joined.append(call)
    for call in joined:
        if isinstance(call, Product) and (call.first, call.last) != (0, call.matrix.outputs):
            raise UnsupportedModel(
                f"outputs {call.first} to {call.last} of a merged matrix of {call.matrix.outputs} "
                "are multiplied apart from the rest"
            )
    return joined


def _join_ropes(calls: Sequence[Call]) -> list[Call]:
    """q's and k's norms, their rotations and the storing of k and v become one call."""
    makers = {value: call for call in calls for value in get_writes(call)}
    dropped: set[int] = set()
    replaced: dict[int, RopeWrite] = {}
    writes = [call for call in calls if isinstance(call, WriteKv)]
    queries = {call.layer: call.q for call in calls if isinstance(call, Attend)}
    for write in writes:
        out = queries[write.layer]
        (q, q_norm, rope), q_calls = _trace_rotated(makers, out)
        (k, k_norm, _), k_calls = _trace_rotated(makers, write.k)
        norm = q_norm or k_norm
        replaced[id(write)] = RopeWrite(
            out,
            (q, k, write.v),
            write.layer,
            rope.table,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if norm is None else norm.eps,
        )
        dropped |= {id(call) for call in (*q_calls, *k_calls)}
    return [replaced.get(id(call), call) for call in calls if id(call) not in dropped]


def _trace_rotated(
    makers: dict[Value, Call], value: Value
) -> tuple[tuple[Value, Norm | None, Rope], list[Call]]:
    """What a rotated value was made of: the product's value, its norm if any, and the rotation."""
    rope = makers[value]
    assert isinstance(rope, Rope), rope
    before = makers[rope.x]
    if isinstance(before, Norm):
        return (before.x, before, rope), [before, rope]
    return (rope.x, None, rope), [rope]


def _take_in_gates(calls: Sequence[Call]) -> list[Call]:
    """A product of gate and up, and their gate, become one product."""
    joined: list[Call] = []
    for call in calls:
        last = joined[-1] if joined else None
        if (
            isinstance(call, Gated)
            and isinstance(last, Product)
            and last.outs == (call.gate, call.up)
        ):
            joined[-1] = replace(last, outs=(call.out,), gate=call.activation)
        else:
            joined.append(call)
    return joined


def _take_in_residuals(calls: Sequence[Call]) -> list[Call]:
    """A product and the sum right behind it become one product."""
    joined: list[Call] = []
    uses = _count_uses(calls)
    for call in calls:
        last = joined[-1] if joined else None
        if (
            isinstance(call, Add)
            and isinstance(last, Product)
            and last.outs == (call.y,)
            and uses[call.y] == 1
            and not last.gate
        ):
            joined[-1] = replace(last, outs=(call.out,), residual=call.x)
        else:
            joined.append(call)
    return joined


def _take_in_norms(calls: Sequence[Call]) -> list[Call]:
    """A norm whose result only a dense product right behind it reads becomes part of it.

    Quantised products spend their time on instructions, and programs would each repeat the norm's.
    """
    joined: list[Call] = []
    uses = _count_uses(calls)
    for call in calls:
        last = joined[-1] if joined else None
        if (
            isinstance(call, Product)
            and isinstance(call.matrix, DenseMatrix)
            and isinstance(last, Norm)
            and call.x == last.out
            and uses[last.out] == 1
            and last.weight.numel() == call.matrix.inputs
        ):
            joined[-1] = replace(call, x=last.x, norm=last.weight, eps=last.eps)
        else:
            joined.append(call)
    return joined


def _join_sums(calls: Sequence[Call]) -> list[Call]:
    """A sum and the norm right behind it become one call."""
    joined: list[Call] = []
    for call in calls:
        last = joined[-1] if joined else None
        if isinstance(call, Norm) and isinstance(last, Add) and call.x == last.out:
            joined[-1] = AddNorm(last.out, call.out, last.x, last.y, call.weight, call.eps)
        else:
            joined.append(call)
    return joined
