"""What the server and the child that runs its executor say to each other.

Plans and outcomes go as `step_wire.py` says; the few other messages are dataclasses of plain
values, sent field for field through `marshal` behind their names. Nothing is pickled: a child
makes nothing but what it knows by name.
"""

from __future__ import annotations

import marshal
import socket
from dataclasses import dataclass, fields
from typing import Any

from twostroke.core.types import StepOutcome, StepPlan
from twostroke.exec.step_wire import (
    FINGERPRINT,
    FIRST_OTHER,
    Broken,
    StepLost,
    decode_step,
    encode_step,
    frame,
)


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message to a child: make your executor.

    factory: "module:function"; it is called with `job` and the mapped memory. memory: descriptor
    in the child, bytes of the KV pool and bytes of the host blocks.
    """

    factory: str
    job: tuple[Any, ...]
    memory: tuple[int, int, int]
    fingerprint: int = FINGERPRINT


@dataclass(frozen=True, slots=True)
class Ready:
    """The child can take steps; info: the values of its ExecutorInfo, in order."""

    info: tuple[Any, ...]


Message = Begin | Ready | Broken | StepLost | StepPlan | StepOutcome
_OWN: tuple[type[Any], ...] = (Begin, Ready, Broken, StepLost)


def encode(message: Message) -> bytes:
    """The message with its header."""
    if isinstance(message, StepPlan | StepOutcome):
        return encode_step(message)
    values = tuple(getattr(message, each.name) for each in fields(message))
    return frame(FIRST_OTHER + _OWN.index(type(message)), marshal.dumps(values))


def decode(kind: int, body: bytes) -> Message:
    """The message of a kind and body. Raises ValueError, EOFError or TypeError for none of ours."""
    if kind < FIRST_OTHER:
        return decode_step(kind, body)
    if kind - FIRST_OTHER >= len(_OWN):
        raise ValueError(f"there is no message of kind {kind}")
    message: Message = _OWN[kind - FIRST_OTHER](*marshal.loads(body))
    return message


def make_pair() -> tuple[socket.socket, socket.socket]:
    """The server's and the child's end of a new socket."""
    return socket.socketpair()
