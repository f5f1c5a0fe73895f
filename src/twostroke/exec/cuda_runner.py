"""The forward pass on a GPU: recorded once, laid out for few rows and for many, decodes captured.

Owns the programs, their memory and the graphs. `enqueue` queues a step behind those before it and
returns; it never waits for the device. Steps that decode one token a row are padded to the next
rung of a ladder of batch sizes, whose launches were captured; all others are launched one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from twostroke.exec.cuda_device import Device, Event, Run
from twostroke.exec.cuda_record import make_ropes, record
from twostroke.exec.cuda_staging import (
    StagedView,
    StepCounts,
    count_step,
    fill,
    get_decode_counts,
    view,
)
from twostroke.kernels.cuda import attention, quantised, rows
from twostroke.kernels.cuda.collectives import Collectives
from twostroke.kernels.cuda.launch import FEW_ROWS, Launches
from twostroke.kernels.cuda.pool import KvPool
from twostroke.kernels.cuda.program import Memory, Program, lay_out
from twostroke.kernels.cuda.rope import HeadShape
from twostroke.kernels.cuda.types import BLOCK_TOKENS, MatrixPart, QuantMatrix, Tensor, Weights
from twostroke.kernels.ops import I32, StepArrays
from twostroke.spec.model import ModelSpec
from twostroke.spec.ranks import WHOLE, RankPlace

# Tables are this many blocks wide or a multiple, so that few widths are ever compiled for.
TABLE_STEP = 16
_SLOTS = 3  # pinned buffers: of the steps in flight, and the one being filled


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What a runner is made for.

    tokens: most of a step. rows: most sequences of a step. logit_rows: most positions with logits
    at once. context_tokens: most a sequence may have. rungs: batch sizes whose decodes are
    captured, rising; none captures nothing.
    """

    tokens: int
    rows: int
    logit_rows: int
    context_tokens: int
    rungs: tuple[int, ...] = ()

    @property
    def table_blocks(self) -> int:
        """Blocks of the longest sequence, rounded up."""
        blocks = -(-self.context_tokens // BLOCK_TOKENS)
        return -(-blocks // TABLE_STEP) * TABLE_STEP


@dataclass(frozen=True, slots=True, eq=False)
class DeviceModel:
    """A model, or a rank's share of it, on the device.

    spec: of the share. dtype: of activations. exact: see kernels/cuda/launch.py. place: of the rank
    among those that share the model, with whom it exchanges by `collectives`.
    """

    spec: ModelSpec
    weights: Weights
    dtype: torch.dtype
    exact: bool = False
    place: RankPlace = WHOLE
    collectives: Collectives | None = None


def make_rungs(rows: int) -> tuple[int, ...]:
    """Batch sizes to capture: 1, 2, 4, 8, then every 8 up to 64, then every 16, and `rows`."""
    wanted = [1, 2, 4, *range(8, 64, 8), *range(64, rows + 1, 16), rows]
    return tuple(sorted({rung for rung in wanted if rung <= rows}))


class _Slot:
    """A pinned buffer, and when what was copied from it last had left it."""

    def __init__(self, pinned: Tensor) -> None:
        self.pinned = pinned
        self.array: NDArray[np.int32] = pinned.numpy()
        self.left: Event | None = None


class CudaRunner:
    """Computes steps on one device; called from one thread at a time.

    drawn (tokens,) int32 holds the tokens that the last step drew, for those that follow on.
    """

    def __init__(
        self, model: DeviceModel, pool: KvPool, limits: RunnerLimits, device: Device
    ) -> None:
        self.limits = limits
        self.pool = pool
        self._device = device
        self._model = model
        spec, name = model.spec, device.name
        ropes = make_ropes(spec, model.weights, limits.context_tokens, name)
        recording = record(spec, model.weights, ropes, model.place)
        many = lay_out(recording, few_rows=False)
        layouts = [many] if model.exact else [lay_out(recording, few_rows=True), many]
        most = (limits.tokens, limits.logit_rows)
        self._memory = Memory(layouts, most, model.dtype, name)
        self._scratch = attention.AttentionScratch.allocate(
            name, limits.rows, spec.num_heads, spec.head_dim, limits.context_tokens
        )
        launches = Launches(
            pool.layers,
            HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim),
            self._scratch,
            *make_unpacking(model.weights, model.dtype, name),
            model.exact,
            model.collectives,
        )
        programs = [Program(layout, self._memory, launches) for layout in layouts]
        self._few, self._many = programs[0], programs[-1]
        self._tile = attention.get_tile_tokens(
            spec.num_heads // spec.num_kv_heads, spec.head_dim, model.exact
        )
        self.drawn = torch.zeros(limits.tokens, dtype=torch.int32, device=name)
        tokens, wide = limits.tokens, limits.table_blocks
        largest = StepCounts(tokens, limits.rows, tokens, limits.rows, tokens, wide).size
        self._buffer = torch.zeros(largest, dtype=torch.int32, device=name)
        self._slots = [_Slot(device.pin((largest,), torch.int32)) for _ in range(_SLOTS)]
        self._turn = 0
        self._last: tuple[Program, StagedView] | None = None
        self._graphs: dict[int, Run] = {}

    @property
    def work_bytes(self) -> int:
        """Device memory beside weights and the pool."""
        return self._memory.bytes + self._scratch.bytes + 4 * self._buffer.numel()

    def capture(self, progress: Callable[[int], None] = lambda rung: None) -> None:
        """Captures the decodes of every rung, largest first; `progress` is told each."""
        for rung in sorted(self.limits.rungs, reverse=True):
            counts = get_decode_counts(rung, self.limits.table_blocks)
            self._buffer.zero_()
            staged = self._view(counts)
            staged.step.token_rows.fill_(-1)
            program, launches = self._bind(staged)
            self._graphs[rung] = self._device.capture(partial(_run, launches))
            self._last = program, staged
            progress(rung)

    def enqueue(self, arrays: StepArrays, sources: I32 | None = None) -> Tensor:
        """Queues a step's layers and the logits (L, vocab) float32 of its logit rows.

        sources (T,): for each token its place among the tokens that the last step drew, -1 where
        it is known. The logits hold until the next call.
        """
        count = arrays.logit_rows.size
        rung = self._find_rung(arrays)
        if rung:
            counts = get_decode_counts(rung, self.limits.table_blocks)
        else:
            width = -(-arrays.block_tables.shape[1] // TABLE_STEP) * TABLE_STEP
            counts = count_step(arrays, self._tile, min(width, self.limits.table_blocks))
        self._upload(counts, arrays, sources)
        staged = self._view(counts)
        program, launches = self._choose(counts.tokens), ()
        if rung:
            self._graphs[rung]()
        else:
            program, launches = self._bind(staged)
            _run(launches)
        self._last = program, staged
        return self._get_logits(program, count)

    def enqueue_head(self, logit_rows: I32) -> Tensor:
        """Queues the logits (L, vocab) float32 of other rows of the step that was queued last."""
        assert self._last is not None
        program, staged = self._last
        slot = self._take_slot()
        size = logit_rows.size
        slot.array[:size] = logit_rows
        index = torch.empty(size, dtype=torch.int32, device=self._device.name)
        index.copy_(slot.pinned[:size], non_blocking=True)
        slot.left = self._device.record()
        _run(program.bind_head(replace(staged.step, logit_rows=index)))
        return self._get_logits(program, size)

    def _get_logits(self, program: Program, count: int) -> Tensor:
        """Logits (count, vocab), without padding of ranks; a stage before the last has none."""
        if not self._model.place.is_last_stage:
            return self._memory.body[:0]
        return program.get_logits(count)[:, : self._model.spec.vocab_size]

    def _choose(self, tokens: int) -> Program:
        return self._few if tokens <= FEW_ROWS else self._many

    def _bind(self, staged: StagedView) -> tuple[Program, Sequence[Run]]:
        """The launches of a whole step, from pending tokens to logits."""
        program = self._choose(staged.step.tokens.shape[0])
        step, count = staged.step, staged.step.tokens.shape[0]
        ranks, place = self._model.collectives, self._model.place
        launches: list[Run] = []
        if place.is_first_stage:
            launches.append(partial(rows.gather_tokens, step.tokens, staged.sources, self.drawn))
        elif ranks is not None:
            launches.append(partial(ranks.receive_hidden, program.get_input(count)))
        launches += program.bind_body(step)
        if not place.is_last_stage and ranks is not None:
            launches.append(partial(ranks.send_hidden, program.get_hidden(count)))
        elif step.logit_rows.shape[0]:
            launches += program.bind_head(step)
        return program, launches

    def _view(self, counts: StepCounts) -> StagedView:
        return view(self._buffer, counts, self._tile, self.limits.context_tokens)

    def _find_rung(self, arrays: StepArrays) -> int:
        """The rung that a step is padded to; 0 where it is not one that was captured."""
        tokens = arrays.tokens.size
        decodes = tokens == arrays.row_offsets.size - 1 == arrays.logit_rows.size
        if not decodes:
            return 0
        return next((rung for rung in self.limits.rungs if rung >= tokens), 0)

    def _upload(self, counts: StepCounts, arrays: StepArrays, sources: I32 | None) -> None:
        slot = self._take_slot()
        fill(slot.array, counts, arrays, sources, self._tile)
        self._buffer[: counts.size].copy_(slot.pinned[: counts.size], non_blocking=True)
        slot.left = self._device.record()

    def _take_slot(self) -> _Slot:
        """The next pinned buffer, once what was copied from it has arrived."""
        self._turn = (self._turn + 1) % _SLOTS
        slot = self._slots[self._turn]
        if slot.left is not None:
            slot.left.wait()
        return slot


def make_unpacking(
    weights: Weights, dtype: torch.dtype, device: str
) -> tuple[quantised.Workspace, Tensor] | tuple[None, None]:
    """What products with quantised matrices need: memory to meet in, and for the largest one of the
    layers in `dtype`. Nothing where none is quantised."""
    sizes = [
        (name not in ("embed", "head")) * part.matrix.outputs * part.matrix.inputs
        for name, part in weights.items()
        if isinstance(part, MatrixPart) and isinstance(part.matrix, QuantMatrix)
    ]
    if not sizes:
        return None, None
    unpacked = torch.empty(max(sizes), dtype=dtype, device=device)
    return quantised.make_workspace(torch.device(device)), unpacked


def _run(launches: Sequence[Run]) -> None:
    for launch in launches:
        launch()
