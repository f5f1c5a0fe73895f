"""Runs the application on a socket until it is told to stop.

Owns the listening socket, the signals and the order of the end: nothing new is taken on, running
requests have time to finish, then the engine is closed, which ends what is left with an error that
says so, and only then does the call return. One process; the engine has its own thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from twostroke.errors import InvalidParameter
from twostroke.server.app import create_app
from twostroke.server.limits import Traffic
from twostroke.server.protocol import build_protocol
from twostroke.server.settings import ServerSettings

if TYPE_CHECKING:
    from twostroke.engine.async_llm import AsyncLLM

Ready = Callable[[str, int], None]

# Time for replies to end after the engine has been closed under them.
_CLOSING_S = 5
_SEND_BUFFER_BYTES = 128 * 2**10
# The model's files, the executor's, the log's.
_OTHER_DESCRIPTORS = 512

logger = logging.getLogger("twostroke.server")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where and how to serve. port: 0 takes a free one. grace_s: seconds that running requests
    have to finish once the server is told to stop."""

    host: str = "127.0.0.1"
    port: int = 8000
    settings: ServerSettings = field(default_factory=ServerSettings)
    grace_s: float = 10.0


def run(
    engine: AsyncLLM, options: ServeOptions = ServeOptions(), ready: Ready | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, then close the engine and return.

    Args: ready: called once with the host and the port in use, when connections are accepted.
    Raises: InvalidParameter when the address cannot be bound; the engine is closed then too.
    """
    asyncio.run(serve(engine, options, ready))


async def serve(
    engine: AsyncLLM,
    options: ServeOptions = ServeOptions(),
    ready: Ready | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """As `run`, within a running loop; `stop` ends it as a signal does."""
    stop = stop or asyncio.Event()
    try:
        with listen(options.host, options.port) as listener, _stop_on_signals(stop):
            traffic = Traffic()
            _raise_descriptors(options.settings.limits.connections)
            app = create_app(engine, options.settings, traffic)
            server = uvicorn.Server(_configure(app, options, traffic))

            async def stop_when_told() -> None:
                await stop.wait()
                traffic.is_draining = True
                server.should_exit = True
                await asyncio.sleep(options.grace_s)
                await asyncio.to_thread(engine.close)

            stopper = asyncio.ensure_future(stop_when_told())
            try:
                await app.state.streams.resume_all()
                if ready is not None:
                    ready(options.host, listener.getsockname()[1])
                await server.serve(sockets=[listener])
            finally:
                app.state.streams.close()
                stopper.cancel()
                await asyncio.gather(stopper, return_exceptions=True)
    finally:
        await asyncio.to_thread(engine.close)


def _configure(app: FastAPI, options: ServeOptions, traffic: Traffic) -> uvicorn.Config:
    # Logging is the caller's to set up (logs.py); requests have a line of ours there.
    limits = options.settings.limits
    protocol: Any = build_protocol(limits, traffic)
    return uvicorn.Config(
        app,
        http=protocol,
        access_log=False,
        log_config=None,
        log_level="warning",
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=math.ceil(limits.idle_s),
        timeout_graceful_shutdown=int(options.grace_s) + _CLOSING_S,
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: connections queue from now on, also before the loop accepts them.

    Raises: InvalidParameter naming the address when it cannot be had.
    """
    if not 0 <= port <= 65535:
        raise InvalidParameter("port", f"must be from 0 to 65535, not {port}")
    try:
        # The protocol must be named: asyncio turns off the kernel's delay of small writes only on
        # sockets that say they are TCP, and with it each event of a stream may wait 40 ms.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. Left to itself the system keeps megabytes for each that is slow.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> InvalidParameter:
    return InvalidParameter("port", f"cannot listen on {host}:{port}: {error.strerror or error}")


def _raise_descriptors(connections: int) -> None:
    """Have as many file descriptors as connections may need, as far as the system allows."""
    try:
        import resource
    except ImportError:  # not a Unix: it has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most < wanted:
        logger.warning("only %d files may be open, fewer than %d connections need", most, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def _stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    # uvicorn takes the signals too, to stop at once on a second SIGINT, and raises them again when
    # it is done. These handlers make that harmless, so that the engine is closed in any case.
    loop = asyncio.get_running_loop()
    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
