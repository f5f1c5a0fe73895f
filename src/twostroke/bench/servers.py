"""Servers under load: started, waited for, measured and ended; each engine's own, one at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from twostroke.bench.client import HOST, is_healthy, send_load
from twostroke.bench.engines import (
    BenchEngine,
    BenchEngineFailed,
    EngineCommand,
    end_process,
    get_peak_bytes,
    read_last_words,
)
from twostroke.bench.lineup import LLAMA_CPP, LLAMA_CPP_Q4_0, OPENVINO, Lineup
from twostroke.bench.served import Answer, Arrival, summarise_answers

START_PATIENCE_S = 300
# The cache of llama.cpp's server would answer a later load's prompts from an earlier one's.
EXTRA: Mapping[str, Mapping[str, object]] = {
    LLAMA_CPP: {"cache_prompt": False},
    LLAMA_CPP_Q4_0: {"cache_prompt": False},
}


@dataclass(frozen=True, slots=True)
class Served:
    """One engine's answers to every load. start_s: until it said that it was ready."""

    start_s: float
    peak_bytes: int
    loads: Mapping[str, Mapping[str, float | int]] = field(default_factory=dict)


def measure_served(name: str, lineup: Lineup, loads: Mapping[str, Sequence[Arrival]]) -> Served:
    """Start an engine's server, send it one request to warm it, then every load.

    Raises PeerAbsent and BenchEngineFailed.
    """
    if name == OPENVINO:
        return _measure_in_process(lineup.get_worker(name), loads)
    port = find_port()
    with start_server(lineup.get_server(name, port), port) as (start_s, get_peak):
        extra = EXTRA.get(name, {})
        send_load(port, _make_warmup(loads), extra)
        summaries = {
            load: summarise_answers(arrivals, send_load(port, arrivals, extra))
            for load, arrivals in loads.items()
        }
        return Served(start_s, get_peak(), summaries)


def _measure_in_process(command: EngineCommand, loads: Mapping[str, Sequence[Arrival]]) -> Served:
    """An engine without an HTTP server: requests are given and times taken in its process."""
    engine = BenchEngine(command)
    try:
        _ask_load(engine, _make_warmup(loads))
        summaries = {
            load: summarise_answers(arrivals, _ask_load(engine, arrivals))
            for load, arrivals in loads.items()
        }
        return Served(engine.start_s, engine.get_peak_bytes(), summaries)
    finally:
        engine.close()


def _ask_load(engine: BenchEngine, arrivals: Sequence[Arrival]) -> list[Answer]:
    requests = [
        {"at": one.at, "tokens": list(one.prompt), "new_tokens": one.new_tokens} for one in arrivals
    ]
    answer = engine.ask(op="serve", requests=requests)
    return [Answer(tuple(one["times"]), one["tokens"]) for one in answer["requests"]]


def _make_warmup(loads: Mapping[str, Sequence[Arrival]]) -> list[Arrival]:
    first = next(iter(loads.values()))[0]
    return [Arrival(0.0, first.prompt[:64], 16)]


@contextlib.contextmanager
def start_server(command: EngineCommand, port: int) -> Iterator[tuple[float, Callable[[], int]]]:
    """A server that runs within the context; seconds until it was ready, and its peak memory.

    Raises BenchEngineFailed with its last words when it ends early or never gets ready.
    """
    with tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command.command,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env={**os.environ, **command.environment},
            start_new_session=True,
        )
        try:
            while not is_healthy(port):
                waited = time.perf_counter() - begin
                if process.poll() is not None or waited > START_PATIENCE_S:
                    what = f"ended with {process.returncode}"
                    if process.returncode is None:
                        what = f"was not ready after {waited:.0f} s"
                    words = read_last_words(errors)
                    raise BenchEngineFailed(f"{command.name}'s server {what}: {words}")
                time.sleep(0.02)
            yield time.perf_counter() - begin, lambda: get_peak_bytes(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            end_process(process, patience_s=15)
            with contextlib.suppress(ProcessLookupError):  # whatever it had started
                os.killpg(process.pid, signal.SIGKILL)


def find_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
