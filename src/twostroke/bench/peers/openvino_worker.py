"""OpenVINO GenAI's side of a benchmark: its continuous batching pipeline on the GGUF file itself.

Runs in a peer's environment and imports nothing of ours; speaks the JSON lines of
`peers/__init__.py`. Steps of at most 512 tokens, as every engine here; no prefix cache, because the
same prompt is read in every round.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

CHUNK = 512
ROWS = 64
CACHE_GB = 2  # more than any workload fills


class Engine:
    """One pipeline that everything goes through."""

    def __init__(self, path: str, threads: int) -> None:
        config = genai.SchedulerConfig()
        config.cache_size = CACHE_GB
        config.max_num_batched_tokens = CHUNK
        config.max_num_seqs = ROWS
        config.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(path, config, "CPU", properties)
        self._ids = itertools.count()

    def add(self, tokens: list[int], new_tokens: int) -> Any:
        """A greedy request that writes exactly `new_tokens`; its handle."""
        config = genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array([tokens], dtype=np.int64))
        return self._pipeline.add_request(next(self._ids), ids, config)

    def step(self) -> bool:
        """Compute one step where there is work; False where there is none."""
        if not self._pipeline.has_non_finished_requests():
            return False
        self._pipeline.step()
        return True


def take_tokens(handle: Any) -> list[int]:
    """What a request wrote since it was last asked."""
    tokens: list[int] = []
    while handle.can_read():
        for output in handle.read().values():
            tokens += output.generated_ids
    return tokens


def run_prefill(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds from submitting a prompt to its first token."""
    begin = time.perf_counter()
    handle = engine.add(request["tokens"], 1)
    while engine.step():
        pass
    return {"seconds": time.perf_counter() - begin, "tokens": take_tokens(handle)}


def run_together(
    engine: Engine, prompts: list[list[int]], steps: int
) -> tuple[float, list[list[int]]]:
    """Seconds of the steps after every prompt has its first token."""
    handles = [engine.add(prompt, steps + 1) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    begin = 0.0
    while engine.step():
        if not begin:
            for tokens, handle in zip(written, handles, strict=True):
                tokens += take_tokens(handle)
            if all(written):
                assert all(len(tokens) == 1 for tokens in written), "prompts did not fit one step"
                begin = time.perf_counter()
    seconds = time.perf_counter() - begin
    for tokens, handle in zip(written, handles, strict=True):
        tokens += take_tokens(handle)
    return seconds, written


def run_served(engine: Engine, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each request is submitted when it is due; when each of its tokens came."""
    begin = time.perf_counter()
    waiting = sorted(range(len(requests)), key=lambda index: float(requests[index]["at"]))
    handles: dict[int, Any] = {}
    answers: list[dict[str, Any]] = [{"times": [], "tokens": 0} for _ in requests]
    while waiting or handles:
        now = time.perf_counter() - begin
        while waiting and requests[waiting[0]]["at"] <= now:
            index = waiting.pop(0)
            handles[index] = engine.add(requests[index]["tokens"], requests[index]["new_tokens"])
        if not engine.step():
            time.sleep(min(0.005, max(0.0, requests[waiting[0]]["at"] - now)) if waiting else 0)
        now = time.perf_counter() - begin
        for index, handle in list(handles.items()):
            new = len(take_tokens(handle))
            answers[index]["times"] += [now] * min(new, 1)
            answers[index]["tokens"] += new
            if answers[index]["tokens"] >= requests[index]["new_tokens"]:
                del handles[index]
    return answers


def run(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """One measurement; see peers/__init__.py."""
    if request["op"] == "prefill":
        return run_prefill(engine, request)
    if request["op"] == "decode":
        seconds, [tokens] = run_together(engine, [request["tokens"]], request["steps"])
        return {"seconds": seconds, "tokens": tokens}
    if request["op"] == "batch":
        seconds, written = run_together(engine, request["prompts"], request["steps"])
        return {"seconds": seconds, "tokens": written}
    if request["op"] == "serve":
        return {"requests": run_served(engine, request["requests"])}
    return {"refused": f"this worker has no {request['op']}"}


def main() -> None:
    """Serve requests from standard input until it ends. Arguments: model path, threads."""
    engine = Engine(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"ready": f"OpenVINO GenAI {genai.__version__}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
