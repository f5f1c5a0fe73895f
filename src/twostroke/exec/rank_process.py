"""One rank as its group sees it: a process, the socket to it, and how it ended.

The process is a fresh interpreter, never a fork: a CUDA context does not survive one, and unlike
multiprocessing's children it does not run the user's main module again.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time

from twostroke import errors
from twostroke.exec.rank_wire import open_group_end
from twostroke.exec.step_wire import Broken
from twostroke.spec.ranks import RankPlace

# argv: the socket's descriptor, and where the group's interpreter finds modules.
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from twostroke.exec.rank_worker import main; main(int(sys.argv[1]))"
)
_REAP_S = 5.0  # for how long a killed process may take to go
_SETTLE_S = 0.25  # for how long the cause of a failed collective operation may take to show
_POLL_S = 0.005


class RankProcess:
    """A started rank. What it prints goes to this process's standard error."""

    def __init__(self, place: RankPlace) -> None:
        own, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _MAIN, str(theirs.fileno()), json.dumps(sys.path)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        self.place = place
        self.end = open_group_end(own)

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.place.rank} of {self.place.layout.world}"

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def was_killed(self) -> bool:
        """True when the process has ended otherwise than by its own will."""
        return self._process.poll() not in (None, 0, 1)

    def wait(self, timeout_s: float) -> bool:
        """Waits for the process to end; True when it has."""
        try:
            self._process.wait(max(timeout_s, 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Ends the process at once, also when it is stopped or sits in a collective operation."""
        self._process.kill()

    def describe_end(self) -> str:
        """How the process ended, waiting a moment for that to be known."""
        if not self.wait(_SETTLE_S):
            return f"{self.name} closed its socket and still runs"
        status = self._process.returncode
        if status < 0:
            return f"{self.name} was killed by {signal.Signals(-status).name}"
        return f"{self.name} ended with status {status}"


def end_processes(ranks: list[RankProcess], grace_s: float) -> None:
    """Waits up to `grace_s` for the ranks to end, kills those that have not, and closes sockets."""
    deadline_s = time.monotonic() + grace_s
    if grace_s:
        for rank in ranks:
            rank.wait(deadline_s - time.monotonic())
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait(_REAP_S)
        rank.end.close()


def explain(ranks: list[RankProcess], rank: RankProcess, text: str) -> str:
    """Why the group is lost when `rank` says `text`.

    A rank whose peer dies in a collective operation may speak before the peer's end is noticed, so
    the others are looked at for a moment: a process that was killed is the cause.
    """
    deadline_s = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline_s:
        for other in ranks:
            if other is not rank and other.was_killed:
                return f"{other.describe_end()}; {rank.name}: {text}"
        time.sleep(_POLL_S)
    return f"{rank.name}: {text}"


def get_text(broken: Broken) -> str:
    """An error that a rank reports: our own in full, of others the class and the first line."""
    if hasattr(errors, broken.kind):
        return broken.text
    return f"{broken.kind}: {broken.text.strip().partition(chr(10))[0]}"
