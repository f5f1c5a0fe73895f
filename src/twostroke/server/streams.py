"""Journal: the API requests whose output is kept, so that a client can come back for the rest.

Owns every kept request from its acceptance until it is forgotten, in memory and, where there is a
durable log, in that. Output is entered here before a client sees it, in the order it is sent, so
the events of a stream are a function of its entry: whoever reads it again gets the same ones. It
must never let a full disk end a stream: the log is then given up, and that is said.

A finished entry is forgotten after a while, and the oldest go first when there are many. An end
that only this process knows of, because its engine was closed, is not entered: the next process
over the same log goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from twostroke.errors import EngineClosed, TwostrokeError
from twostroke.server.durable import DurableLog
from twostroke.server.durable_records import (
    ENDED,
    OUTPUT,
    Accepted,
    read_item,
    read_record,
    write_accepted,
    write_item,
    write_output,
    write_record,
)
from twostroke.server.generation import Batch, Generation, to_failure
from twostroke.server.logprobs import GetBytes

logger = logging.getLogger("twostroke.server")

KEEP_S = 3600.0  # what has ended, before it is forgotten
KEEP_STORED_S = 24 * 3600.0  # the same of a stored response
MAX_ENDED = 1000
MAX_ENDED_BYTES = 64 * 2**20
SWEEP_S = 60.0  # between two looks for what is old
COMPACT_BYTES = 16 * 2**20  # a log below this is left alone

FINISHED, FAILED, CANCELLED = "finished", "failed", "cancelled"


@dataclass(frozen=True, slots=True)
class End:
    """How a kept request ended: FINISHED, FAILED or CANCELLED, with what its reply ends with, and
    the Unix time."""

    how: str
    message: str
    last: dict[str, Any]
    at: float


@dataclass(slots=True, eq=False)
class Entry:
    """One kept request: what was accepted, its output as records, and its end once it has one.

    interrupted: why this process gives no more of it, although it has not ended. generation: what
    runs of it here. resumes: restarts since it last emitted anything. cached: of each prompt, how
    many tokens needed no computing.
    """

    accepted: Accepted
    records: list[bytes]
    end: End | None = None
    interrupted: TwostrokeError | None = None
    generation: Generation | None = None
    resumes: int = 0
    num_bytes: int = 0
    cached: dict[int, int] = field(default_factory=dict)
    _waited_for: asyncio.Event | None = None  # by who wants what comes next

    @property
    def is_over(self) -> bool:
        """True when nothing more will come here."""
        return self.end is not None or self.interrupted is not None

    def wake(self) -> None:
        """Something has come; whoever waits looks again."""
        if self._waited_for is not None:
            self._waited_for.set()
            self._waited_for = None

    async def _wait_for_more(self) -> None:
        if self._waited_for is None:
            self._waited_for = asyncio.Event()
        await self._waited_for.wait()

    def read(self, get_bytes: GetBytes, begin: int = 0, end: int | None = None) -> Iterator[Batch]:
        """The output so far, of these records."""
        for payload in self.records[begin:end]:
            kind, _, value = read_record(payload)
            if kind == OUTPUT:
                yield [read_item(item, get_bytes) for item in value]

    async def wait(self) -> None:
        """Return once nothing more will come."""
        while not self.is_over:
            await self._wait_for_more()

    async def batches(self, get_bytes: GetBytes) -> AsyncGenerator[Batch, None]:
        """All output from the beginning, and what comes, as it comes.

        Raises: TwostrokeError where the request ends other than finished.
        """
        place = 0
        while True:
            known = len(self.records)
            for batch in self.read(get_bytes, place, known):
                yield batch
            place = known
            if place < len(self.records):
                continue
            if self.is_over:
                break
            await self._wait_for_more()
        if self.end is None:
            assert self.interrupted is not None
            raise self.interrupted
        if self.end.how != FINISHED:
            raise to_failure(self.end.message)


class Record:
    """The pen of one entry; only whoever runs the request has it."""

    def __init__(self, journal: Journal, entry: Entry, generation: Generation) -> None:
        self._journal = journal
        self._entry = entry
        self._generation = generation

    def append(self, batch: Batch) -> None:
        """Enter output, before anybody sees it."""
        if self._entry.is_over:
            return
        entry, items = self._entry, []
        for choice, delta in batch:
            place = choice // self._generation.choices_each
            cached = None
            if place not in entry.cached:
                cached = place, self._generation.get_timings()[place].cached_tokens
                entry.cached[place] = cached[1]
            items.append(write_item(choice, delta, cached))
        self._journal.enter(entry, write_output(entry.accepted.id, items))

    def finish(self, last: dict[str, Any]) -> None:
        """All output was entered; `last` is what the reply ends with."""
        self._end(FINISHED, "", last)

    def fail(self, error: TwostrokeError) -> None:
        """It ended with an error. That the engine was closed is no end: it goes on later."""
        if isinstance(error, EngineClosed):
            self._interrupt(error)
        else:
            self._end(FAILED, str(error), {})

    def cancel(self, why: str) -> None:
        """Nobody wants the rest; does nothing after the end."""
        self._end(CANCELLED, why, {})

    def leave(self) -> None:
        """Nobody here goes on with it; does nothing after the end."""
        self._interrupt(EngineClosed("the server stopped while it ran this request"))

    def _interrupt(self, error: TwostrokeError) -> None:
        if not self._entry.is_over:
            self._entry.interrupted = error
            self._entry.wake()

    def _end(self, how: str, message: str, last: dict[str, Any]) -> None:
        if not self._entry.is_over:
            self._journal.end(self._entry, End(how, message, last, time.time()))


class Journal:
    """All kept requests of one server; belongs to its event loop.

    log: where they are kept beyond this process, or None. num_abandoned: requests of an earlier
    process that nobody could come back for.
    """

    def __init__(self, log: DurableLog | None = None) -> None:
        self._log = log
        self._ended: dict[str, End] = {}  # in the order of their ends
        self._ended_bytes = 0
        self._replies: dict[str, bytes] = {}  # of requests that are not kept, while they run
        self._swept_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self.entries: dict[str, Entry] = {}
        self.num_resumed = self.num_abandoned = 0

    def get(self, request_id: str) -> Entry | None:
        """A kept request that is not forgotten yet."""
        self._forget_old()
        return self.entries.get(request_id)

    def open(self, accepted: Accepted, generation: Generation) -> Record:
        """Keep a request that has just been accepted; its output is entered by the record."""
        entry = Entry(accepted, [write_accepted(accepted)], generation=generation)
        self.entries[accepted.id] = entry
        self._write(entry, entry.records[0])
        return Record(self, entry, generation)

    def forget_reply(self, request_id: str) -> None:
        """A request whose output is not kept has ended."""
        self._replies.pop(request_id, None)
        self._append(write_record(ENDED, request_id, None))

    @contextlib.contextmanager
    def note_reply(self, accepted: Accepted) -> Iterator[None]:
        """Remember, while it runs, a request whose output is not kept."""
        if self._log is None:
            yield
            return
        self._replies[accepted.id] = payload = write_accepted(accepted)
        self._append(payload)
        try:
            yield
        finally:
            self.forget_reply(accepted.id)

    def enter(self, entry: Entry, payload: bytes) -> None:
        """Add a record to an entry, and wake who reads it."""
        entry.records.append(payload)
        self._write(entry, payload)
        entry.wake()

    def end(self, entry: Entry, end: End) -> None:
        """The last word on an entry."""
        entry.end, entry.generation = end, None
        value = [end.how, end.message, end.last, end.at]
        self.enter(entry, write_record(ENDED, entry.accepted.id, value))
        self._note_ended(entry, end)
        self._forget_old()

    def cancel(self, entry: Entry, why: str) -> None:
        """End an entry that runs, and what runs of it; does nothing after the end."""
        if entry.is_over:
            return
        generation = entry.generation
        self.end(entry, End(CANCELLED, why, {}, time.time()))
        if generation is not None:
            generation.cancel()

    def forget(self, request_id: str) -> None:
        """Drop an entry that has ended; another id changes nothing."""
        entry = self.entries.get(request_id)
        if entry is not None and entry.end is not None:
            del self.entries[request_id], self._ended[request_id]
            self._ended_bytes -= entry.num_bytes
            self._append(write_record(ENDED, request_id, None))

    def restore(self, entry: Entry) -> None:
        """Take in an entry that was read from the log."""
        self.entries[entry.accepted.id] = entry
        if entry.end is not None:
            self._note_ended(entry, entry.end)

    def run(
        self, entry: Entry, generation: Generation, get_last: Callable[[], dict[str, Any]]
    ) -> None:
        """Run a request to its end with no client that could end it."""
        entry.generation = generation
        self._start(_drain(generation, Record(self, entry, generation), get_last))

    def close(self) -> None:
        """Enter nothing any more; what has not ended is gone on with by the next process."""
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def _note_ended(self, entry: Entry, end: End) -> None:
        self._ended[entry.accepted.id] = end
        self._ended_bytes += entry.num_bytes

    # ---- the log --------------------------------------------------------------------------------

    def _write(self, entry: Entry, payload: bytes) -> None:
        entry.num_bytes += len(payload)
        self._append(payload)

    def _append(self, payload: bytes) -> None:
        if self._log is None:
            return
        try:
            self._log.append(payload)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.error("the durable log cannot be written, so nothing is durable now: %s", error)
        self.close()

    def _forget_old(self) -> None:
        """Drop what is old, now and then, and the oldest while there is too much; tidy the log."""
        now = time.time()
        if now > self._swept_at + SWEEP_S:
            self._swept_at = now
            for request_id, end in list(self._ended.items()):
                stored = self.entries[request_id].accepted.facts.get("stored")
                if end.at + (KEEP_STORED_S if stored else KEEP_S) < now:
                    self.forget(request_id)
        while len(self._ended) > MAX_ENDED or self._ended_bytes > MAX_ENDED_BYTES:
            self.forget(next(iter(self._ended)))
        if self._is_log_long():
            self._start(self._compact())

    def _is_log_long(self) -> bool:
        """Whether more than half of a long log is of what was forgotten."""
        log = self._log
        if log is None or log.is_compacting or log.size <= COMPACT_BYTES:
            return False
        return log.size > 2 * sum(entry.num_bytes for entry in self.entries.values())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compact(self) -> None:
        # Nothing may be appended between this look at what is kept and the log's own beginning,
        # so both are here, and not with who asked for it: tasks begin later.
        log = self._log
        if log is None or not self._is_log_long():
            return
        kept = [record for entry in self.entries.values() for record in entry.records]
        try:
            await log.compact([*kept, *self._replies.values()])
        except OSError as error:
            if self._log is log:  # else it was closed or given up meanwhile
                self._give_up(error)


async def _drain(
    generation: Generation, record: Record, get_last: Callable[[], dict[str, Any]]
) -> None:
    try:
        async with contextlib.aclosing(generation.batches()) as batches:
            async for batch in batches:
                record.append(batch)
        record.finish(get_last())
    except TwostrokeError as error:
        record.fail(error)
    finally:
        record.leave()
