"""What a rank group and its ranks say to each other, and how it is put into bytes.

Both ends are one program on one machine, joined by a socket that only they hold, so messages may be
pickled. Plans and outcomes cross once a step and are most of the traffic: they go as plain tuples
through `marshal`, and a sequence or its sampling comes out as the same object in every step, which
is a third of pickle's time and lets a batch builder see that a batch goes on. Owns no socket's
life: who opened one closes it.
"""

from __future__ import annotations

import marshal
import pickle
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any

from twostroke.core.ports import ExecutorInfo
from twostroke.core.types import (
    BlockCopy,
    BlockId,
    BlockSwap,
    Row,
    RowResult,
    SamplingSpec,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokenLogprob,
)
from twostroke.spec.ranks import RankPlace

_HEADER = struct.Struct("<QB")  # bytes of the body, kind of message
_PICKLED, _A_PLAN, _AN_OUTCOME = 0, 1, 2
_RECEIVE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message to a rank: make your executor with factory(context, job)."""

    factory: Callable[..., Any]
    context: RankContext
    job: object


@dataclass(frozen=True, slots=True)
class RankContext:
    """What a rank is told about its group.

    store: a path in a folder of the group's own, where ranks may meet. timeout_s: for how long one
    may wait for another.
    """

    place: RankPlace
    store: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Ready:
    """A rank can take steps."""

    info: ExecutorInfo


@dataclass(frozen=True, slots=True)
class Broken:
    """A rank cannot go on: the name of the error's class and its text."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class StepLost:
    """A rank's executor answered a step with ExecutorLost."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReadKv:
    """Send the bytes of these blocks."""

    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class WriteKv:
    """Put bytes that came from `read_kv` into these blocks, then say so with empty KvBytes."""

    data: bytes
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class KvBytes:
    """A rank's answer to ReadKv and WriteKv."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """End in good order."""


Message = (
    Begin | Ready | Broken | StepLost | ReadKv | WriteKv | KvBytes | Close | StepPlan | StepOutcome
)


# ---- bytes --------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """The message with its header."""
    if isinstance(message, StepPlan):
        kind, body = _A_PLAN, marshal.dumps(_flatten_plan(message))
    elif isinstance(message, StepOutcome):
        kind, body = _AN_OUTCOME, marshal.dumps(_flatten_outcome(message))
    else:
        kind, body = _PICKLED, pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body), kind) + body


def _decode(kind: int, body: bytes) -> Message:
    if kind == _A_PLAN:
        return _build_plan(marshal.loads(body))
    if kind == _AN_OUTCOME:
        return _build_outcome(marshal.loads(body))
    message: Message = pickle.loads(body)
    return message


class Decoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete once `data` has come, in order."""
        self._bytes += data
        messages: list[Message] = []
        at = 0
        while len(self._bytes) - at >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._bytes, at)
            end = at + _HEADER.size + length
            if len(self._bytes) < end:
                break
            messages.append(_decode(kind, bytes(self._bytes[at + _HEADER.size : end])))
            at = end
        del self._bytes[:at]
        return messages


# ---- plans and outcomes as tuples ---------------------------------------------------------------


def _get_names(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


_take_plan = attrgetter(*_get_names(StepPlan))
_take_row = attrgetter(*_get_names(Row))
_take_outcome = attrgetter(*_get_names(StepOutcome))
_take_result = attrgetter(*_get_names(RowResult))
_take_sequence = attrgetter(*_get_names(SequenceId))
_take_sampling = attrgetter(*_get_names(SamplingSpec))
_take_copy = attrgetter(*_get_names(BlockCopy))
_take_swap = attrgetter(*_get_names(BlockSwap))
_take_logprob = attrgetter(*_get_names(TokenLogprob))

# Where among a dataclass's fields those lie that hold dataclasses in turn.
_ROWS, _COPIES, *_SWAPS = map(
    _get_names(StepPlan).index, ("rows", "copies", "swaps_out", "swaps_in")
)
_SEQUENCE, _SAMPLING = map(_get_names(Row).index, ("sequence", "sampling"))
_RESULTS = _get_names(StepOutcome).index("results")
_OF, *_LOGPROBS = map(_get_names(RowResult).index, ("sequence", "logprobs", "scored"))


@lru_cache(maxsize=4096)
def _make_sequence(request: str, index: int) -> SequenceId:
    return SequenceId(request, index)


# Equal numbers of different types, 1 and 1.0, must not stand for each other.
@lru_cache(maxsize=4096, typed=True)
def _make_sampling(*values: Any) -> SamplingSpec:
    return SamplingSpec(*values)


def _flatten_plan(plan: StepPlan) -> list[Any]:
    values = list(_take_plan(plan))
    values[_ROWS] = [_flatten_row(row) for row in plan.rows]
    values[_COPIES] = [_take_copy(each) for each in plan.copies]
    for at in _SWAPS:
        values[at] = [_take_swap(each) for each in values[at]]
    return values


def _flatten_row(row: Row) -> list[Any]:
    values = list(_take_row(row))
    values[_SEQUENCE] = _take_sequence(row.sequence)
    if row.sampling is not None:
        values[_SAMPLING] = _take_sampling(row.sampling)
    return values


def _build_plan(values: list[Any]) -> StepPlan:
    values[_ROWS] = tuple([_build_row(row) for row in values[_ROWS]])
    values[_COPIES] = tuple([BlockCopy(*each) for each in values[_COPIES]])
    for at in _SWAPS:
        values[at] = tuple([BlockSwap(*each) for each in values[at]])
    return StepPlan(*values)


def _build_row(values: list[Any]) -> Row:
    values[_SEQUENCE] = _make_sequence(*values[_SEQUENCE])
    if values[_SAMPLING] is not None:
        values[_SAMPLING] = _make_sampling(*values[_SAMPLING])
    return Row(*values)


def _flatten_outcome(outcome: StepOutcome) -> list[Any]:
    values = list(_take_outcome(outcome))
    values[_RESULTS] = [_flatten_result(each) for each in outcome.results]
    return values


def _flatten_result(result: RowResult) -> list[Any]:
    values = list(_take_result(result))
    values[_OF] = _take_sequence(result.sequence)
    for at in _LOGPROBS:
        values[at] = [_take_logprob(each) for each in values[at]]
    return values


def _build_outcome(values: list[Any]) -> StepOutcome:
    values[_RESULTS] = tuple([_build_result(each) for each in values[_RESULTS]])
    return StepOutcome(*values)


def _build_result(values: list[Any]) -> RowResult:
    values[_OF] = _make_sequence(*values[_OF])
    for at in _LOGPROBS:
        values[at] = tuple([TokenLogprob(*each) for each in values[at]])
    return RowResult(*values)


# ---- ends ---------------------------------------------------------------------------------------


class GroupGone(Exception):
    """The process that started this rank has closed its end, or died."""


class RankEnd:
    """The rank's end: it waits for messages, and any of its threads may send.

    Both raise GroupGone.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.Lock()
        self._decoder = Decoder()
        self._received: deque[Message] = deque()

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends; waits while the group does not read."""
        data = encode(message)
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError as error:
            raise GroupGone from error

    def receive(self) -> Message:
        """The next message; waits for it."""
        while not self._received:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise GroupGone from error
            if not data:
                raise GroupGone
            self._received.extend(self._decoder.feed(data))
        return self._received.popleft()


class GroupEnd:
    """The group's end: never waits. What a rank does not take at once is kept until `flush`.

    Not thread-safe for writing: the group's lock guards it. One thread reads.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._decoder = Decoder()
        self._unsent: deque[memoryview] = deque()

    @property
    def has_unsent(self) -> bool:
        """True when `flush` has something to do."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Sends what goes at once and keeps the rest. Raises OSError when the rank is gone."""
        self._unsent.append(memoryview(data))
        self.flush()

    def flush(self) -> None:
        """Sends what goes at once. Raises OSError when the rank is gone."""
        while self._unsent:
            first = self._unsent[0]
            try:
                sent = self._socket.send(first)
            except BlockingIOError:
                return
            if sent == len(first):
                self._unsent.popleft()
            else:
                self._unsent[0] = first[sent:]

    def receive(self) -> list[Message]:
        """The messages that have come. Raises EOFError, or OSError, when the rank is gone."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError("the rank's end of the socket is closed")
        return self._decoder.feed(data)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()
