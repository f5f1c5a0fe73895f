"""The child's side: it makes an executor over memory it was given, and runs plans one by one.

Started by `child_process.py`. It knows no request, only KV bytes, and those are the parent's. It
must never outlive its parent: the system kills it when the parent dies, also when it is stopped.
Signals of a terminal or a service manager go to whole groups of processes; when a child ends is
for the parent to say.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, NoReturn

from twostroke.core.ports import StepAnswer
from twostroke.core.types import StepPlan
from twostroke.errors import DeviceError, ExecutorLost
from twostroke.exec.child_memory import MappedMemory, MemorySizes
from twostroke.exec.child_wire import Begin, Message, Ready, decode, encode
from twostroke.exec.local import LocalExecutor
from twostroke.exec.step_wire import FINGERPRINT, Broken, PeerGone, StepLost, WaitingEnd

MakeExecutor = Callable[[tuple[Any, ...], MappedMemory], LocalExecutor]

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def main(descriptor: int, parent: int) -> None:
    """Runs a child over the socket `descriptor`, then ends the process.

    parent: the process that must be alive; nothing is torn down, the system does it faster.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it died before the system was told
    os._exit(serve(WaitingEnd(socket.socket(fileno=descriptor), decode)))


def serve(end: WaitingEnd[Message]) -> int:
    """Makes the executor and runs plans until nobody sends; returns the process's exit status."""
    try:
        begin = end.receive()
        assert isinstance(begin, Begin)
        if begin.fingerprint != FINGERPRINT:
            raise DeviceError("this program was changed on disk since the server started")
        descriptor, *sizes = begin.memory
        memory = MappedMemory(descriptor, MemorySizes(*sizes))
        os.close(descriptor)
        executor = _find_factory(begin.factory)(begin.job, memory)
        end.send(encode(Ready(astuple(executor.describe()))))
        _run(end, executor, memory)
    except PeerGone:
        return 0
    except Exception as error:  # noqa: BLE001 outermost frame: the parent hears why a child ends
        with contextlib.suppress(PeerGone):
            end.send(encode(Broken(type(error).__name__, str(error))))
        return 1


def _find_factory(name: str) -> MakeExecutor:
    module, _, function = name.partition(":")
    factory: MakeExecutor = getattr(importlib.import_module(module), function)
    return factory


def _run(end: WaitingEnd[Message], executor: LocalExecutor, memory: MappedMemory) -> NoReturn:
    """Takes plans until the parent is gone, which raises PeerGone."""
    while True:
        plan = end.receive()
        assert isinstance(plan, StepPlan)
        step = plan.step

        def answer(answer: StepAnswer, step: int = step) -> None:
            if isinstance(answer, ExecutorLost):
                end.send(encode(StepLost(step, str(answer))))
            else:
                end.send(encode(answer))

        memory.mark_begun(step)
        executor.start(plan, answer)
        executor.run_pending()
