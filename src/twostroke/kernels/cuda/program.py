"""A joined pass as launches over memory that is allocated once.

Owns which value lies where: values whose lives do not overlap share memory, values that one launch
makes or reads together lie side by side, and a sum replaces what it was added to. `bind` turns the
calls into launches for one step's tensors: Python decides everything then, so that a bound program
may be captured as a graph, or run and forgotten. Nothing is allocated while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from twostroke.kernels.cuda.calls import (
    Add,
    AddNorm,
    AllReduce,
    Call,
    Gated,
    GatherLogits,
    Product,
    RopeWrite,
    Value,
    get_reads,
    get_writes,
)
from twostroke.kernels.cuda.fuse import join_calls
from twostroke.kernels.cuda.launch import Launches, Views
from twostroke.kernels.cuda.recorder import Recording
from twostroke.kernels.cuda.types import StepTensors, Tensor
from twostroke.kernels.places import Place, PlaceAllocator, find_last_uses

# Values a row of a place is rounded up to: places begin where wide loads may.
ALIGNMENT = 64

Launch = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Column:
    """Where a value lies: columns `first` … `first + width` - 1 of a place as wide as `row`."""

    place: Place
    row: int
    first: int
    width: int


@dataclass(frozen=True, slots=True)
class Section:
    """The body or the head of a pass: its launches' calls, its values' columns, and its arena.

    arena: values that a row takes of it.
    """

    calls: tuple[Call, ...]
    columns: Mapping[Value, Column]
    arena: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A pass laid out for some number of rows; see `lay_out`."""

    body: Section
    head: Section
    given: Value
    hidden: Value
    logits: Value
    widths: tuple[int, ...]


def lay_out(recording: Recording, few_rows: bool) -> Layout:
    """Joins a recording and gives its values places."""
    body = join_calls(recording.body, few_rows)
    head = join_calls(recording.head, few_rows)
    widths, hidden = recording.widths, recording.hidden
    return Layout(
        _place(body, widths, kept={hidden}),
        _place(head, widths, kept=set(), given={hidden, *_find_logits(head)}),
        recording.given,
        hidden,
        recording.logits,
        tuple(widths),
    )


def _find_logits(head: Sequence[Call]) -> list[Value]:
    """The values that are float32: the logits, and before them the rank's own where ranks share."""
    products = [call.outs[0] for call in head if isinstance(call, Product) and call.is_logits]
    return products + [call.out for call in head if isinstance(call, GatherLogits)]


class Memory:
    """The arenas that layouts share: one for tokens, one for positions with logits, and logits.

    Programs run one after another, so those for few rows and for many use the same memory.
    logits: (max_logit_rows, width) float32 of each value that is.
    """

    def __init__(
        self, layouts: Sequence[Layout], rows: tuple[int, int], dtype: torch.dtype, device: str
    ) -> None:
        """rows: most tokens of a step, and most positions with logits at once."""
        self.max_tokens, self.max_logit_rows = rows
        bodies = max(layout.body.arena for layout in layouts)
        heads = max(layout.head.arena for layout in layouts)
        self.body = torch.zeros(bodies * self.max_tokens, dtype=dtype, device=device)
        self.head = torch.zeros(heads * self.max_logit_rows, dtype=dtype, device=device)
        self.logits = {
            value: torch.zeros(
                (self.max_logit_rows, layouts[0].widths[value]), dtype=torch.float32, device=device
            )
            for value in _find_logits(layouts[0].head.calls)
        }

    @property
    def bytes(self) -> int:
        """Bytes of all arenas."""
        arenas = (self.body, self.head, *self.logits.values())
        return sum(each.numel() * each.element_size() for each in arenas)


