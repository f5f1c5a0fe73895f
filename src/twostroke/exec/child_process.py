"""One child process as its parent sees it: the socket to it, whether it runs, and its end.

A child is a fresh interpreter, never a fork, so it holds nothing of the server's but what it is
given. The system kills a child when the *thread* that started it ends; whoever starts children
keeps a thread for that (`child_supervisor.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import Executor as Threads
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from twostroke.exec.child_memory import SharedMemory
from twostroke.exec.child_wire import Begin, Message, decode, encode, make_pair
from twostroke.exec.step_wire import EagerEnd

# argv: the socket's descriptor, the parent's process, and where it finds modules.
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from twostroke.exec.child_main import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
# The kernels have threads of their own; those of NumPy's library would only take time to start.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
_SETTLE_S = 1.0  # for how long a process whose socket is closed may take to be gone


@dataclass(frozen=True, slots=True)
class ChildSetup:
    """What a child makes its executor with (see child_wire.Begin), and of which plain values."""

    factory: str
    job: tuple[object, ...]


class ChildProcess:
    """A child that has been, or is about to be, started on a thread of `threads`.

    It can be sent plans at once: they wait in the socket.
    """

    def __init__(self, setup: ChildSetup, memory: SharedMemory, threads: Threads) -> None:
        own, theirs = make_pair()
        self.end: EagerEnd[Message] = EagerEnd(own, decode)
        sizes = memory.sizes
        places = (memory.descriptor, sizes.kv_bytes, sizes.host_bytes)
        self.end.send(encode(Begin(setup.factory, setup.job, places)))
        self._started: Future[subprocess.Popen[bytes]] = threads.submit(
            _start, theirs, memory.descriptor
        )

    @property
    def pid(self) -> int:
        """Its process id, waiting until it has one. Raises OSError when it could not be started."""
        return self._started.result().pid

    def is_stopped(self) -> bool:
        """Whether somebody stopped it (SIGSTOP), so that it will not answer; never waits."""
        if not self._started.done() or self._started.exception() is not None:
            return False
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self._started.result().pid}/stat").read_bytes()
            # The name in brackets may hold anything; the state is the first word behind it.
            return status.rpartition(b")")[2].split()[0] == b"T"
        return False

    def kill(self, timeout_s: float) -> bool:
        """End it at once, also when it is stopped; True when it is certainly gone."""
        try:
            process = self._started.result()
        except OSError:
            return True
        process.kill()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def describe_end(self) -> str:
        """How it ended, once its socket is closed."""
        try:
            status = self._started.result().wait(_SETTLE_S)
        except subprocess.TimeoutExpired:
            return "it closed its socket and still runs"
        except OSError as error:
            return f"it could not be started: {error}"
        if status < 0:
            return f"it was killed by {signal.Signals(-status).name}"
        return f"it ended with status {status}"


def _start(theirs: socket.socket, memory: int) -> subprocess.Popen[bytes]:
    with theirs:
        socket_number = str(theirs.fileno())
        arguments = [socket_number, str(os.getpid()), json.dumps(sys.path)]
        return subprocess.Popen(
            [sys.executable, "-c", _MAIN, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[theirs.fileno(), memory],
            process_group=0,
            env={**os.environ, **_ENVIRONMENT},
        )
