"""What isolation, HTTP and the durable log cost: `python -m twostroke.bench.http [MODEL]`.

Two measurements. On one core, a server over a simulated executor whose steps take no time, and how
many tokens a second it streams. Then a real model: the same requests given to an engine in this
process, to one whose executor is a child, to that over HTTP, and to that with a durable log, in
turn, and the ratios of their rates. The client only counts bytes and looks for the end of each
stream, in a process of its own; its work is part of what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from twostroke.cli.compose import build_engine
from twostroke.cli.scheduling import build_scheduling
from twostroke.cli.settings import EngineSettings
from twostroke.core.types import Row, Token
from twostroke.engine.async_llm import AsyncLLM
from twostroke.engine.clock import MonotonicClock
from twostroke.engine.params import SamplingParams
from twostroke.errors import EngineError, TwostrokeError
from twostroke.exec.simulated import SimulatedExecutor
from twostroke.server.serve import ServeOptions, serve
from twostroke.server.settings import ServerSettings
from twostroke.spec.work import StepTotals

STREAMS = 16
PROMPT_TOKENS = 32
LAYER_TOKENS = 256  # of each stream over a simulated executor
MODEL_TOKENS = 96  # the same of a real model
LEAST_TOKENS_PER_S = 2000
MOST_OF_HTTP = 0.03
MOST_OF_LOG = 0.02
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class NoCost:
    """A StepCost of steps that take `step_ns`, whatever is in them."""

    step_ns: int

    def get_row_totals(self, new_tokens: int, context_before: int, sampled: int) -> StepTotals:
        """Nothing adds up."""
        return StepTotals()

    def predict_ns(self, totals: StepTotals) -> int:
        """The same for every step."""
        return self.step_ns

    def predict_run_ns(self, first: StepTotals, growth: StepTotals, count: int) -> list[int]:
        """The same for each of them."""
        return [self.step_ns] * count

    def predict_copy_ns(self, kv_bytes: int) -> int:
        """Nothing is moved."""
        return 0


def draw_letters(row: Row, last: Token, position: int) -> Token:
    """Tokens that are short words in the vocabulary of smollm2-135m."""
    return 260 + (position * 7 + row.start) % 1000


@contextmanager
def open_engine(
    model: str, step_ns: int | None = None, isolated: bool = False
) -> Iterator[AsyncLLM]:
    """A real engine, with a simulated executor where `step_ns` says how long its steps take.

    isolated: its executor is a child, as that of `twostroke serve` is.
    """
    wanted = EngineSettings(model=model, kv_memory="256MiB")
    built = build_engine(wanted, isolated)
    parts = built.parts
    if step_ns is not None:
        info = parts.executor.describe()
        parts.executor.close()
        clock = MonotonicClock()
        parts = replace(
            parts,
            scheduler=build_scheduling(wanted, built.settings, parts.spec).scheduler,
            executor=SimulatedExecutor(info, NoCost(step_ns), clock, draw_letters),
            clock=clock,
        )
    engine = AsyncLLM(parts)
    try:
        yield engine
    finally:
        engine.close()
        built.model.close()


@contextmanager
def run_server(engine: AsyncLLM, state: Path | None = None) -> Iterator[int]:
    """Serve from a thread; yields the port. state: the folder of its durable log, or None."""
    options = ServeOptions(port=0, grace_s=0.5, settings=ServerSettings(state=state))
    started: Future[tuple[int, Callable[[], object]]] = Future()

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell(host: str, port: int) -> None:
            started.set_result((port, lambda: loop.call_soon_threadsafe(stop.set)))

        try:
            await serve(engine, options, tell, stop)
        except TwostrokeError as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        port, stop_serving = started.result()
        try:
            yield port
        finally:
            stop_serving()
    finally:
        thread.join()


def make_prompt(stream: int) -> list[int]:
    """Tokens that no two streams share."""
    return [300 + (stream * 97 + place * 13) % 4000 for place in range(PROMPT_TOKENS)]


def stream_all(port: int, model: str, new_tokens: int) -> float:
    """Be the client of all streams; returns the seconds from first byte sent to last received.

    Raises EngineError when a stream does not end as it should.
    """
    received: dict[socket.socket, bytearray] = {}
    begin = time.perf_counter()
    for stream in range(STREAMS):
        body = json.dumps(
            {
                "model": model,
                "prompt": make_prompt(stream),
                "max_tokens": new_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection((HOST, port))
        connection.sendall(head.encode() + body)
        received[connection] = bytearray()
    _read_all(received)
    seconds = time.perf_counter() - begin
    for text in received.values():
        if f'"completion_tokens":{new_tokens}'.encode() not in text:
            raise EngineError(f"a stream ended early: {bytes(text[-300:])!r}")
    return seconds


def _read_all(received: dict[socket.socket, bytearray]) -> None:
    """Append to each what its connection sends, and close the connections as they end."""
    with selectors.DefaultSelector() as waiting:
        for connection in received:
            waiting.register(connection, selectors.EVENT_READ, connection)
        while waiting.get_map():
            for key, _ in waiting.select():
                connection = key.data
                data = connection.recv(1 << 18)
                received[connection].extend(data)
                if not data:
                    waiting.unregister(connection)
                    connection.close()


def stream_from_child(port: int, model: str, new_tokens: int) -> float:
    """`stream_all` in a process of its own."""
    code = "import sys; from twostroke.bench.http import stream_all;"
    code += "print(stream_all(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))"
    command = [sys.executable, "-c", code, str(port), model, str(new_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


async def generate_all(engine: AsyncLLM, new_tokens: int) -> float:
    """The same requests without HTTP, each stream read to its end; returns the seconds."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    async def read(stream: int) -> int:
        deltas = await engine.submit(make_prompt(stream), params)
        return sum([len(delta.tokens) async for delta in deltas])

    begin = time.perf_counter()
    counts = await asyncio.gather(*(read(stream) for stream in range(STREAMS)))
    assert set(counts) == {new_tokens}
    return time.perf_counter() - begin


