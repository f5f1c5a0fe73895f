"""The calls that a recorded forward pass is made of, as data.

Owns what each call reads and writes, and nothing that computes. A value is the number of a result;
it has a width, and T rows in the body of a pass or L in its head. `fuse.py` joins calls, and
`program.py` gives values memory and turns calls into launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.kernels.cuda.types import Matrix, MatrixPart, Tensor

Value = int


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRope:
    """cos and sin (positions, head_dim / 2) float32, for pairs of a head's halves."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Embed:
    """out = rows of the table for the step's tokens, times scale."""

    out: Value
    table: MatrixPart
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """out = x normed over groups of the weight's length."""

    out: Value
    x: Value
    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """outs, side by side, = x times a whole matrix, with what is fused into it (see types.Fused).

    first, last: the outputs it takes of the matrix, all of them once calls are joined. is_logits:
    the result is float32. With a gate the only out is half as wide as the matrix.
    """

    outs: tuple[Value, ...]
    x: Value
    matrix: Matrix
    first: int
    last: int
    bias: Tensor | None = None
    norm: Tensor | None = None
    eps: float = 0.0
    gate: str = ""
    residual: Value | None = None
    is_logits: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """out = x with each head rotated by its position."""

    out: Value
    x: Value
    table: DeviceRope


@dataclass(frozen=True, slots=True, eq=False)
class WriteKv:
    """k and v go to the pool."""

    layer: int
    k: Value
    v: Value


@dataclass(frozen=True, slots=True, eq=False)
class RopeWrite:
    """Norms of heads, rotation and storing in one: out is q, in place of the first of `qkv`."""

    out: Value
    qkv: tuple[Value, Value, Value]
    layer: int
    table: DeviceRope
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Attend:
    """out = attention of q over the pool's layer."""

    out: Value
    q: Value
    layer: int
    scale: float
    window: int


@dataclass(frozen=True, slots=True, eq=False)
class Gated:
    """out = activation(gate) * up, which lie side by side."""

    out: Value
    gate: Value
    up: Value
    activation: str


@dataclass(frozen=True, slots=True, eq=False)
class Add:
    """out = x + y."""

    out: Value
    x: Value
    y: Value


@dataclass(frozen=True, slots=True, eq=False)
class AddNorm:
    """total = x + y, out = total normed."""

    total: Value
    out: Value
    x: Value
    y: Value
    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class TakeRows:
    """out = rows of x at the step's logit rows."""

    out: Value
    x: Value


@dataclass(frozen=True, slots=True, eq=False)
class AllReduce:
    """out = x summed over the ranks, in place."""

    out: Value
    x: Value


@dataclass(frozen=True, slots=True, eq=False)
class GatherLogits:
    """out = the ranks' parts x of the vocabulary, side by side."""

    out: Value
    x: Value


Call = (
    Embed
    | Norm
    | Product
    | Rope
    | WriteKv
    | RopeWrite
    | Attend
    | Gated
    | Add
    | AddNorm
    | TakeRows
    | AllReduce
    | GatherLogits
)


def get_reads(call: Call) -> tuple[Value, ...]:
    """The values a call reads."""
    match call:
        case Embed():
            return ()
        case WriteKv():
            return (call.k, call.v)
        case RopeWrite():
            return call.qkv
        case Attend():
            return (call.q,)
        case Gated():
            return (call.gate, call.up)
        case Add() | AddNorm():
            return (call.x, call.y)
        case Product(residual=int(residual)):
            return (call.x, residual)
        case _:
            return (call.x,)


def get_writes(call: Call) -> tuple[Value, ...]:
    """The values a call makes."""
    match call:
        case WriteKv():
            return ()
        case Product():
            return call.outs
        case AddNorm():
            return (call.total, call.out)
        case _:
            return (call.out,)
