"""The options of the commands that explain a running engine: explain, ablate and advise.

Groups as in options.py, read by the same readers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from twostroke.cli.options import CLIENT_KEY, JSON_FOR_TABLES, THREADS, show


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions:
    """Which request is explained, and how."""

    model: str | None = field(
        default=None,
        metadata=show(
            "Run --prompt on this model and explain it.", is_argument=True, metavar="[MODEL]"
        ),
    )
    url: str | None = field(
        default=None, metadata=show("Explain a request of the server here instead.", metavar="URL")
    )
    request: str | None = field(
        default=None,
        metadata=show("Its id, as in the reply.", default="the last that ended", metavar="ID"),
    )
    prompt: str | None = field(
        default=None, metadata=show("What to run, as it is.", "--prompt", "-p")
    )
    max_tokens: int = field(
        default=64, metadata=show("New tokens of --prompt.", "--max-tokens", "-n", least=1)
    )
    api_key: str | None = field(default=None, metadata=CLIENT_KEY)
    trace_output: str | None = field(
        default=None,
        metadata=show(
            "Write steps and requests as a trace that ui.perfetto.dev opens.", metavar="FILE"
        ),
    )
    json: bool = field(default=False, metadata=JSON_FOR_TABLES)


@dataclass(frozen=True, slots=True, kw_only=True)
class AblateOptions:
    """On which model techniques are compared, and which."""

    model: str = field(
        default="smollm2-135m",
        metadata=show("A known name, or a file.", is_argument=True, metavar="[MODEL]"),
    )
    only: str | None = field(
        default=None,
        metadata=show(
            "Some techniques, with commas; a wrong name lists them.",
            default="all",
            metavar="NAMES",
        ),
    )
    threads: int | None = field(default=None, metadata=THREADS)
    output: list[str] | None = field(
        default=None,
        metadata=show(
            "Write the gains as a picture (.png, .svg); may be given several times.",
            metavar="FILE",
        ),
    )
    json: bool = field(
        default=False, metadata=show("Print one JSON object instead of a table.", "--json")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviseOptions:
    """Which server is looked at."""

    url: str = field(
        default="http://127.0.0.1:8000", metadata=show("The server's address.", metavar="URL")
    )
    api_key: str | None = field(default=None, metadata=CLIENT_KEY)
    plan: str | None = field(
        default=None,
        metadata=show(
            "Compare with the plan it was set up by: what `plan --json` printed.", metavar="FILE"
        ),
    )
    json: bool = field(
        default=False, metadata=show("Print one JSON object instead of text.", "--json")
    )
