"""Routers: which replica serves an arrival.

Each is a small object that is told of every request it sent and of its end, and knows nothing else
of the replicas: no queue lengths, no caches. So it decides as a router in front of real servers
would, and its answers depend on arrivals and endings alone. Ties go to the replica with the lowest
number.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from twostroke.errors import InvalidParameter
from twostroke.sim.arrivals import Arrival


class Router(Protocol):
    """Sends requests to replicas, which have numbers from 0.

    choose: the replica for a request, taken as sent; -1 when all have closed. end: a request that
    was sent there has ended. close: a replica takes no more requests.
    """

    def choose(self, arrival: Arrival) -> int: ...

    def end(self, replica: int, arrival: Arrival) -> None: ...

    def close(self, replica: int) -> None: ...


def count_request(arrival: Arrival) -> int:
    """A request weighs 1."""
    return 1


def count_tokens(arrival: Arrival) -> int:
    """A request weighs its tokens, those to come as well as those of its prompt."""
    return arrival.prompt_tokens + arrival.new_tokens


class RoundRobin:
    """Every replica in turn."""

    def __init__(self, replicas: int) -> None:
        self._open = list(range(replicas))
        self._next = 0

    def choose(self, arrival: Arrival) -> int:
        """The replica after the one before."""
        if not self._open:
            return -1
        self._next %= len(self._open)
        self._next += 1
        return self._open[self._next - 1]

    def end(self, replica: int, arrival: Arrival) -> None:
        """Nothing to note."""

    def close(self, replica: int) -> None:
        """Leave a replica out from now on."""
        place = self._open.index(replica)
        del self._open[place]
        self._next -= place < self._next


class LoadTable:
    """What is outstanding at each replica, and which has the least.

    A heap with an entry for every change; those that no longer hold are dropped when they come up,
    or all together when they are most.
    """

    def __init__(self, replicas: int) -> None:
        self.loads = [0] * replicas
        self._closed = [False] * replicas
        self._heap = [(0, replica) for replica in range(replicas)]

    def add(self, replica: int, weight: int) -> None:
        """Change the load of `replica` by `weight`."""
        load = self.loads[replica] = self.loads[replica] + weight
        if self._closed[replica]:
            return
        heapq.heappush(self._heap, (load, replica))
        if len(self._heap) > 8 * len(self.loads) + 64:
            self._heap = [
                (load, replica)
                for replica, load in enumerate(self.loads)
                if not self._closed[replica]
            ]
            heapq.heapify(self._heap)

    def find_least(self) -> int:
        """The open replica with the least load; -1 when there is none."""
        heap = self._heap
        while heap and (self._closed[heap[0][1]] or self.loads[heap[0][1]] != heap[0][0]):
            heapq.heappop(heap)
        return heap[0][1] if heap else -1

    def is_open(self, replica: int) -> bool:
        """False once it was closed."""
        return not self._closed[replica]

    def close(self, replica: int) -> None:
        """Leave a replica out from now on."""
        self._closed[replica] = True


class LeastLoaded:
    """The replica with the least outstanding; weigh: what a request counts."""

    def __init__(self, replicas: int, weigh: Callable[[Arrival], int] = count_request) -> None:
        self._table = LoadTable(replicas)
        self._weigh = weigh

    def choose(self, arrival: Arrival) -> int:
        """The replica with the least outstanding."""
        replica = self._table.find_least()
        if replica >= 0:
            self._table.add(replica, self._weigh(arrival))
        return replica

    def end(self, replica: int, arrival: Arrival) -> None:
        """Its weight is no longer outstanding."""
        self._table.add(replica, -self._weigh(arrival))

    def close(self, replica: int) -> None:
        """Leave a replica out from now on."""
        self._table.close(replica)


class PrefixAware:
    """The replica where the request adds least work: outstanding tokens, and those of its own.

    A prompt's shared parts that a replica was sent before count as cached there, so similar prompts
    stay together until the others have so much less to do that computing the prefix anew is
    cheaper. Kept is, for each of the `most` chains of parts used last, the replica it was sent to
    last; a chain is a number, so that long ones take no more room than short ones.
    """

    def __init__(self, replicas: int, most: int = 1 << 16) -> None:
        self._table = LoadTable(replicas)
        self._most = most
        # (chain before, part) → (chain with the part, replica), least recently used first
        self._chains: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()
        self._next_chain = 1

    def choose(self, arrival: Arrival) -> int:
        """The replica with the least of outstanding tokens and prompt tokens it does not know."""
        table = self._table
        best = table.find_least()
        if best < 0:
            return -1
        least, chain, known = table.loads[best] + arrival.prompt_tokens, 0, 0
        for part in arrival.prefix:
            found = self._chains.get((chain, part))
            if found is None:
                break
            chain, replica = found
            known = min(known + arrival.prefix_tokens, arrival.prompt_tokens)
            cost = table.loads[replica] + arrival.prompt_tokens - known
            if table.is_open(replica) and cost < least:
                best, least = replica, cost
        self._remember(arrival.prefix, best)
        table.add(best, count_tokens(arrival))
        return best

    def end(self, replica: int, arrival: Arrival) -> None:
        """Its tokens are no longer outstanding."""
        self._table.add(replica, -count_tokens(arrival))

    def close(self, replica: int) -> None:
        """Leave a replica out from now on."""
        self._table.close(replica)

    def _remember(self, prefix: tuple[int, ...], replica: int) -> None:
        """Every beginning of `prefix` was sent to `replica` last."""
        chains, before = self._chains, 0
        for part in prefix:
            found = chains.get((before, part))
            chain = self._next_chain if found is None else found[0]
            self._next_chain += found is None
            chains[before, part] = (chain, replica)
            chains.move_to_end((before, part))
            before = chain
        while len(chains) > self._most:
            chains.popitem(last=False)


ROUTERS: tuple[str, ...] = ("round-robin", "least-requests", "least-tokens", "prefix-aware")


def make_router(name: str, replicas: int) -> Router:
    """The router of that name. Raises InvalidParameter for another name or no replica."""
    if replicas < 1:
        raise InvalidParameter("replicas", f"must be at least 1, not {replicas}")
    if name == "round-robin":
        return RoundRobin(replicas)
    if name == "least-requests":
        return LeastLoaded(replicas)
    if name == "least-tokens":
        return LeastLoaded(replicas, count_tokens)
    if name == "prefix-aware":
        return PrefixAware(replicas)
    raise InvalidParameter("router", f"{name!r} is none of {', '.join(ROUTERS)}")
