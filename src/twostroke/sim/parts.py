"""Parts: one simulation split over processes, each with a share of the replicas.

Owns the processes and nothing of what is simulated. Every process is a copy of this one, pulls the
same arrivals, routes all of them alike and simulates the replicas of its part; what they recorded,
merged, is what one process would have recorded, to the last value. A process that ends before it
has answered is an error here and never a wait, and none outlives the process that started it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twostroke.errors import EngineError, TwostrokeError
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster, Part
from twostroke.sim.records import Records

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess

# A part costs a process, columns for all requests and a few microseconds for each request of
# another part: below the first it takes longer, above the second mostly memory.
_LEAST_REQUESTS = 1_000
_MOST_PARTS = 16
_CHECK_EVERY = 1_024  # arrivals

MakeCluster = Callable[[Part], Cluster]
Arrive = Callable[[Part], Iterable[Arrival]]


def count_parts(replicas: int, requests: int, processors: int) -> int:
    """In how many parts about so many requests are simulated soonest."""
    return max(1, min(replicas, processors, requests // _LEAST_REQUESTS, _MOST_PARTS))


def run_parts(make: MakeCluster, arrive: Arrive, count: int) -> Records:
    """Simulate in `count` processes, of which this is one, and merge what they recorded.

    make: the cluster of a part. arrive: the arrivals, the same for every part. Both are called
    once in each process, here for part 0. Raises what the simulation raises, and EngineError when
    another process ended too early; none is left either way.
    """
    first, *others = (Part(index, count) for index in range(count))
    children: list[_Child] = []
    with ExitStack() as ending:
        for part in others:
            child = _start(make, arrive, part)
            ending.callback(child.end)
            children.append(child)
        records = make(first).run(_watch(arrive(first), children))
        for child in children:
            records.merge(child.take_records())
    return records


@dataclass(slots=True, eq=False)
class _Child:
    """A process that simulates one part, and where its answer comes from."""

    part: Part
    process: ForkProcess
    answers: Connection

    def check(self) -> None:
        """Raise EngineError if it has ended without an answer."""
        code = self.process.exitcode
        if code:
            killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else ""
            raise EngineError(
                f"the process that simulated part {self.part.index + 1} of {self.part.of} of the "
                f"replicas {killed or f'failed with code {code}, as shown above'}"
            )

    def take_records(self) -> Records:
        """Wait for its answer. Raises EngineError when there is none."""
        try:
            answer = self.answers.recv()
        except (EOFError, OSError):  # none, or one that breaks off
            self.process.join()
            self.check()
            raise
        if isinstance(answer, Records):
            return answer
        raise EngineError(answer)

    def end(self) -> None:
        """Let nothing of it remain."""
        self.process.kill()
        self.process.join()
        self.answers.close()


def _start(make: MakeCluster, arrive: Arrive, part: Part) -> _Child:
    from multiprocessing import get_context

    context = get_context("fork")
    answers, answer_to = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(make, arrive, part, answer_to), daemon=True)
    try:
        process.start()
    except OSError as error:
        raise EngineError(f"no process for a part of the replicas: {error.strerror}") from error
    # Held by its process alone, so that its end is heard.
    answer_to.close()
    return _Child(part, process, answers)


def _watch(arrivals: Iterable[Arrival], children: Sequence[_Child]) -> Iterator[Arrival]:
    """The arrivals, while no process has failed. Raises EngineError."""
    for count, arrival in enumerate(arrivals):
        if count % _CHECK_EVERY == 0:
            for child in children:
                child.check()
        yield arrival


# ---- in the other processes ---------------------------------------------------------------------


def _run(make: MakeCluster, arrive: Arrive, part: Part, answer_to: Connection) -> None:
    """Simulate one part and answer with its records, or why there are none."""
    # An interrupt reaches all processes of a terminal; the first hears it and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer: Records | str
    try:
        answer = make(part).run(arrive(part))
    except TwostrokeError as error:
        answer = str(error)
    answer_to.send(answer)


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however that happened."""
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None, "only a process that was started here runs a part"
    parent.join()
    os._exit(1)
