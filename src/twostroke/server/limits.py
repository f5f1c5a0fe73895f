"""What one server takes on at most, and what it tells those it turns away.

Owns every limit's default and the counts they are held against: connections, requests of each key,
the engine's queue. It keeps true that whoever is turned away hears when to ask again, estimated
from the queue and from how fast it was served lately. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from twostroke.errors import EngineClosed, Overloaded
from twostroke.server.generation import Generation
from twostroke.server.keys import Key

if TYPE_CHECKING:
    from twostroke.engine.service import EngineLoad

# A rate needs so long of a busy engine, and forgets what is older than that.
_LEAST_WINDOW_S = 5.0
_MOST_WINDOW_S = 60.0
_UNKNOWN_RETRY_S = 10.0
_MOST_RETRY_S = 600.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes are bytes, times seconds; docs/server.md explains each.

    body_bytes: of a request. queue: continuations that may wait for KV blocks when another request
    comes. queue_s: longest a request waits to be begun, expected or in fact; inf for ever.
    streams_per_key: requests of one key at once. connections: open at once. idle_s: of a connection
    without a request. header_s, body_s: for a request's head and body to arrive. stall_s: for a
    client to take what was written to it. write_bytes: kept for it by the system and, beyond, by
    the server.
    """

    body_bytes: int = 8 * 2**20
    queue: int = 1024
    queue_s: float = 300.0
    streams_per_key: int = 256
    connections: int = 2048
    idle_s: float = 30.0
    header_s: float = 10.0
    body_s: float = 60.0
    stall_s: float = 30.0
    write_bytes: int = 64 * 2**10


@dataclass(slots=True)
class _Bucket:
    """Requests that a key may still make; filled as time passes."""

    level: float
    filled_s: float


@dataclass(slots=True)
class Traffic:
    """What comes in: open connections, requests of each tenant now, those refused by reason.

    is_draining: the server was told to stop; nothing new is taken on.
    """

    connections: int = 0
    requests: Counter[bytes] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    is_draining: bool = False


class ServiceRate:
    """How many requests a second leave a busy engine, from counts noted as others arrive."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, load: EngineLoad, now_s: float) -> None:
        """Take in the engine's counts; an idle engine has no rate."""
        if not load.waiting:
            self._seen.clear()
        if not self._seen or now_s - self._seen[-1][0] >= 1.0:
            self._seen.append((now_s, load.ended))
        while now_s - self._seen[0][0] > _MOST_WINDOW_S and len(self._seen) > 1:
            self._seen.popleft()

    def get_wait_s(self, load: EngineLoad, now_s: float) -> float | None:
        """Seconds until those who wait now have been served; None while nobody knows."""
        if not self._seen:
            return None
        span_s, ended = now_s - self._seen[0][0], load.ended - self._seen[0][1]
        if span_s < _LEAST_WINDOW_S or not ended:
            return None
        return load.waiting * span_s / ended


class Admission:
    """Lets requests in, or raises Overloaded with the time to come back."""

    def __init__(
        self,
        limits: Limits,
        traffic: Traffic,
        get_load: Callable[[], EngineLoad],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._traffic = traffic
        self._get_load = get_load
        self._now_s = now_s
        self._rate = ServiceRate()
        self._buckets: dict[bytes, _Bucket] = {}

    @contextlib.contextmanager
    def count(self, key: Key | None) -> Iterator[None]:
        """Hold a request against its key's limits while it runs.

        Raises: EngineClosed while the server drains; Overloaded.
        """
        if self._traffic.is_draining:
            raise EngineClosed("the server is shutting down; send the request again later")
        if key is None:
            yield
            return
        self._take_rate(key)
        running = self._traffic.requests
        if running[key.digest] >= self._limits.streams_per_key:
            most = self._limits.streams_per_key
            raise Overloaded("streams", f"this key has {most} requests running, the most", 1.0)
        running[key.digest] += 1
        try:
            yield
        finally:
            running[key.digest] -= 1
            if not running[key.digest]:
                del running[key.digest]

    def check_queue(self) -> None:
        """Raises Overloaded while the engine's queue is full, or longer than anybody may wait."""
        load, now_s = self._get_load(), self._now_s()
        self._rate.note(load, now_s)
        wait_s = self._rate.get_wait_s(load, now_s)
        if load.waiting >= self._limits.queue:
            raise Overloaded(
                "queue_length", f"{load.waiting} requests are waiting, the most", _bound(wait_s)
            )
        if wait_s is not None and wait_s > self._limits.queue_s:
            raise Overloaded(
                "queue_wait", f"a request would wait for about {wait_s:.0f} s", _bound(wait_s)
            )

    def watch(self, generation: Generation) -> None:
        """End a request that was not begun within the longest wait, as if it were refused."""
        if math.isinf(self._limits.queue_s):
            return
        # A weak reference: what has ended must not be kept for as long as it might have waited.
        asyncio.get_running_loop().call_later(
            self._limits.queue_s, self._expire, weakref.ref(generation)
        )

    def _expire(self, reference: weakref.ref[Generation]) -> None:
        generation = reference()
        if generation is None or any(one.first_planned_ns for one in generation.get_timings()):
            return
        load = self._get_load()
        wait_s = _bound(self._rate.get_wait_s(load, self._now_s()))
        waited = f"the request waited for {self._limits.queue_s:g} s and was not begun"
        generation.end(Overloaded("queue_age", waited, wait_s))

    def _take_rate(self, key: Key) -> None:
        """One request out of the key's bucket, which holds and regains `per_minute` (a token
        bucket, RFC 2697 §3 with one rate)."""
        if key.per_minute is None:
            return
        now_s, most = self._now_s(), float(key.per_minute)
        bucket = self._buckets.setdefault(key.digest, _Bucket(most, now_s))
        bucket.level = min(most, bucket.level + (now_s - bucket.filled_s) * most / 60)
        bucket.filled_s = now_s
        if bucket.level < 1:
            wait_s = (1 - bucket.level) * 60 / most
            most_text = f"this key may make {key.per_minute} requests a minute"
            raise Overloaded("rate", most_text, wait_s)
        bucket.level -= 1


def _bound(wait_s: float | None) -> float:
    return _UNKNOWN_RETRY_S if wait_s is None else min(max(1.0, wait_s), _MOST_RETRY_S)
