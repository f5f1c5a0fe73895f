"""llama.cpp's side of a benchmark, through llama-cpp-python's low-level calls.

Runs in the peers' environment and imports nothing of ours; speaks the JSON lines of
`bench/worker.py`. Flash attention on, one thread count for both strokes, chunks of 512 tokens, the
whole context allocated; only `llama_decode` and a greedy choice are timed.
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
    """One model and one context."""

    def __init__(self, path: str, threads: int) -> None:
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # the library keeps the pointer
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = ENABLED
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def prefill(self, tokens: list[int]) -> int:
        """Computes a prompt from an empty cache; returns the greedy next token."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        for start in range(0, len(tokens), CHUNK):
            self._decode(tokens[start : start + CHUNK])
        return self._choose()

    def step(self, token: int) -> int:
        """Computes one token; returns the greedy next one."""
        self._decode([token])
        return self._choose()

    def _decode(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _choose(self) -> int:
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).argmax())


def run(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """One measurement; see bench/worker.py."""
    tokens = request["tokens"]
    begin = time.perf_counter()
    chosen = [engine.prefill(tokens)]
    if request["op"] == "decode":
        begin = time.perf_counter()
        for _ in range(request["steps"]):
            chosen.append(engine.step(chosen[-1]))
    return {"seconds": time.perf_counter() - begin, "tokens": chosen}


def main() -> None:
    """Serve requests from standard input until it ends. Arguments: model path, threads."""
    engine = Engine(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"ready": f"llama.cpp, llama-cpp-python {llama_cpp.__version__}"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
