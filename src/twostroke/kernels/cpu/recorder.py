"""Records the forward pass through the op table and turns it into one native program.

`Recorder.make_ops()` is the CPU's op table: each op notes a call on numbered slots and returns the
slot of its result, without computing. `build` then places the slots in memory, decides on
barriers, and hands the list to `_native.Program`, which replays it for any step. The order of
calls is the forward pass's own; nothing is reordered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twostroke.kernels.cpu.fuse import Call, Emit, Gate, Product, Quantise, join_calls
from twostroke.kernels.cpu.layout import Access, BarrierFinder
from twostroke.kernels.cpu.weights import PackedMatrix, Vector
from twostroke.kernels.ops import OpTable, RopeTable
from twostroke.kernels.places import Place, PlaceAllocator, find_last_uses

LANES = 16
_NO_BIAS = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class Slot:
    """The result of a recorded op: `width` float32 values a row."""

    index: int
    width: int


@dataclass(frozen=True, slots=True)
class _Spec:
    """What a slot needs: its width, its section, and whether it holds quantised rows."""

    width: int
    head: bool
    quantised: bool

    @property
    def arena(self) -> str:
        return ("head" if self.head else "body") + (" quantised" if self.quantised else "")


class Recorder:
    """Collects calls; see the module text."""

    def __init__(self) -> None:
        self._slots: list[_Spec] = []
        self._calls: list[Call] = []
        self._quantised: dict[int, int] = {}
        self._head = False

    def new_input(self, width: int) -> Slot:
        """A slot that the caller fills before each run; pass it to `build` to be kept."""
        return self._new_slot(width)

    def start_head(self) -> None:
        """What is recorded from here on runs over logit rows instead of all tokens."""
        self._head = True

    def make_ops(self) -> OpTable:
        """The op table that records here."""
        return OpTable(
            name="cpu",
            embed=self._embed,
            rms_norm=self._rms_norm,
            linear=self._linear,
            rope=self._rope,
            write_kv=self._write_kv,
            attention=self._attention,
            gated=self._gated,
            add=self._add,
            take_rows=self._take_rows,
            logits=lambda x, weight: self._linear(x, weight, None, "head"),
            all_reduce=lambda x: x,
        )

    # ---- the ops ---------------------------------------------------------------------------

    def _embed(self, step: object, table: PackedMatrix, scale: float) -> Slot:
        out = self._new_slot(table.inputs)
        self._call((), out, lambda p, at, wait: p.embed(table.native, at[0], scale, wait))
        return out

    def _rms_norm(self, x: Slot, weight: Vector, eps: float) -> Slot:
        out = self._new_slot(x.width)
        groups = x.width // weight.values.size
        assert groups * weight.values.size == x.width
        self._call((x,), out, lambda p, at, wait: p.rms_norm(*at, weight.values, groups, eps, wait))
        return out

    def _linear(self, x: Slot, weight: PackedMatrix, bias: Vector | None, name: str = "") -> Slot:
        assert x.width == weight.inputs, (x.width, weight.inputs)
        source = self._get_quantised(x) if weight.is_quantised else x
        out = self._new_slot(weight.outputs)
        values = _NO_BIAS if bias is None else bias.values
        self._call(
            (source,),
            out,
            lambda p, at, wait: p.linear(weight.native, *at, values, wait, name or weight.kind),
            by_row=False,
            kind=Product(weight, values),
        )
        return out

    def _rope(self, step: object, x: Slot, table: RopeTable) -> Slot:
        heads = x.width // (2 * table.cos.shape[1])
        interleaved = table.layout == "interleaved"
        self._call(
            (x,),
            x,
            lambda p, at, wait: p.rope(at[0], heads, table.cos, table.sin, interleaved, wait),
        )
        return x

    def _write_kv(self, step: object, layer: int, k: Slot, v: Slot) -> None:
        self._call(
            (k, v), None, lambda p, at, wait: p.write_kv(layer, *at, wait), by_row=True, kv=~layer
        )

    def _attention(
        self, step: object, layer: int, q: Slot, scale: float, window: int | None
    ) -> Slot:
        out = self._new_slot(q.width)
        self._call(
            (q,),
            out,
            lambda p, at, wait: p.attention(layer, *at, scale, window or 0, wait),
            by_row=False,
            kv=layer,
        )
        return out

    def _gated(self, gate: Slot, up: Slot, activation: str) -> Slot:
        out = self._new_slot(gate.width)
        gelu = {"silu": False, "gelu_tanh": True}[activation]
        self._call((gate, up), out, lambda p, at, wait: p.gated(*at, gelu, wait), kind=Gate(gelu))
        return out

    def _add(self, x: Slot, y: Slot) -> Slot:
        out = self._new_slot(x.width)
        self._call((x, y), out, lambda p, at, wait: p.add(*at, wait))
        return out

    def _take_rows(self, step: object, x: Slot) -> Slot:
        assert self._head, "take_rows belongs to the head"
        out = self._new_slot(x.width)
        # By row, although it reads other rows than it writes: those are the body's, complete.
        self._call((x,), out, lambda p, at, wait: p.take_rows(*at, wait))
        return out

    # ---- recording -------------------------------------------------------------------------

    def _new_slot(self, width: int, *, quantised: bool = False) -> Slot:
        self._slots.append(_Spec(width, self._head, quantised))
        return Slot(len(self._slots) - 1, width)

    def _get_quantised(self, x: Slot) -> Slot:
        """x quantised to signed bytes; recorded once, however many products read it."""
        if x.index not in self._quantised:
            slot = self._new_slot(x.width, quantised=True)
            self._call((x,), slot, lambda p, at, wait: p.quantise(*at, wait), kind=Quantise())
            self._quantised[x.index] = slot.index
        return Slot(self._quantised[x.index], x.width)

    def _call(
        self,
        reads: tuple[Slot, ...],
        out: Slot | None,
        emit: Emit,
        *,
        by_row: bool = True,
        kv: int | None = None,
        kind: Product | Gate | Quantise | None = None,
    ) -> None:
        writes = () if out is None else (out.index,)
        slots = tuple(slot.index for slot in reads)
        self._calls.append(Call(emit, slots, writes, by_row, self._head, kv, kind))

    # ---- building --------------------------------------------------------------------------

    def build(self, program: Any, kept: Sequence[Slot]) -> list[int]:
        """Emits everything recorded into the native program; returns the buffer ids of `kept`.

        Kept slots share their memory with no other, so their values outlast a run.
        """
        calls = join_calls(self._calls)
        places = self._place_slots(program, calls, {slot.index for slot in kept})
        ids = self._add_buffers(program, places)
        program.allocate()
        program.start_body()
        finder, head = BarrierFinder(), False
        for call in calls:
            if call.head and not head:
                program.start_head()
                finder, head = BarrierFinder(), True
            wait = finder.needs_barrier(self._get_accesses(call, places))
            operands = dict.fromkeys(call.reads + call.writes)
            call.emit(program, [ids[slot] for slot in operands], wait)
        return [ids[slot.index] for slot in kept]

    def _add_buffers(self, program: Any, places: Mapping[int, Place]) -> dict[int, int]:
        """A native buffer for every slot with a place; returns its id by slot."""
        ids = {}
        head = False
        for slot, spec in enumerate(self._slots):
            if spec.head and not head:
                program.start_head()
                head = True
            if slot in places:
                add = program.add_quantised if spec.quantised else program.add_buffer
                ids[slot] = add(spec.width, places[slot].start)
        return ids

    def _place_slots(self, program: Any, calls: Sequence[Call], kept: set[int]) -> dict[int, Place]:
        """A place for every slot in use: kept ones for good, others from first write to last."""
        last_use = find_last_uses([call.reads + call.writes for call in calls])
        arenas = {spec.arena: PlaceAllocator(spec.arena) for spec in self._slots}
        places: dict[int, Place] = {}

        def place(slot: int) -> None:
            spec = self._slots[slot]
            width = spec.width if spec.quantised else program.row_stride(spec.width)
            places[slot] = arenas[spec.arena].take(width)

        for slot in sorted(kept):
            place(slot)
        for index, call in enumerate(calls):
            for slot in call.writes:
                if slot not in places:
                    place(slot)
            for slot in sorted({*call.reads, *call.writes} - kept):
                if last_use[slot] == index:
                    arenas[places[slot].arena].give_back(places[slot])
        return places

    @staticmethod
    def _get_accesses(call: Call, places: Mapping[int, Place]) -> list[Access]:
        accesses = [Access(places[slot], False, call.by_row) for slot in call.reads]
        accesses += [Access(places[slot], True, call.by_row) for slot in call.writes]
        if call.kv is not None:
            layer = ~call.kv if call.kv < 0 else call.kv
            accesses.append(Access(Place("kv", layer, 1), call.kv < 0, False))
        return accesses
