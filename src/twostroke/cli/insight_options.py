"""The options of the commands that explain a running engine: explain, ablate and advise.

Groups as in options.py, read by the same readers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from twostroke.cli.options import show


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
    api_key: str | None = field(
        default=None, metadata=show("Key of a server that asks for one.", default="none")
    )
    trace_output: str | None = field(
        default=None,
        metadata=show(
            "Write steps and requests as a trace that ui.perfetto.dev opens.", metavar="FILE"
        ),
    )
    json: bool = field(
        default=False, metadata=show("Print one JSON object instead of tables.", "--json")
    )
