"""What a rank group and its ranks say to each other, and how it is put into bytes.

Both ends are one program on one machine, joined by a socket that only they hold, so messages may be
pickled. Plans and outcomes are most of the traffic and go as `step_wire.py` says.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twostroke.core.ports import ExecutorInfo
from twostroke.core.types import BlockId, StepOutcome, StepPlan
from twostroke.exec.step_wire import (
    FIRST_OTHER,
    Broken,
    EagerEnd,
    StepLost,
    WaitingEnd,
    decode_step,
    encode_step,
    frame,
)
from twostroke.spec.ranks import RankPlace


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


def encode(message: Message) -> bytes:
    """The message with its header."""
    if isinstance(message, StepPlan | StepOutcome):
        return encode_step(message)
    return frame(FIRST_OTHER, pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def decode(kind: int, body: bytes) -> Message:
    """The message of a kind and body."""
    if kind < FIRST_OTHER:
        return decode_step(kind, body)
    message: Message = pickle.loads(body)
    return message


GroupEnd = EagerEnd[Message]


def open_group_end(end: socket.socket) -> GroupEnd:
    """The group's end of a socket to a rank."""
    return EagerEnd(end, decode)


class RankEnd:
    """The rank's end: it waits for messages, and any of its threads may send.

    Both raise PeerGone when the group has closed its end, or died.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = WaitingEnd(end, decode)

    def send(self, message: Message) -> None:
        """Sends; waits while the group does not read."""
        self._end.send(encode(message))

    def receive(self) -> Message:
        """The next message; waits for it."""
        return self._end.receive()
