"""`twostroke serve`: puts an engine together and runs the HTTP server over it."""

from __future__ import annotations

import ipaddress
import logging
import sys
from dataclasses import replace
from pathlib import Path

from twostroke.cli import options
from twostroke.cli.compose import BuiltEngine, build_engine
from twostroke.cli.keys import gather_keys
from twostroke.cli.settings import EngineSettings, get_machine_settings
from twostroke.cli.summary import format_summary
from twostroke.engine.async_llm import AsyncLLM
from twostroke.server.logs import configure_logging
from twostroke.server.serve import ServeOptions, run
from twostroke.server.settings import ServerSettings
from twostroke.server.tracing import build_tracer
from twostroke.spec.device import DeviceSpec
from twostroke.weights.catalog import get_cache_dir
from twostroke.weights.digest import get_digest


def run_serve(
    model: str,
    serving: options.ServeOptions,
    scheduling: options.SchedulingOptions,
    on: options.MachineOptions,
) -> None:
    """Serve until told to stop. Raises TwostrokeError."""
    keys = gather_keys(serving.api_key, serving.key_file)
    configure_logging()
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
        ),
        isolated=True,
    )
    # Before anybody waits: later it would hold up everything that is being streamed.
    built.parts.tokenizer.prepare()
    print(format_summary(built), file=sys.stderr)

    is_local = not keys and is_loopback(serving.host)
    settings = ServerSettings(
        keys=keys,
        is_local=is_local,
        facts=describe_facts(built),
        tracer=build_tracer(),
        state=get_state_folder(built.parts.model_name, serving),
    )
    if not keys and not is_local:
        logging.getLogger("twostroke.server").warning(
            "whoever reaches %s may use this server: set --api-key or --key-file", serving.host
        )

    def announce(host: str, port: int) -> None:
        engine.prepare_grammars()  # beside what comes first, so that it delays no start
        shown = f"[{host}]" if ":" in host else host
        print(f"  serving on http://{shown}:{port}/v1", file=sys.stderr, flush=True)

    try:
        engine = AsyncLLM(replace(built.parts, limits=find_limits(built)))
        run(engine, ServeOptions(host=serving.host, port=serving.port, settings=settings), announce)
    finally:
        built.model.close()


def find_limits(built: BuiltEngine) -> DeviceSpec | None:
    """The limits that every step is compared with; None on a GPU, whose memory is taken by now."""
    if built.settings.is_on_gpu:
        return None
    from twostroke.cli.limits import measure_limits

    return measure_limits(built.settings)


def get_state_folder(model: str, serving: options.ServeOptions) -> Path | None:
    """Where unfinished streams are kept for the next server of this model on this port.

    None without `--durable`, and on port 0, where nobody would find the next server.
    """
    if not serving.durable or serving.port == 0:
        return None
    name = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in model)
    return get_cache_dir() / "state" / f"{name}-{serving.port}"


def describe_facts(built: BuiltEngine) -> str:
    """What an exact output depends on beside the model's description: the bytes of the weights,
    the kernels with their instruction set, and how keys, values and weights are stored."""
    settings = built.settings
    facts = (
        get_digest(built.model.identities),
        built.parts.executor.describe().backend,
        settings.kv_element.value,
        settings.weights,
        str(settings.exact),
    )
    return "|".join(facts)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
