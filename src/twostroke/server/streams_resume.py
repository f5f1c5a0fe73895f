"""Goes on with the requests that an earlier process left unfinished, and tells kept streams again.

It knows the APIs whose streams are kept: how the body that a client sent becomes parameters and
events once more. What is made again from the same body, prompts, seeds and tokens is the same, so
nothing of it is written down. A request that cannot be gone on with exactly ends, with the reason:
the model or the version has changed, or the server has died of it again and again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from twostroke.engine.service import Sender
from twostroke.errors import EngineClosed, RequestFailed, TwostrokeError
from twostroke.server.durable import DurableLog
from twostroke.server.durable_records import (
    ACCEPTED,
    ENDED,
    OUTPUT,
    RESUMED,
    Accepted,
    read_cached,
    read_item,
    read_record,
    write_record,
)
from twostroke.server.events import Writer
from twostroke.server.generation import Generation, Past, PromptSource, Submission, TokenStream
from twostroke.server.settings import Served
from twostroke.server.streams import FAILED, End, Entry, Journal
from twostroke.server.streams_replay import EndedStream

logger = logging.getLogger("twostroke.server")

MAX_RESUMES = 3  # with nothing emitted in between


class Api(Protocol):
    """One API whose streams are kept: makes again, of what a client sent, what it was made of."""

    def build_submission(self, accepted: Accepted) -> Submission: ...

    def build_writer(self, accepted: Accepted, output: PromptSource) -> Writer: ...

    def build_last(self, accepted: Accepted, generation: Generation) -> dict[str, Any]: ...


def read_entries(log: DurableLog, journal: Journal) -> list[Entry]:
    """Enter what the log holds; returns the requests that have not ended, in order of acceptance.

    Counts in `journal.num_abandoned` those whose clients cannot come back, and says in the server's
    log what could not be read.
    """
    entries: dict[str, Entry] = {}
    replies: set[str] = set()
    unread = 0
    for payload in log.recovered:
        try:
            kind, request_id, value = read_record(payload)
            if kind == ACCEPTED:
                accepted = Accepted(**value)
                if accepted.is_kept:
                    entry = entries[request_id] = Entry(accepted, [payload])
                    entry.num_bytes = len(payload)
                else:
                    replies.add(request_id)
            elif kind == ENDED and value is None:
                entries.pop(request_id, None)
                replies.discard(request_id)
            else:
                _enter(entries[request_id], kind, value, payload)
        except (ValueError, TypeError, KeyError):
            unread += 1
    log.recovered = []
    if log.dropped_bytes or unread:
        logger.warning(
            "the durable log ended with %d bytes that are no record, and %d records could not be "
            "read; both were dropped",
            log.dropped_bytes,
            unread,
        )
    journal.num_abandoned = len(replies)
    if replies:
        logger.warning(
            "%d requests ended with the earlier server; they did not stream", len(replies)
        )
    ended = sorted(
        ((entry.end.at, entry) for entry in entries.values() if entry.end is not None),
        key=lambda pair: pair[0],
    )
    open_entries = [entry for entry in entries.values() if entry.end is None]
    for entry in (*(entry for _, entry in ended), *open_entries):
        journal.restore(entry)
    for request_id in replies:
        journal.forget_reply(request_id)
    return open_entries


def _enter(entry: Entry, kind: str, value: Any, payload: bytes) -> None:
    if kind == OUTPUT:
        for item in value:
            cached = read_cached(item)
            if cached is not None:
                entry.cached[cached[0]] = cached[1]
        entry.resumes = 0
    elif kind == RESUMED:
        entry.resumes += 1
    elif kind == ENDED:
        entry.end = End(*value)
    entry.records.append(payload)
    entry.num_bytes += len(payload)


async def resume(entry: Entry, api: Api, served: Served, journal: Journal) -> None:
    """Go on with a request from its last token, with nobody to read it yet; or end it."""
    accepted = entry.accepted
    refusal = ""
    if accepted.fingerprint != served.fingerprint:
        refusal = "the server came back with another model or version, which may go on differently"
    elif entry.resumes >= MAX_RESUMES:
        refusal = f"the server died {MAX_RESUMES} times while it ran this request"
    try:
        if refusal:
            raise RequestFailed(refusal)
        generation = await _submit_rest(entry, api.build_submission(accepted), served)
    except EngineClosed as error:
        entry.interrupted = error
    except TwostrokeError as error:
        logger.error("request %s does not go on: %s", accepted.id, error)
        journal.end(entry, End(FAILED, str(error), {}, time.time()))
    else:
        journal.enter(entry, write_record(RESUMED, accepted.id, None))
        journal.num_resumed += 1
        journal.run(entry, generation, partial(api.build_last, accepted, generation))


@dataclass(slots=True)
class _Progress:
    """What a request has emitted: tokens of each choice, those that ended, and prompts scored."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    scored: set[int] = field(default_factory=set)


def _measure_progress(entry: Entry) -> _Progress:
    progress = _Progress()
    for record in entry.records:
        kind, _, value = read_record(record)
        for item in value if kind == OUTPUT else ():
            choice, delta = read_item(item, lambda token: b"")
            progress.tokens.setdefault(choice, []).extend(delta.tokens)
            if delta.ending is not None:
                progress.ended.add(choice)
            if delta.prompt_logprobs:
                progress.scored.add(choice)
    return progress


async def _submit_rest(entry: Entry, submission: Submission, served: Served) -> Generation:
    accepted, progress, n = entry.accepted, _measure_progress(entry), submission.params.n
    sender = Sender(accepted.tenant, accepted.cache_scope)
    streams: list[TokenStream] = []
    for place, (prompt, seed) in enumerate(zip(accepted.prompts, accepted.seeds, strict=True)):
        choices = range(place * n, place * n + n)
        if progress.ended.issuperset(choices):
            streams.append(EndedStream(tuple(prompt), seed))
            continue
        params = replace(submission.params, seed=seed)
        if not progress.scored.isdisjoint(choices):
            params = replace(params, prompt_logprobs=None)
        resumed = tuple(
            None if choice in progress.ended else tuple(progress.tokens.get(choice, ()))
            for choice in choices
        )
        stream = await served.engine.resume(
            prompt,
            params,
            resumed if any(resumed) or None in resumed else (),
            request_id=f"{submission.request_id}-{place}",
            priority=submission.priority,
            sender=sender,
        )
        streams.append(stream)
    emitted = sum(map(len, progress.tokens.values()))
    return Generation(streams, replace(submission, sender=sender), Past(emitted, entry.cached))
