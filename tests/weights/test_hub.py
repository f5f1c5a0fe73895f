"""The Hugging Face hub's client is driven rightly, against a hub of the test's own on loopback.

The client reads its endpoint when it is imported, so each pull runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model_files import make_folder, make_gguf
from twostroke.weights.load import open_model

pytestmark = pytest.mark.slow  # each pull imports the client in a process of its own

REVISION = "a" * 40


@dataclass
class FakeHub:
    """One repository, acme/tiny: its files, the status of all answers, and what was fetched."""

    files: dict[str, bytes]
    status: int = 200
    served: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serve(hub: FakeHub) -> Iterator[str]:
    """Serve the part of the hub's protocol that a download needs; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            if hub.status != 200:
                headers = {"X-Error-Code": "GatedRepo"} if hub.status == 403 else {}
                self.reply(hub.status, b"", headers)
            elif not path.removeprefix("/api/models").startswith("/acme/tiny"):
                self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif path.startswith("/api/"):
                siblings = [{"rfilename": name, "size": len(hub.files[name])} for name in hub.files]
                info = {"id": "acme/tiny", "sha": REVISION, "siblings": siblings}
                self.reply(200, json.dumps(info).encode(), {})
            else:
                self.send_file(path.split(f"/resolve/{REVISION}/")[1], with_body)

        def send_file(self, name: str, with_body: bool) -> None:
            content = hub.files[name]
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": REVISION,
            }
            if not with_body:
                self.reply(200, content, headers, with_body=False)
                return
            hub.served.append(name)
            self.reply(200, content, headers)

        def reply(
            self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def pull(name: str, endpoint: str, cache: Path) -> str:
    """Pull in a fresh process; gives the path, or the error's type and text."""
    program = (
        "import sys\n"
        "from twostroke.errors import TwostrokeError\n"
        "from twostroke.weights.pull import pull\n"
        "try:\n"
        "    print(pull(sys.argv[1]))\n"
        "except TwostrokeError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TWOSTROKE_CACHE": str(cache),
    }
    command = [sys.executable, "-c", program, name]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_repository_is_fetched_without_what_serving_does_not_need(tmp_path: Path) -> None:
    files = read_folder(make_folder("qwen3").write(tmp_path / "m"))
    files |= {"pytorch_model.bin": b"pickle", "model/../../x.safetensors": b"astray"}
    hub = FakeHub(files)
    with serve(hub) as endpoint:
        path = Path(pull("acme/tiny", endpoint, tmp_path / "cache"))
        assert sorted(hub.served) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert sorted(read_folder(path)) == sorted(hub.served)
        with open_model(path) as model:
            assert model.spec.family == "qwen3"
        assert pull("acme/tiny", endpoint, tmp_path / "cache") == str(path)
        assert len(hub.served) == 3


def test_one_gguf_file_of_a_repository_is_fetched_alone(tmp_path: Path) -> None:
    content = make_gguf("llama").write(tmp_path / "m.gguf").read_bytes()
    hub = FakeHub({"m.gguf": content, "other.gguf": b""})
    with serve(hub) as endpoint:
        path = Path(pull("acme/tiny:m.gguf", endpoint, tmp_path / "cache"))
        said = pull("acme/tiny:none.gguf", endpoint, tmp_path / "cache")
    assert path.read_bytes() == content
    assert hub.served == ["m.gguf"]
    assert said == "DownloadFailed acme/tiny: the repository has no file none.gguf"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (200, "there is no such repository"),
        (403, "accept its terms"),
        (500, "could not be fetched"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(status: int, said: str, tmp_path: Path) -> None:
    with serve(FakeHub({}, status)) as endpoint:
        name = "acme/other" if status == 200 else "acme/tiny"
        answer = pull(name, endpoint, tmp_path / "cache")
    assert answer.startswith(f"DownloadFailed {name}: ")
    assert said in answer
    assert not (tmp_path / "cache" / "hub").exists()


def test_a_repository_of_other_files_says_how_to_ask_for_one(tmp_path: Path) -> None:
    with serve(FakeHub({"m.gguf": b""})) as endpoint:
        answer = pull("acme/tiny", endpoint, tmp_path / "cache")
    assert "org/name:file.gguf" in answer


def test_a_hub_out_of_reach_never_makes_half_a_model_look_whole(tmp_path: Path) -> None:
    half = tmp_path / "cache" / "partial" / "acme--tiny"
    make_folder("llama").write(half)
    (half / "model.safetensors").unlink()
    answer = pull("acme/tiny", "http://127.0.0.1:9", tmp_path / "cache")
    assert answer.startswith("DownloadFailed acme/tiny: could not be fetched")
    assert not (tmp_path / "cache" / "hub").exists()
