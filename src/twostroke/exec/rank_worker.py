"""The process of one rank: it makes an executor and runs the plans that the group sends.

Every rank gets every plan, in the same order; the rank that samples answers, the others only when
they fail. Started by `rank_process.py`. It must never outlive its group: a thread watches the
socket, because the main thread may sit in a collective operation for ever.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

from twostroke.core.ports import Executor, StepAnswer
from twostroke.core.types import StepOutcome, StepPlan
from twostroke.errors import ExecutorLost
from twostroke.exec.rank_wire import (
    Begin,
    Close,
    KvBytes,
    RankContext,
    RankEnd,
    ReadKv,
    Ready,
    WriteKv,
)
from twostroke.exec.step_wire import Broken, PeerGone, StepLost

_log = logging.getLogger(__name__)

MakeExecutor = Callable[[RankContext, object], Executor]


@runtime_checkable
class _LentExecutor(Protocol):
    """An executor that runs what was started when it is lent a thread (see engine.loop)."""

    def run_pending(self) -> object: ...


def main(descriptor: int) -> None:
    """Runs a rank over the socket `descriptor`, then ends the process.

    Nothing is torn down beyond what the executor's own `close` does: the system does it faster.
    """
    # Ctrl-C reaches every process of a terminal; the group decides when its ranks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = socket.socket(fileno=descriptor)
    threading.Thread(target=_watch, args=(end.fileno(),), daemon=True).start()
    status = serve(RankEnd(end))
    logging.shutdown()
    os._exit(status)


def serve(end: RankEnd) -> int:
    """Makes the executor, takes messages until told to end; returns the process's exit status."""
    executor: Executor | None = None
    try:
        begin = end.receive()
        assert isinstance(begin, Begin)
        executor = begin.factory(begin.context, begin.job)
        end.send(Ready(executor.describe()))
        _run(end, executor, begin.context.place.is_sampling)
        executor.close()
    except PeerGone:
        return 1
    except Exception as error:  # noqa: BLE001 outermost frame: the group hears why a rank ends
        _log.exception("a rank cannot go on")
        end.send(Broken(type(error).__name__, str(error)))
        return 1
    return 0


def _run(end: RankEnd, executor: Executor, is_sampling: bool) -> None:
    """Takes messages until `Close`."""
    run_pending = executor.run_pending if isinstance(executor, _LentExecutor) else None
    answer = partial(_answer, end, is_sampling)
    while True:
        message = end.receive()
        match message:
            case StepPlan():
                executor.start(message, partial(answer, message.step))
                if run_pending is not None:
                    run_pending()
            case ReadKv(blocks):
                end.send(KvBytes(executor.read_kv(blocks)))
            case WriteKv(data, blocks):
                executor.write_kv(data, blocks)
                end.send(KvBytes(b""))
            case Close():
                return
            case _:
                raise AssertionError(f"a rank cannot be sent {type(message).__name__}")


def _answer(end: RankEnd, is_sampling: bool, step: int, answer: StepAnswer) -> None:
    """Passes a step's answer on; on whatever thread the executor answers."""
    try:
        if isinstance(answer, ExecutorLost):
            end.send(StepLost(step, str(answer)))
        elif is_sampling:
            assert isinstance(answer, StepOutcome)
            end.send(answer)
    except PeerGone:
        pass  # the main thread, or the one that watches, ends the process


def _watch(descriptor: int) -> None:
    """Ends the process when the group's end of the socket closes."""
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is told unasked, and messages are not
    poll.poll()
    os._exit(1)
