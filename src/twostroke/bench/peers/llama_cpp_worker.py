"""llama.cpp's side of a benchmark, through llama-cpp-python's low-level calls.

Runs in the peers' environment and imports nothing of ours; speaks the JSON lines of
`peers/__init__.py`. Flash attention on, one thread count for both strokes, chunks of 512 tokens,
the whole context allocated; only `llama_decode` and a greedy choice are timed.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

CHUNK = 512
CONTEXT = 8192
ENABLED = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED


class Engine:
    """One model with a context for one sequence, and for a while another for several."""

    def __init__(self, path: str, threads: int) -> None:
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # the library keeps the pointer
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._threads = threads
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._context = self._make_context(CONTEXT, 1)
        self._kept: list[int] = []  # the prompt whose keys and values the context holds

    def read_prompt(self, tokens: list[int]) -> int:
        """Compute a prompt from an empty cache; returns the greedy next token."""
        self._kept = []
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, False)
        for start in range(0, len(tokens), CHUNK):
            self._decode(tokens[start : start + CHUNK])
        return self._choose(self._context, -1)

    def prepare(self, tokens: list[int]) -> int:
        """Have a prompt in the cache, and only it; the greedy token after it.

        What was written after the same prompt is taken away where the cache can do that: reading
        4,096 tokens again in each round would take longer than all that is measured.
        """
        memory = llama_cpp.llama_get_memory(self._context)
        cut = len(tokens) - 1
        if self._kept == tokens and llama_cpp.llama_memory_seq_rm(memory, 0, cut, -1):
            self._decode(tokens[cut:])
            return self._choose(self._context, -1)
        first = self.read_prompt(tokens)
        self._kept = tokens
        return first

    def step(self, token: int) -> int:
        """Compute one token; returns the greedy next one."""
        self._decode([token])
        return self._choose(self._context, -1)

    def run_batch(self, prompts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
        """Decode prompts of one length together; seconds of the steps after the first token."""
        length = len(prompts[0])
        slots = len(prompts) * (length + steps + 1)
        context = self._make_context(slots, len(prompts))
        batch = llama_cpp.llama_batch_init(max(CHUNK, len(prompts) * length), 0, 1)
        try:
            written: list[list[int]] = [[] for _ in prompts]
            outputs = []
            batch.n_tokens = 0
            for row, prompt in enumerate(prompts):
                for position, token in enumerate(prompt):
                    self._add(batch, (token, position, row), position == length - 1)
                outputs.append(batch.n_tokens - 1)
            self._compute(context, batch)
            for row, place in enumerate(outputs):
                written[row].append(self._choose(context, place))
            begin = time.perf_counter()
            for step in range(steps):
                batch.n_tokens = 0
                for row, tokens in enumerate(written):
                    self._add(batch, (tokens[-1], length + step, row), True)
                self._compute(context, batch)
                for row, tokens in enumerate(written):
                    tokens.append(self._choose(context, row))
            return time.perf_counter() - begin, written
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def _make_context(self, tokens: int, rows: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = tokens
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = ENABLED
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp could not make a context of {tokens} tokens")
        return context

    def _decode(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        self._compute(self._context, llama_cpp.llama_batch_get_one(array, len(tokens)))

    @staticmethod
    def _add(batch: Any, place: tuple[int, int, int], is_output: bool) -> None:
        """Put (token, position, row) into a batch."""
        index = batch.n_tokens
        batch.token[index], batch.pos[index], batch.seq_id[index][0] = place
        batch.n_seq_id[index] = 1
        batch.logits[index] = is_output
        batch.n_tokens = index + 1

    @staticmethod
    def _compute(context: Any, batch: Any) -> None:
        code = llama_cpp.llama_decode(context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode failed with {code}")

    def _choose(self, context: Any, place: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(context, place)
        return int(np.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).argmax())


def run(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """One measurement; see peers/__init__.py."""
    if request["op"] == "batch":
        seconds, written = engine.run_batch(request["prompts"], request["steps"])
        return {"seconds": seconds, "tokens": written}
    if request["op"] == "prefill":
        begin = time.perf_counter()
        chosen = [engine.read_prompt(request["tokens"])]
        return {"seconds": time.perf_counter() - begin, "tokens": chosen}
    if request["op"] == "decode":
        chosen = [engine.prepare(request["tokens"])]
        begin = time.perf_counter()
        for _ in range(request["steps"]):
            chosen.append(engine.step(chosen[-1]))
        return {"seconds": time.perf_counter() - begin, "tokens": chosen}
    return {"refused": f"this worker has no {request['op']}"}


def main() -> None:
    """Serve requests from standard input until it ends. Arguments: model path, threads."""
    engine = Engine(sys.argv[1], int(sys.argv[2]))
    ready = f"llama.cpp, llama-cpp-python {llama_cpp.__version__}"
    print(json.dumps({"ready": ready}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
