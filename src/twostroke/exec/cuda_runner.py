"""The forward pass on a GPU: recorded once, laid out for few rows and for many, steps captured.

Owns the programs, their memory and the graphs. `enqueue` queues a step behind those before it and
returns; it never waits for a step. Steps are padded to the next rung of a ladder of sizes
(cuda_ladder.py), whose launches were captured; one that no rung holds is launched call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from twostroke.exec.cuda_device import Device, Event, Run
from twostroke.exec.cuda_ladder import SPARE_TILES, Ladder
from twostroke.exec.cuda_record import make_ropes, record
from twostroke.exec.cuda_staging import StagedView, StepCounts, count_step, fill, view
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
    at once. context_tokens: most a sequence may have. rungs, token_rungs: sizes of decoding steps
    and of steps with prompts that are captured (see cuda_ladder.py); none captures nothing.
    """

    tokens: int
    rows: int
    logit_rows: int
    context_tokens: int
    rungs: tuple[int, ...] = ()
    token_rungs: tuple[int, ...] = ()

    @property
    def table_blocks(self) -> int:
        """Blocks of the longest sequence, rounded up."""
        blocks = -(-self.context_tokens // BLOCK_TOKENS)
        return -(-blocks // TABLE_STEP) * TABLE_STEP

    def get_buffer_size(self) -> int:
        """int32 values of the largest step, padding included."""
        tokens, rows = self.tokens, self.rows + 1
        tiles = tokens + SPARE_TILES
        return StepCounts(tokens, rows, tokens, rows, tiles, self.table_blocks).size


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
        workspace, unpacked = make_unpacking(model.weights, model.dtype, name)
        own = [table for rope in ropes.values() for table in (rope.cos, rope.sin)]
        if workspace is not None and unpacked is not None:
            own += [workspace.partials, workspace.counters, unpacked]
        self._extra_bytes = sum(each.numel() * each.element_size() for each in own)
        launches = Launches(
            pool.layers,
            HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim),
            self._scratch,
            workspace,
            unpacked,
            model.exact,
            model.collectives,
        )
        programs = [Program(layout, self._memory, launches) for layout in layouts]
        self._few, self._many = programs[0], programs[-1]
        self._tile = attention.get_tile_tokens(
            spec.num_heads // spec.num_kv_heads, spec.head_dim, model.exact
        )
        self.drawn = torch.zeros(limits.tokens, dtype=torch.int32, device=name)
        largest = limits.get_buffer_size()
        self._buffer = torch.zeros(largest, dtype=torch.int32, device=name)
        self._slots = [_Slot(device.pin((largest,), torch.int32)) for _ in range(_SLOTS)]
        self._turn = 0
        self._last: tuple[Program, StagedView] | None = None
        self._few_rows = FEW_ROWS if has_quantised(model.weights) else 1
        token_rungs = tuple(rung for rung in limits.token_rungs if rung <= limits.tokens)
        self._ladder = Ladder(
            limits.rungs, token_rungs, limits.rows, limits.table_blocks, self._tile
        )
        self._graphs: dict[StepCounts, Run] = {}

    @property
    def work_bytes(self) -> int:
        """Device memory beside weights, the pool and graphs."""
        staged = 4 * (self._buffer.numel() + self.drawn.numel())
        return self._memory.bytes + self._scratch.bytes + staged + self._extra_bytes

    def capture(self, progress: Callable[[StepCounts], None] = lambda counts: None) -> None:
        """Captures every rung of the ladder; `progress` is told each."""
        for counts in self._ladder.list_counts():
            self._buffer.zero_()
            staged = self._view(counts)
            # Nothing is written: no token has a row, no tile is one.
            staged.step.token_rows.fill_(-1)
            staged.step.tiles.fill_(-1)
            program, launches = self._bind(staged)
            self._graphs[counts] = self._device.capture(partial(_run, launches))
            self._last = program, staged
            progress(counts)

    def enqueue(self, arrays: StepArrays, sources: I32 | None = None) -> Tensor:
        """Queues a step's layers and the logits (L, vocab) float32 of its logit rows.

        sources (T,): for each token its place among the tokens that the last step drew, -1 where
        it is known. The logits hold until the next call.
        """
        counts = self._ladder.try_find(arrays)
        graph = None if counts is None else self._graphs.get(counts)
        if counts is None or graph is None:
            width = -(-arrays.block_tables.shape[1] // TABLE_STEP) * TABLE_STEP
            counts = count_step(arrays, self._tile, min(width, self.limits.table_blocks))
        self._upload(counts, arrays, sources)
        staged = self._view(counts)
        if graph is None:
            program, launches = self._bind(staged)
            _run(launches)
        else:
            program = self._choose(counts.tokens)
            graph()
        self._last = program, staged
        if arrays.logit_rows.size and not counts.logits:
            return self.enqueue_head(arrays.logit_rows)
        return self._get_logits(program, arrays.logit_rows.size)

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
        return self._few if tokens <= self._few_rows else self._many

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


def has_quantised(weights: Weights) -> bool:
    """True where a matrix of the layers is quantised."""
    return any(_count_quantised(name, weight) for name, weight in weights.items())


def make_unpacking(
    weights: Weights, dtype: torch.dtype, device: str
) -> tuple[quantised.Workspace, Tensor] | tuple[None, None]:
    """What products with quantised matrices need: memory to meet in, and for the largest one of the
    layers in `dtype`. Nothing where none is quantised."""
    if not any(
        isinstance(weight, MatrixPart) and isinstance(weight.matrix, QuantMatrix)
        for weight in weights.values()
    ):
        return None, None
    most = max(_count_quantised(name, weight) for name, weight in weights.items())
    unpacked = torch.empty(most, dtype=dtype, device=device)
    return quantised.make_workspace(torch.device(device)), unpacked


def _count_quantised(name: str, weight: MatrixPart | Tensor) -> int:
    """Weights of a quantised matrix of the layers; 0 for all else."""
    if not isinstance(weight, MatrixPart) or not isinstance(weight.matrix, QuantMatrix):
        return 0
    return 0 if name in ("embed", "head") else weight.matrix.outputs * weight.matrix.inputs


def _run(launches: Sequence[Run]) -> None:
    for launch in launches:
        launch()
