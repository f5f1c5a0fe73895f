"""How long it takes to start: importing the package, and from a shell to the first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from twostroke.bench.engines import BenchEngine, EngineCommand


def time_import() -> float:
    """Seconds `import twostroke` takes in a fresh interpreter, its own start not counted."""
    code = "import time; t = time.perf_counter(); import twostroke; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def time_first_token(model: Path, threads: int) -> float:
    """Seconds from starting `twostroke generate` to the first byte of its answer."""
    command = [sys.executable, "-m", "twostroke", "generate", str(model)]
    command += ["--raw", "--prompt", "The capital of France is", "--max-tokens", "1"]
    command += ["--threads", str(threads)]
    with tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
        process.stdout.close()
        process.wait()
        errors.seek(0)
        assert process.returncode == 0, errors.read().decode(errors="replace")
        assert first, "the answer was empty"
    return seconds


def time_peer_first_token(command: EngineCommand, prompt: list[int]) -> float:
    """Seconds from starting a peer's worker to its first token."""
    begin = time.perf_counter()
    engine = BenchEngine(command)
    try:
        answer = engine.ask(op="prefill", tokens=prompt)
        seconds = time.perf_counter() - begin
    finally:
        engine.close()
    assert answer["tokens"], json.dumps(answer)
    return seconds