def measure_layer(model: str, rounds: int) -> float:
    """Tokens a second that a server on one core streams when its steps take no time."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with open_engine(model, step_ns=1000) as engine, run_server(engine) as port:
            os.sched_setaffinity(0, cores)  # of this thread alone: children inherit it
            name = engine.model_name
            times = [stream_from_child(port, name, LAYER_TOKENS) for _ in range(rounds)]
    finally:
        os.sched_setaffinity(0, cores)
    return STREAMS * LAYER_TOKENS / statistics.median(times)


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second of one round: an engine in process, one whose executor is a child, that one
    over HTTP, and over HTTP with a durable log."""

    alone: float
    child: float
    http: float
    durable: float


def measure_model(model: str, rounds: int) -> list[Rates]:
    """Each of the four in turn, so many times."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_engine(model) as alone,
        open_engine(model, isolated=True) as child,
        run_server(child) as plain,
        run_server(child, Path(folder)) as durable,
    ):
        alone.tokenizer.prepare()
        child.tokenizer.prepare()

        def run_round(new_tokens: int, turn: int) -> Rates:
            runs: list[Callable[[], float]] = [
                lambda: asyncio.run(generate_all(alone, new_tokens)),
                lambda: asyncio.run(generate_all(child, new_tokens)),
                lambda: stream_from_child(plain, child.model_name, new_tokens),
                lambda: stream_from_child(durable, child.model_name, new_tokens),
            ]
            seconds = [0.0] * len(runs)
            for place in range(len(runs)):  # each round begins with another
                which = (turn + place) % len(runs)
                seconds[which] = runs[which]()
            return Rates(*(STREAMS * new_tokens / each for each in seconds))

        run_round(8, 0)  # warms up
        return [run_round(MODEL_TOKENS, turn) for turn in range(rounds)]


def main() -> None:
    """Measure both and print them; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m twostroke.bench.http", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    layer = measure_layer(given.model, given.rounds)
    print(f"HTTP layer on one core: {layer:,.0f} tokens/s (at least {LEAST_TOKENS_PER_S:,})")
    rounds = measure_model(given.model, given.rounds)
    alone = statistics.median(each.alone for each in rounds)
    # Of the same round: what else runs on the machine meanwhile is much the same for both.
    isolation = statistics.median(1 - each.child / each.alone for each in rounds)
    http = statistics.median(1 - each.http / each.child for each in rounds)
    log = statistics.median(1 - each.durable / each.http for each in rounds)
    print(f"{given.model}, {STREAMS} streams: engine alone {alone:.1f} tokens/s")
    print(f"its executor in a child: {isolation:.1%} less")
    print(f"that over HTTP: {http:.1%} less (at most {MOST_OF_HTTP:.0%})")
    print(f"with a durable log: {log:.1%} less (at most {MOST_OF_LOG:.0%})")
    for name in ("alone", "child", "http", "durable"):
        values = ", ".join(f"{getattr(each, name):.1f}" for each in rounds)
        print(f"  {name}: {values} tokens/s in each round")
    print(
        json.dumps(
            {
                "layer_tokens_per_s": layer,
                "rounds": [asdict(each) for each in rounds],
                "isolation_overhead": isolation,
                "http_overhead": http,
                "durable_overhead": log,
            }
        )
    )


if __name__ == "__main__":
    main()