class Program:
    """One layout over memory, ready to be bound to steps."""

    def __init__(self, layout: Layout, memory: Memory, launches: Launches) -> None:
        self.layout = layout
        self._memory = memory
        self._launches = launches

    def bind_body(self, step: StepTensors) -> list[Launch]:
        """The launches of all layers for this step."""
        tokens = step.tokens.shape[0]
        assert tokens <= self._memory.max_tokens, (tokens, self._memory.max_tokens)
        views = self._view(self.layout.body, self._memory.body, self._memory.max_tokens, tokens)
        return self._launches.bind(self.layout.body.calls, views, step)

    def bind_head(self, step: StepTensors) -> list[Launch]:
        """The launches from the last layer's output to the logits of step.logit_rows."""
        rows, tokens = step.logit_rows.shape[0], step.tokens.shape[0]
        assert rows <= self._memory.max_logit_rows, (rows, self._memory.max_logit_rows)
        head = self.layout.head
        views = self._view(head, self._memory.head, self._memory.max_logit_rows, rows)
        views[self.layout.hidden] = self.get_hidden(tokens)
        views |= {value: memory[:rows] for value, memory in self._memory.logits.items()}
        return self._launches.bind(head.calls, views, step)

    def get_hidden(self, tokens: int) -> Tensor:
        """The last layer's output (tokens, width) of the step that ran last."""
        column = self.layout.body.columns[self.layout.hidden]
        return _view_column(column, self._memory.body, self._memory.max_tokens, tokens)

    def get_input(self, tokens: int) -> Tensor:
        """The value (tokens, width) that is filled from outside before the body runs."""
        column = self.layout.body.columns[self.layout.given]
        return _view_column(column, self._memory.body, self._memory.max_tokens, tokens)

    def get_logits(self, rows: int) -> Tensor:
        """Logits (rows, vocab) float32."""
        return self._memory.logits[self.layout.logits][:rows]

    def _view(self, section: Section, arena: Tensor, most: int, rows: int) -> Views:
        return {
            value: _view_column(column, arena, most, rows)
            for value, column in section.columns.items()
        }


def _view_column(column: Column, arena: Tensor, most: int, rows: int) -> Tensor:
    start = column.place.start * most
    whole = arena[start : start + rows * column.row].view(rows, column.row)
    if column.width == column.row:
        return whole
    return whole[:, column.first : column.first + column.width]


def _place(
    calls: Sequence[Call],
    widths: Sequence[int],
    kept: set[Value],
    given: frozenset[Value] | set[Value] = frozenset(),
) -> Section:
    """A place for every value that these calls make; kept ones hold beyond the last call.

    given: values that lie elsewhere.
    """
    groups = _find_groups(calls)
    last_use = find_last_uses([get_reads(call) + get_writes(call) for call in calls])
    allocator = PlaceAllocator("values")
    columns: dict[Value, Column] = {}

    def place(value: Value) -> None:
        group = groups.get(value, (value,))
        row = sum(widths[each] for each in group)
        where = allocator.take(-(-row // ALIGNMENT) * ALIGNMENT)
        first = 0
        for each in group:
            columns[each] = Column(where, row, first, widths[each])
            first += widths[each]

    for index, call in enumerate(calls):
        for value in get_reads(call):
            if value not in columns and value not in given:
                place(value)  # an input of the pass
        replaced = _find_replaced(call)
        if replaced is not None:
            old, new = replaced
            free = old in columns and last_use[old] == index and old not in kept
            if (free and new not in groups and old not in groups) or isinstance(
                call, RopeWrite | AllReduce
            ):
                columns[new] = columns[old]
        for value in get_writes(call):
            if value not in columns and value not in given:
                place(value)
        _give_back(allocator, columns, (call, index), (last_use, kept))
    return Section(tuple(calls), columns, allocator.width)


def _give_back(
    allocator: PlaceAllocator,
    columns: Mapping[Value, Column],
    now: tuple[Call, int],
    lives: tuple[Mapping[Value, int], set[Value]],
) -> None:
    """Frees the places all of whose values were used for the last time by this call."""
    (call, index), (last_use, kept) = now, lives
    used = [columns[each].place for each in get_reads(call) + get_writes(call) if each in columns]
    for place in dict.fromkeys(used):
        users = (value for value, column in columns.items() if column.place == place)
        if not any(value in kept or last_use.get(value, -1) > index for value in users):
            allocator.give_back(place)


def _find_groups(calls: Sequence[Call]) -> dict[Value, tuple[Value, ...]]:
    """Values that must lie side by side, by each of them."""
    groups: dict[Value, tuple[Value, ...]] = {}
    for call in calls:
        match call:
            case RopeWrite():
                group: tuple[Value, ...] = call.qkv
            case Gated():
                group = (call.gate, call.up)
            case Product() if len(call.outs) > 1:
                group = call.outs
            case _:
                continue
        groups |= dict.fromkeys(group, group)
    return groups


def _find_replaced(call: Call) -> tuple[Value, Value] | None:
    """(value read, value made) where the second may take the place of the first."""
    match call:
        case Add():
            return call.x, call.out
        case AddNorm():
            return call.x, call.total
        case Product(residual=int(residual)) if len(call.outs) == 1:
            return residual, call.outs[0]
        case AllReduce():
            return call.x, call.out
        case RopeWrite():
            return call.qkv[0], call.out
        case _:
            return None
