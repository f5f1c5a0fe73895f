"""Hugging Face Transformers' side of a benchmark: float32 weights decoded from the GGUF file.

Runs in a peer's environment and imports nothing of ours; speaks the JSON lines of
`peers/__init__.py`. PyTorch's fused attention, a growing cache, chunks of 512 tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

CHUNK = 512


class Engine:
    """One model."""

    def __init__(self, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        ).eval()
        self._kept: tuple[list[int], Any] = ([], None)

    def read_prompts(self, prompts: list[list[int]]) -> tuple[Any, Any]:
        """Compute prompts of one length; the cache and the greedy next tokens."""
        cache = transformers.DynamicCache(config=self._model.config)
        ids = torch.tensor(prompts)
        chosen = ids[:, -1]
        for start in range(0, ids.shape[1], CHUNK):
            chosen = self.compute(ids[:, start : start + CHUNK], cache)
        return cache, chosen

    def compute(self, ids: Any, cache: Any) -> Any:
        """One forward pass, which adds to the cache; the greedy token after each row."""
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1)

    def write(self, cache: Any, chosen: Any, steps: int) -> tuple[float, list[list[int]]]:
        """Seconds of `steps` steps, and for each row the token given and those written."""
        written = [chosen]
        begin = time.perf_counter()
        for _ in range(steps):
            written.append(self.compute(written[-1][:, None], cache))
        seconds = time.perf_counter() - begin
        return seconds, torch.stack(written, dim=1).tolist()


def run(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """One measurement; see peers/__init__.py."""
    if request["op"] == "prefill":
        begin = time.perf_counter()
        _, chosen = engine.read_prompts([request["tokens"]])
        return {"seconds": time.perf_counter() - begin, "tokens": chosen.tolist()}
    if request["op"] in ("decode", "batch"):
        prompts = request.get("prompts") or [request["tokens"]]
        cache, chosen = engine.read_prompts(prompts)
        seconds, written = engine.write(cache, chosen, request["steps"])
        return {"seconds": seconds, "tokens": written if "prompts" in request else written[0]}
    return {"refused": "Transformers is measured without a server"}


def main() -> None:
    """Serve requests from standard input until it ends. Arguments: model path, threads."""
    engine = Engine(Path(sys.argv[1]), int(sys.argv[2]))
    ready = f"Transformers {transformers.__version__}, PyTorch {torch.__version__}, float32"
    print(json.dumps({"ready": ready}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
