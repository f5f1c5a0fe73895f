"""A load on the real engine: the requests of arrivals, sent when their time has come, and recorded.

Owns the sender and its prompts. It shares the engine's process and must not disturb it: everything
that can be made beforehand is, so that sending is one function handed to the engine's thread, and
nobody looks at what comes back before the run is over. Answers end by length, as the load says.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from twostroke.core.types import Token
from twostroke.engine.metrics import EngineStats
from twostroke.engine.outputs import OutputDelta
from twostroke.engine.params import SamplingParams
from twostroke.engine.recording import Header, Recording, RecordingScheduler
from twostroke.engine.request import RequestState
from twostroke.engine.service import EngineParts, EngineService
from twostroke.errors import InvalidRequest, RequestFailed
from twostroke.sim.arrivals import Arrival

_LEAD_S = 0.25  # between the last preparation and the first request
_CPU_TIMES = Path("/proc/stat")
_SHARED, _OWN = "shared", "own"


@dataclass(frozen=True, slots=True)
class RealRun:
    """What a load left behind. late_ns: how much later than meant each request was sent, rising.

    rejected: requests that were turned away. others_share: of the machine's cores, what other
    processes and other guests of its host took meanwhile; None where the system does not say.
    """

    recording: Recording
    stats: EngineStats
    late_ns: Sequence[int]
    rejected: int
    others_share: float | None


def run_load(parts: EngineParts, arrivals: Sequence[Arrival], header: Header) -> RealRun:
    """Send every request at its time, wait for the last token, and close the engine.

    header: of the recording; the arrivals are added. Raises RequestFailed when the engine failed.
    """
    recorder = RecordingScheduler(parts.scheduler)
    service = EngineService(replace(parts, scheduler=recorder.as_scheduler()))
    try:
        ended = threading.Semaphore(0)
        states = [
            _make_state(service, ended, arrival, index) for index, arrival in enumerate(arrivals)
        ]
        gc.collect()
        gc.freeze()  # what was prepared need not be looked through while the engine runs
        before_s, own_s = _read_busy_s(), time.process_time()
        begin_s = time.monotonic()
        meant_ns, late_ns, rejected = _send(service, parts, states, arrivals)
        for _ in range(len(states) - rejected):
            ended.acquire()
        lasted_s, own_s = time.monotonic() - begin_s, time.process_time() - own_s
        after_s = _read_busy_s()
        stats = service.get_stats()
    finally:
        gc.unfreeze()
        service.close()
    if stats.ended["failed"]:
        raise RequestFailed(f"{stats.ended['failed']} requests failed: see the log")
    recording = Recording(replace(header, arrivals=meant_ns), tuple(recorder.inputs))
    share = None
    if before_s is not None and after_s is not None:
        cores = os.cpu_count() or 1
        share = max(0.0, (after_s - before_s - own_s) / (lasted_s * cores))
    return RealRun(recording, stats, sorted(late_ns), rejected, share)


def _send(
    service: EngineService,
    parts: EngineParts,
    states: Sequence[RequestState],
    arrivals: Sequence[Arrival],
) -> tuple[dict[str, int], list[int], int]:
    """When each was meant to be sent, how late it was, and how many were turned away."""
    now_ns, sleep = parts.clock.now_ns, time.sleep
    start_ns = now_ns() + round(_LEAD_S * 1e9)
    meant_ns: dict[str, int] = {}
    late_ns, futures = [], []
    for state, arrival in zip(states, arrivals, strict=True):
        at_ns = meant_ns[state.request.id] = start_ns + arrival.time_ns
        left_ns = at_ns - now_ns()
        if left_ns > 0:
            sleep(left_ns / 1e9)
        late_ns.append(now_ns() - at_ns)
        futures.append(service.submit([state]))
    rejected = 0
    for future in futures:
        try:
            future.result()
        except InvalidRequest:
            rejected += 1
    return meant_ns, late_ns, rejected


def _make_state(
    service: EngineService, ended: threading.Semaphore, arrival: Arrival, index: int
) -> RequestState:
    """A request ready to be sent, which releases `ended` on the engine's thread when it ends."""

    def take(deltas: Sequence[OutputDelta], has_ended: bool) -> None:
        if has_ended:
            ended.release()

    vocab_size = service.parts.scheduler.config.vocab_size
    params = SamplingParams(
        temperature=0.0, max_tokens=arrival.new_tokens, ignore_eos=True, seed=index
    )
    request = service.make_request(params, str(index), draw_prompt(arrival, index, vocab_size))
    request = replace(
        request,
        priority=arrival.priority,
        tenant=arrival.tenant,
        ttft_ns=arrival.ttft_ns,
        itl_ns=arrival.itl_ns,
    )
    return service.make_state(request, params, take)


def _read_busy_s() -> float | None:
    """Seconds that the machine's cores were not idle, all together and since its start."""
    try:
        words = _CPU_TIMES.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, soft_irq, steal = map(int, words)
    except (OSError, ValueError):
        return None
    ticks = user + nice + system + irq + soft_irq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def draw_prompt(arrival: Arrival, index: int, vocab_size: int) -> tuple[Token, ...]:
    """Random tokens: those of a shared part follow from its number, the rest from the request's.

    So prompts begin alike exactly where the load says, as in a simulation.
    """
    tokens: list[Token] = []
    for part in arrival.prefix:
        tokens += _draw(f"{_SHARED} {part}", arrival.prefix_tokens, vocab_size)
    tokens += _draw(f"{_OWN} {index}", arrival.prompt_tokens - len(tokens), vocab_size)
    return tuple(tokens[: arrival.prompt_tokens])


def _draw(seed: str, count: int, vocab_size: int) -> list[Token]:
    generator = random.Random(seed)
    return [generator.randrange(vocab_size) for _ in range(count)]
