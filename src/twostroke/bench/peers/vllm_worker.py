"""vLLM's side of a benchmark: its CPU build, on a folder decoded from the GGUF file.

Runs in a peer's environment and imports nothing of ours; speaks the JSON lines of
`peers/__init__.py`. The engine runs in this process and its steps are driven one by one, so that a
decode is timed from the first token to the last. Steps of at most 512 tokens, no prefix cache;
bfloat16 where the processor multiplies it, which is this engine's fastest, float32 elsewhere. With
a port it becomes vLLM's own server with the same settings.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from typing import Any

CHUNK = 512
ROWS = 64
CONTEXT = 8192
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def choose_dtype() -> str:
    """The arithmetic that is fastest on this processor."""
    with open("/proc/cpuinfo") as info:
        return "bfloat16" if "avx512_bf16" in info.read() else "float32"


class Engine:
    """One engine that everything goes through."""

    def __init__(self, folder: str) -> None:
        import vllm  # reads the environment, and takes seconds

        self._llm = vllm.LLM(
            folder,
            dtype=choose_dtype(),
            max_model_len=CONTEXT,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=ROWS,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._params = vllm.SamplingParams
        self._ids = itertools.count()
        self.description = f"vLLM {vllm.__version__}, CPU, {choose_dtype()}"

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[float], list[list[int]]]:
        """Moments at which all prompts were given, had a first token, and were done; the tokens."""
        params = self._params(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        engine = self._llm.llm_engine
        moments = [time.perf_counter()]
        rows = {str(next(self._ids)): row for row in range(len(prompts))}
        written: list[list[int]] = [[] for _ in prompts]
        for name, row in rows.items():
            engine.add_request(name, {"prompt_token_ids": prompts[row]}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                row = rows[output.request_id]
                written[row] = list(output.outputs[0].token_ids)
            if len(moments) == 1 and all(written):
                moments.append(time.perf_counter())
        moments.append(time.perf_counter())
        return moments, written


def run(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """One measurement; see peers/__init__.py."""
    if request["op"] == "prefill":
        moments, [tokens] = engine.run([request["tokens"]], 1)
        return {"seconds": moments[1] - moments[0], "tokens": tokens}
    if request["op"] in ("decode", "batch"):
        prompts = request.get("prompts") or [request["tokens"]]
        moments, written = engine.run(prompts, request["steps"] + 1)
        return {
            "seconds": moments[2] - moments[1],
            "tokens": written if "prompts" in request else written[0],
        }
    return {"refused": f"this worker has no {request['op']}"}


def serve(folder: str, port: str) -> None:
    """Become the server."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", folder, "--host", "127.0.0.1", "--port", port]
    command += ["--dtype", choose_dtype(), "--max-model-len", str(CONTEXT)]
    command += ["--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", str(ROWS)]
    command += ["--no-enable-prefix-caching", "--disable-log-stats", "--uvicorn-log-level", "error"]
    os.execv(sys.executable, command)


def main() -> None:
    """Answer standard input until it ends. Arguments: model folder, threads, port of a server."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if len(sys.argv) > 3:
        serve(sys.argv[1], sys.argv[3])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answers = os.fdopen(os.dup(1), "w")  # the library prints to standard output
    os.dup2(2, 1)
    engine = Engine(sys.argv[1])
    print(json.dumps({"ready": engine.description}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
