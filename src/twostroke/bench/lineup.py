"""Which engines there are, and how each is started on a model: as a worker, and as a server.

It owns what a peer needs beside the model's file: the same weights in llama.cpp's best format, and
decoded into a Hugging Face folder for vLLM. Both are made once, by the peers' own tools, and kept
in the cache; what cannot be had is a reason, never an error.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from twostroke.bench.engines import EngineCommand, get_last_lines
from twostroke.bench.install import PEERS, explain_absence
from twostroke.bench.workloads import CHUNK, CONTEXT
from twostroke.errors import EngineError
from twostroke.weights.catalog import get_cache_dir

OURS = "twostroke"
LLAMA_CPP = "llama.cpp"
LLAMA_CPP_Q4_0 = "llama.cpp-q4_0"
OPENVINO = "openvino"
VLLM = "vllm"
TRANSFORMERS = "transformers"
ENGINES = (OURS, LLAMA_CPP, LLAMA_CPP_Q4_0, OPENVINO, VLLM, TRANSFORMERS)

ROWS = 64  # requests that a server takes at once
# llama.cpp's server keeps room for each slot apart. With 16, 32 and 64 slots it wrote 225, 243 and
# 224 tokens/s in a burst of 64, and 63 with all slots in one cache: it gets the best of these.
SLOTS = 32
SLOT_TOKENS = 1024


class PeerAbsent(EngineError):
    """A peer is not installed, or its form of the model could not be made."""


@dataclass(frozen=True, slots=True)
class Lineup:
    """One model on this machine. peers: the folder below which the environments lie."""

    model: Path
    threads: int
    peers: Path

    def get_worker(self, name: str) -> EngineCommand:
        """How to start an engine's worker. Raises PeerAbsent."""
        if name == OURS:
            command = (sys.executable, "-m", "twostroke.bench.worker", str(self.model))
            return EngineCommand(name, (*command, str(self.threads)))
        python = self.find_program(LLAMA_CPP if name == LLAMA_CPP_Q4_0 else name, "python")
        script = get_script(f"{name.removesuffix('-q4_0').replace('.', '_')}_worker.py")
        model = self.find_model(name)
        environment = {"VLLM_CPU_OMP_THREADS_BIND": self.get_cores()} if name == VLLM else {}
        return EngineCommand(name, (python, script, str(model), str(self.threads)), environment)

    def get_server(self, name: str, port: int) -> EngineCommand:
        """How to start an engine's own HTTP server. Raises PeerAbsent."""
        model, threads = str(self.find_model(name)), str(self.threads)
        if name == OURS:
            command = (sys.executable, "-m", "twostroke", "serve", model, "--port", str(port))
            return EngineCommand(name, (*command, "--threads", threads, "--max-rows", str(ROWS)))
        if name in (LLAMA_CPP, LLAMA_CPP_Q4_0):
            program = self.find_program("llama-server", "llama-server")
            flags = f"--port {port} -t {threads} -tb {threads} -fa on --parallel {SLOTS}"
            flags += f" -c {SLOTS * SLOT_TOKENS} -b {CHUNK} -ub {CHUNK} --no-ui --cache-ram 0"
            return EngineCommand(name, (program, "-m", model, *flags.split()))
        if name == VLLM:
            worker = self.get_worker(name)
            return EngineCommand(name, (*worker.command, str(port)), worker.environment)
        raise PeerAbsent(f"{name} is measured without a server")

    def find_program(self, peer: str, program: str) -> str:
        """A program of a peer's environment. Raises PeerAbsent."""
        path = (self.peers / PEERS[peer].folder / "bin" / program).absolute()
        if not path.exists():
            raise PeerAbsent(explain_absence(PEERS[peer], self.peers))
        return str(path)

    def find_model(self, name: str) -> Path:
        """The model in the form an engine reads, made if need be. Raises PeerAbsent."""
        if name == LLAMA_CPP_Q4_0:
            return self._make("Q4_0.gguf", LLAMA_CPP, "llama_cpp_quantise.py", "Q4_0")
        if name == VLLM:
            return self._make("safetensors", TRANSFORMERS, "transformers_export.py")
        return self.model

    def get_cores(self) -> str:
        """The first cores, as many as threads, the way vLLM wants them named."""
        return f"0-{self.threads - 1}"

    def _make(self, ending: str, peer: str, script: str, *more: str) -> Path:
        target = get_cache_dir() / "bench" / f"{self.model.stem}.{ending}"
        if target.exists() and target.stat().st_mtime >= self.model.stat().st_mtime:
            return target
        python = self.find_program(peer, "python")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [python, get_script(script), str(self.model), str(target), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerAbsent(f"{script} failed: {get_last_lines(done.stderr)}")
        return target


def get_script(name: str) -> str:
    """Path of a script that runs in a peer's environment."""
    return str(Path(__file__).with_name("peers") / name)


def get_context(context_tokens: int) -> int:
    """Tokens of context that every engine is given."""
    return min(CONTEXT, context_tokens)
