"""`twostroke serve`: puts an engine together and runs the HTTP server over it."""

from __future__ import annotations

import sys

from twostroke.cli import options
from twostroke.cli.compose import build_engine
from twostroke.cli.settings import EngineSettings, get_machine_settings
from twostroke.cli.summary import format_summary
from twostroke.engine.async_llm import AsyncLLM
from twostroke.server.serve import ServeOptions, run


def run_serve(
    model: str,
    serving: options.ServeOptions,
    scheduling: options.SchedulingOptions,
    on: options.MachineOptions,
) -> None:
    """Serve until told to stop. Raises TwostrokeError."""
    built = build_engine(
        EngineSettings(
            model=model,
            **get_machine_settings(on),
            kv_memory=serving.kv_memory,
            step_tokens=serving.step_tokens,
            max_rows=serving.max_rows,
            policy=scheduling.policy,
            pace=scheduling.pace,
            ttft_target_ms=scheduling.ttft_target_ms,
            itl_target_ms=scheduling.itl_target_ms,
            drafts=serving.drafts,
            host_memory=serving.host_memory,
        )
    )
    # Before anybody waits: later it would hold up everything that is being streamed.
    built.parts.tokenizer.prepare()
    print(format_summary(built), file=sys.stderr)

    def announce(host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        print(f"  serving on http://{shown}:{port}/v1", file=sys.stderr, flush=True)

    try:
        run(AsyncLLM(built.parts), ServeOptions(host=serving.host, port=serving.port), announce)
    finally:
        built.model.close()
