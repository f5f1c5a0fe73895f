"""Our side of a benchmark: one engine in a process of its own, driven by JSON lines.

The driver runs every engine like this, so that none shares memory or threads with another and all
but one are idle while that one is timed. The protocol is in `peers/__init__.py`; times come from
the engine's own clock for the request, through the public API.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from twostroke.bench.workloads import CONTEXT, MOST_ROWS
from twostroke.cli.compose import build_engine
from twostroke.cli.settings import EngineSettings
from twostroke.core.scheduler import Scheduler
from twostroke.engine.llm import OfflineLLM
from twostroke.engine.outputs import RequestOutput
from twostroke.engine.params import SamplingParams
from twostroke.weights.load import open_model

_SPARE_TOKENS = MOST_ROWS * 16  # a block for each row that is not full


def run_prefill(llm: OfflineLLM, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the first step of a prompt to its first token."""
    [output] = _generate(llm, [request["tokens"]], 1)
    times = output.timings
    return {
        "seconds": (times.first_token_ns - times.first_planned_ns) / 1e9,
        "tokens": list(output.completions[0].tokens),
    }


def run_decode(llm: OfflineLLM, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `steps` decode steps after the prompt, greedy, ends of text ignored."""
    seconds, [tokens] = _decode(llm, [request["tokens"]], request["steps"])
    return {"seconds": seconds, "tokens": tokens}


def run_batch(llm: OfflineLLM, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `steps` decode steps of all prompts together, after all have their first token."""
    seconds, tokens = _decode(llm, request["prompts"], request["steps"])
    return {"seconds": seconds, "tokens": tokens}


def _decode(llm: OfflineLLM, prompts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
    outputs = _generate(llm, prompts, steps + 1)
    first = {output.timings.first_token_ns for output in outputs}
    assert len(first) == 1, "the prompts did not fit one step, so decode and prefill were mixed"
    last = max(output.timings.ended_ns for output in outputs)
    return (last - first.pop()) / 1e9, [list(out.completions[0].tokens) for out in outputs]


def _generate(llm: OfflineLLM, prompts: list[list[int]], new_tokens: int) -> list[RequestOutput]:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    return llm.generate(prompts, params)


OPERATIONS = {"prefill": run_prefill, "decode": run_decode, "batch": run_batch}


def main() -> None:
    """Serve requests from standard input until it ends. Arguments: model, threads."""
    model, threads = Path(sys.argv[1]), int(sys.argv[2])
    with open_model(model) as opened:
        token_bytes = opened.spec.get_kv_bytes_per_token()
    pool = (CONTEXT + _SPARE_TOKENS) * token_bytes
    wanted = EngineSettings(
        model=str(model), threads=threads, max_rows=MOST_ROWS, kv_memory=pool, has_chat=False
    )
    built = build_engine(wanted)
    # The same prompts come again in every round, and each round shall read them.
    config = replace(built.parts.scheduler.config, cache_seed="")
    parts = replace(built.parts, scheduler=Scheduler(config))
    with contextlib.closing(built.model), OfflineLLM(parts) as llm:
        info = parts.executor.describe()
        ready = {"ready": f"twostroke, {info.backend}", "kv_bytes": built.settings.kv_bytes}
        print(json.dumps(ready), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(OPERATIONS[request["op"]](llm, request)), flush=True)


if __name__ == "__main__":
    main()
