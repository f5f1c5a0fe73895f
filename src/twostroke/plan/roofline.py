"""Where a model's strokes lie under a device's roof: intensity, bound and least time of each.

Owns the points that `twostroke roofline` shows: prefills by length, decodes by batch and context.
It counts no work (spec/work.py does) and predicts no time but the floor; what an engine loses
against that comes from a StepCost. A device with 16-bit matrix units does all products and
attention with them, whatever weights are stored in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from twostroke.spec.cost import StepCost
from twostroke.spec.device import DeviceSpec
from twostroke.spec.work import ModelWork, RowShape, StepShape, StepTotals, get_floor_seconds

_HALVES = ("bf16", "f16")


@dataclass(frozen=True, slots=True)
class Point:
    """One step under the roof.

    stroke: "prefill" or "decode". rows, new_tokens, context: so many equal rows of new tokens
    behind a context. flops, bytes: of the whole step; floor_s: its least time, part by part;
    predicted_s: with an engine's losses. bound_by: "memory" or "compute", whichever sets most of
    the floor. kv_share: of the bytes, keys' and values'.
    """

    stroke: str
    rows: int
    new_tokens: int
    context: int
    flops: int
    bytes: int
    floor_s: float
    predicted_s: float
    bound_by: str
    kv_share: float

    @property
    def intensity(self) -> float:
        """Operations for each byte of memory (Williams et al. 2009, §3)."""
        return self.flops / self.bytes


@dataclass(frozen=True, slots=True)
class Shapes:
    """What to look at: lengths of prefills; decodes of so many rows, at each of the contexts."""

    prompts: Sequence[int]
    batches: Sequence[int]
    contexts: Sequence[int]


def get_working_device(device: DeviceSpec) -> DeviceSpec:
    """The device with the rates it really uses: 16-bit matrix units for all, where it has them."""
    for half in _HALVES:
        if device.has_rate(half):
            rate = device.get_rate(half)
            return replace(device, rates=(("fp32", rate), ("int8", rate), (half, rate)))
    return device


def list_ridges(device: DeviceSpec) -> tuple[tuple[str, float], ...]:
    """(arithmetic, operations a byte) of each rate: from there on arithmetic is the longer."""
    return tuple((kind, device.get_ridge(kind)) for kind, _ in device.rates)


def build_points(
    work: ModelWork, device: DeviceSpec, cost: StepCost, shapes: Shapes
) -> tuple[Point, ...]:
    """All points of `shapes`, prefills first; `device` as `get_working_device` has it."""
    return tuple(_build_points(work, device, cost, shapes))


def _build_points(
    work: ModelWork, device: DeviceSpec, cost: StepCost, shapes: Shapes
) -> Iterator[Point]:
    for length in shapes.prompts:
        yield build_point(work, device, cost, (1, length, 0))
    for context in shapes.contexts:
        for rows in shapes.batches:
            yield build_point(work, device, cost, (rows, 1, context))


def build_point(
    work: ModelWork, device: DeviceSpec, cost: StepCost, shape: tuple[int, int, int]
) -> Point:
    """The step of `shape`: (rows, new tokens of each, context before each); one drawn a row."""
    rows, new_tokens, context = shape
    step = work.get_step_work(StepShape((RowShape(new_tokens, context, 1),) * rows))
    floor = get_floor_seconds(step, device)
    totals = StepTotals(*(rows * each for each in work.get_row_totals(new_tokens, context, 1)))
    return Point(
        stroke="decode" if new_tokens == 1 and context else "prefill",
        rows=rows,
        new_tokens=new_tokens,
        context=context,
        flops=step.flops,
        bytes=step.bytes,
        floor_s=floor.seconds,
        predicted_s=cost.predict_ns(totals) / 1e9,
        bound_by=floor.bound_by,
        kv_share=(step.kv_bytes_read + step.kv_bytes_written) / step.bytes,
    )


def find_kv_batch(work: ModelWork, context: int) -> int:
    """The least rows whose keys and values at `context` are more bytes than the weights they need;
    beyond it a larger batch hardly raises the intensity. 0 where 2**20 rows do not suffice."""
    row = work.get_row_totals(1, context, 1)

    def is_kv_most(rows: int) -> bool:
        step = work.get_totals_work(StepTotals(*(rows * each for each in row)))
        return 2 * (step.kv_bytes_read + step.kv_bytes_written) >= step.bytes

    low, high = 1, 2**20
    if not is_kv_most(high):
        return 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_kv_most(middle) else (middle + 1, high)
    return low


def get_attention_intensity(work: ModelWork) -> float:
    """Operations a byte of attention in decode: the least that decode's intensity tends to."""
    return work.pair_ops / work.kv_layer_bytes
