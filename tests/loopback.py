"""A real server on a loopback port, in a thread of the test's process.

It owns the thread: leaving `run_server` stops the server, which closes its engine, and waits for
both, so that a test that leaves something running fails by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scripted_llm import ScriptedLLM
from twostroke.server.serve import ServeOptions, serve
from twostroke.server.settings import ServerSettings


@dataclass
class Running:
    """A server in its thread."""

    url: str
    engine: ScriptedLLM


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails when `condition` has not come true after a time that no working server needs."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextlib.contextmanager
def run_server(engine: Any, settings: ServerSettings | None = None) -> Iterator[str]:
    """Serve `engine` from a thread; yields the base URL, and closes server and engine."""
    options = ServeOptions(port=0, settings=settings or ServerSettings(), grace_s=0.2)
    address: list[str] = []
    ready = threading.Event()
    box: list[Any] = []

    async def main() -> None:
        stop = asyncio.Event()
        box.extend((asyncio.get_running_loop(), stop))

        def tell(host: str, port: int) -> None:
            address.append(f"http://{host}:{port}")
            ready.set()

        try:
            await serve(engine, options, tell, stop)
        finally:
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(20)
    try:
        yield address[0]
    finally:
        loop, stop = box
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
