"""Our side of a benchmark: one engine in a process of its own, driven by JSON lines.

The driver runs every engine like this, so that none shares memory or threads with another and all
but one are idle while that one is timed. A request is one line {"op", ...}, its answer one line.
Times come from the engine's own clock for the request, through the public API.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from twostroke.cli.compose import LLM
from twostroke.engine.outputs import RequestOutput
from twostroke.engine.params import SamplingParams


def run_prefill(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the first step of a prompt to its first token."""
    output = _generate(llm, request["tokens"], 1)
    times = output.timings
    return {
        "seconds": (times.first_token_ns - times.first_planned_ns) / 1e9,
        "tokens": list(output.completions[0].tokens),
    }


def run_decode(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `steps` decode steps after the prompt, greedy, ends of text ignored."""
    output = _generate(llm, request["tokens"], request["steps"] + 1)
    times = output.timings
    return {
        "seconds": (times.ended_ns - times.first_token_ns) / 1e9,
        "tokens": list(output.completions[0].tokens),
    }


def _generate(llm: LLM, tokens: list[int], new_tokens: int) -> RequestOutput:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    [output] = llm.generate([tokens], params)
    return output


OPERATIONS = {"prefill": run_prefill, "decode": run_decode}


def main() -> None:
    """Serve requests from standard input until it ends. Arguments: model, threads."""
    model, threads = sys.argv[1], int(sys.argv[2])
    with LLM(model, threads=threads, max_rows=1) as llm:
        info = llm.built.parts.executor.describe()
        print(json.dumps({"ready": f"twostroke, {info.backend}"}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(OPERATIONS[request["op"]](llm, request)), flush=True)


if __name__ == "__main__":
    main()
