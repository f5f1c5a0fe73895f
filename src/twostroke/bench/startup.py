"""How long it takes to start: importing the package, and from a shell to the first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from twostroke.bench.engines import BenchEngine, EngineCommand
from twostroke.bench.lineup import LLAMA_CPP, OURS, Lineup
from twostroke.bench.results import summarise

PROMPT = [504, 1732, 314, 338, 260]  # five tokens, as many as the text our command is given


def measure_start(
    lineup: Lineup, names: Sequence[str], rounds: int
) -> dict[str, Mapping[str, float]]:
    """Import and start to first token, engines in turn; the first turn warms the page cache.

    Only llama.cpp starts in a time that bears comparison; how long a server takes until it is ready
    is reported for all. Raises PeerAbsent and BenchEngineFailed.
    """
    times: dict[str, list[float]] = {"import twostroke": [time_import() for _ in range(3)]}
    commands = {name: lineup.get_worker(name) for name in (OURS, LLAMA_CPP) if name in names}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            if name == OURS:
                seconds = time_first_token(lineup.model, lineup.threads)
            else:
                seconds = time_peer_first_token(command, PROMPT)
            if turn:
                times.setdefault(f"{name}, start to first token", []).append(seconds)
    return {name: summarise(values) for name, values in times.items()}


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
