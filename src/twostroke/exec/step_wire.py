"""Plans and outcomes as bytes, and the two ends of a socket that carries messages.

Whoever runs steps in another process sends them this way: ranks of a group (`rank_wire.py`) and the
executor's child (`child_wire.py`), whose other messages, but for two, are their own. Plans and
outcomes cross once a step and are most of the traffic: they go as plain tuples through `marshal`,
field for field as their dataclasses list them, so that a new field is carried, or refused where
`marshal` does not know its type, and never dropped. A sequence or its sampling comes out as the
same object in every step, which lets a batch builder see that a batch goes on. Both ends must be
one version of this program: `FINGERPRINT` tells whether they are. Owns no socket's life: who opened
one closes it.
"""

from __future__ import annotations

import marshal
import socket
import struct
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any, Generic, TypeVar

from twostroke.core.types import (
    BlockCopy,
    BlockSwap,
    Row,
    RowResult,
    SamplingSpec,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokenLogprob,
)

M = TypeVar("M")

_HEADER = struct.Struct("<QB")  # bytes of the body, kind of message
_RECEIVE_BYTES = 1 << 20
A_PLAN, AN_OUTCOME, FIRST_OTHER = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Broken:
    """Who runs steps cannot go on: the name of the error's class and its text."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class StepLost:
    """The executor answered a step with ExecutorLost, and its process lives on."""

    step: int
    reason: str


def encode_step(message: StepPlan | StepOutcome) -> bytes:
    """A plan or an outcome with its header. Raises ValueError for a value that cannot be sent."""
    if isinstance(message, StepPlan):
        return frame(A_PLAN, marshal.dumps(_flatten_plan(message)))
    return frame(AN_OUTCOME, marshal.dumps(_flatten_outcome(message)))


def decode_step(kind: int, body: bytes) -> StepPlan | StepOutcome:
    """What `encode_step` made of a plan or an outcome; `kind` is A_PLAN or AN_OUTCOME."""
    values = marshal.loads(body)
    return _build_plan(values) if kind == A_PLAN else _build_outcome(values)


def frame(kind: int, body: bytes) -> bytes:
    """A message's body with its header; kinds from FIRST_OTHER on are the sender's own."""
    return _HEADER.pack(len(body), kind) + body


class Decoder(Generic[M]):
    """Cuts a stream of bytes into messages; `decode` makes one of its kind and body."""

    def __init__(self, decode: Callable[[int, bytes], M]) -> None:
        self._decode = decode
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[M]:
        """The messages that are complete once `data` has come, in order."""
        self._bytes += data
        messages: list[M] = []
        at = 0
        while len(self._bytes) - at >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._bytes, at)
            end = at + _HEADER.size + length
            if len(self._bytes) < end:
                break
            messages.append(self._decode(kind, bytes(self._bytes[at + _HEADER.size : end])))
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


def _compute_fingerprint() -> int:
    kinds: list[type[Any]] = [StepPlan, Row, StepOutcome, RowResult, SequenceId, SamplingSpec]
    kinds += [BlockCopy, BlockSwap, TokenLogprob]
    facts = [
        (kind.__name__, [(each.name, str(each.type)) for each in fields(kind)]) for kind in kinds
    ]
    return zlib.crc32(repr((sys.version, facts)).encode())


# Differs where a plan or an outcome is put into bytes differently.
FINGERPRINT = _compute_fingerprint()


# ---- ends ---------------------------------------------------------------------------------------


class PeerGone(Exception):
    """The process at the other end has closed its socket, or died."""


class WaitingEnd(Generic[M]):
    """The end of a process that runs steps: it waits for messages, and any thread may send.

    Both raise PeerGone.
    """

    def __init__(self, end: socket.socket, decode: Callable[[int, bytes], M]) -> None:
        self._socket = end
        self._lock = threading.Lock()
        self._decoder = Decoder(decode)
        self._received: deque[M] = deque()

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Sends; waits while the other end does not read."""
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError as error:
            raise PeerGone from error

    def receive(self) -> M:
        """The next message; waits for it."""
        while not self._received:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise PeerGone from error
            if not data:
                raise PeerGone
            self._received.extend(self._decoder.feed(data))
        return self._received.popleft()


class EagerEnd(Generic[M]):
    """The end of a process that hands out steps: never waits.

    What the other end does not take at once is kept until `flush`. Not thread-safe for writing.
    One thread reads.
    """

    def __init__(self, end: socket.socket, decode: Callable[[int, bytes], M]) -> None:
        end.setblocking(False)
        self._socket = end
        self._decoder = Decoder(decode)
        self._unsent: deque[memoryview] = deque()

    @property
    def has_unsent(self) -> bool:
        """True when `flush` has something to do."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Sends what goes at once and keeps the rest. Raises OSError when the process is gone."""
        self._unsent.append(memoryview(data))
        self.flush()

    def flush(self) -> None:
        """Sends what goes at once. Raises OSError when the process is gone."""
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

    def receive(self) -> list[M]:
        """The messages that have come. Raises EOFError, or OSError, when the process is gone."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError("the other end of the socket is closed")
        return self._decoder.feed(data)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()
