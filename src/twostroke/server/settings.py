"""What one server serves and within which limits; fixed when the app is made.

Owns the served names and the values that every reply repeats. It never changes afterwards, so
every reply of one server agrees on them.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from starlette.types import Scope

from twostroke.errors import UnknownModel
from twostroke.server.body import shorten
from twostroke.server.keys import Key
from twostroke.server.limits import Limits

if TYPE_CHECKING:
    from twostroke.engine.async_llm import AsyncLLM


class RequestTracer(Protocol):
    """Told of every request that is over, to keep a trace of it; see server/tracing.py."""

    def record(self, scope: Scope, status: int | None, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """aliases: further names the model answers to. keys: who is let in; none lets everybody in.
    is_local: answer only to names of this machine. facts: whatever the exact output depends on
    beside the model's description, as text. state: folder of the durable log; None keeps nothing
    beyond the process."""

    aliases: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    keys: tuple[Key, ...] = ()
    is_local: bool = False
    facts: str = ""
    tracer: RequestTracer | None = None
    state: Path | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """The engine and what every reply says about it. created: Unix time of the server's start."""

    engine: AsyncLLM
    settings: ServerSettings
    names: tuple[str, ...]
    fingerprint: str
    version: str
    created: int

    def check_model(self, name: str) -> None:
        """Raises UnknownModel unless `name` is served here."""
        if name not in self.names:
            raise UnknownModel(
                f"the model {shorten(name)!r} is not served here; use {self.names[0]!r}"
            )


def describe_served(engine: AsyncLLM, settings: ServerSettings) -> Served:
    """Gather what replies need to know of `engine`."""
    try:
        engine_version = version("twostroke")
    except PackageNotFoundError:  # run from a source tree that was never installed
        engine_version = "unknown"
    facts = f"{engine_version}|{engine.spec!r}|{settings.facts}"
    return Served(
        engine=engine,
        settings=settings,
        names=tuple(dict.fromkeys((engine.model_name, *settings.aliases))),
        fingerprint=f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:12]}",
        version=engine_version,
        created=int(time.time()),
    )
