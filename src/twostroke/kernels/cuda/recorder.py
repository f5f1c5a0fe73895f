"""Records the forward pass through the op table, as calls on numbered values.

`Recorder.make_ops()` is the GPU's op table: an op notes a call and returns the value of its result,
without computing. What is recorded is joined (`fuse.py`) and becomes programs (`program.py`), one
for few rows and one for many.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from twostroke.kernels.cuda.calls import (
    Add,
    AllReduce,
    Attend,
    Call,
    DeviceRope,
    Embed,
    Gated,
    GatherLogits,
    Norm,
    Product,
    Rope,
    TakeRows,
    Value,
    WriteKv,
)
from twostroke.kernels.cuda.types import MatrixPart, Tensor
from twostroke.kernels.ops import OpTable


@dataclass(slots=True)
class Recording:
    """A forward pass as calls.

    body, head: of all tokens, and of the positions with logits. widths: of every value. given:
    what is filled from outside, hidden: what the body hands to the head, logits: what the head
    makes; -1 where there is none.
    """

    body: list[Call] = field(default_factory=list)
    head: list[Call] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    given: Value = -1
    hidden: Value = -1
    logits: Value = -1


class Recorder:
    """Collects calls; see the module text.

    world: ranks that share the model; 1 records no communication.
    """

    def __init__(self, world: int = 1) -> None:
        self.recording = Recording()
        self._calls = self.recording.body
        self._world = world

    def new_input(self, width: int) -> Value:
        """The value that is filled from outside before the body runs, in a later stage."""
        self.recording.given = self._new_value(width)
        return self.recording.given

    def start_head(self, hidden: Value) -> None:
        """What is recorded from here on runs over the positions with logits."""
        self.recording.hidden = hidden
        self._calls = self.recording.head

    def make_ops(self) -> OpTable:
        """The op table that records here."""
        return OpTable(
            name="cuda",
            embed=self._embed,
            rms_norm=self._rms_norm,
            linear=self._linear,
            rope=self._rope,
            write_kv=lambda step, layer, k, v: self._calls.append(WriteKv(layer, k, v)),
            attention=self._attention,
            gated=self._gated,
            add=self._add,
            take_rows=self._take_rows,
            logits=self._logits,
            all_reduce=self._all_reduce,
        )

    def _new_value(self, width: int) -> Value:
        self.recording.widths.append(width)
        return len(self.recording.widths) - 1

    def _get_width(self, value: Value) -> int:
        return self.recording.widths[value]

    def _embed(self, step: object, table: MatrixPart, scale: float) -> Value:
        out = self._new_value(table.matrix.inputs)
        self._calls.append(Embed(out, table, scale))
        return out

    def _rms_norm(self, x: Value, weight: Tensor, eps: float) -> Value:
        assert self._get_width(x) % weight.numel() == 0
        out = self._new_value(self._get_width(x))
        self._calls.append(Norm(out, x, weight, eps))
        return out

    def _linear(self, x: Value, weight: MatrixPart, bias: object) -> Value:
        """The part's own bias counts: `bias` is only whether the model has one."""
        assert self._get_width(x) == weight.matrix.inputs
        out = self._new_value(weight.last - weight.first)
        added = None if bias is None else weight.bias
        self._calls.append(Product((out,), x, weight.matrix, weight.first, weight.last, bias=added))
        return out

    def _rope(self, step: object, x: Value, table: DeviceRope) -> Value:
        out = self._new_value(self._get_width(x))
        self._calls.append(Rope(out, x, table))
        return out

    def _attention(
        self, step: object, layer: int, q: Value, scale: float, window: int | None
    ) -> Value:
        out = self._new_value(self._get_width(q))
        self._calls.append(Attend(out, q, layer, scale, window or 0))
        return out

    def _gated(self, gate: Value, up: Value, activation: str) -> Value:
        out = self._new_value(self._get_width(gate))
        self._calls.append(Gated(out, gate, up, activation))
        return out

    def _add(self, x: Value, y: Value) -> Value:
        out = self._new_value(self._get_width(x))
        self._calls.append(Add(out, x, y))
        return out

    def _take_rows(self, step: object, x: Value) -> Value:
        out = self._new_value(self._get_width(x))
        self._calls.append(TakeRows(out, x))
        return out

    def _logits(self, x: Value, weight: MatrixPart) -> Value:
        width = weight.last - weight.first
        out = self._new_value(width)
        self._calls.append(
            Product((out,), x, weight.matrix, weight.first, weight.last, is_logits=True)
        )
        if self._world > 1:
            part, out = out, self._new_value(width * self._world)
            self._calls.append(GatherLogits(out, part))
        self.recording.logits = out
        return out

    def _all_reduce(self, x: Value) -> Value:
        if self._world == 1:
            return x
        out = self._new_value(self._get_width(x))
        self._calls.append(AllReduce(out, x))
        return out
