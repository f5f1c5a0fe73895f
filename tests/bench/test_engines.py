"""Worker processes: they answer lines, and one that does not start is reported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from twostroke.bench.engines import BenchEngine, EngineCommand, get_last_lines, start_engines
from twostroke.bench.install import PEERS, Peer, explain_absence, install
from twostroke.bench.lineup import ENGINES, OURS, Lineup, PeerAbsent

ECHO = """
import json, sys
print(json.dumps({"ready": "echo"}), flush=True)
for line in sys.stdin:
    print(json.dumps({"asked": json.loads(line)}), flush=True)
"""


def test_a_peer_that_does_not_start_is_reported_with_its_last_words() -> None:
    commands = [
        EngineCommand("echo", (sys.executable, "-c", ECHO)),
        EngineCommand("broken", (sys.executable, "-c", "raise SystemExit('no such library')")),
        EngineCommand("absent", ("/nonexistent/python", "x")),
    ]
    engines, refused = start_engines(commands)
    try:
        assert [engine.name for engine in engines] == ["echo"]
        assert engines[0].description == "echo"
        assert engines[0].ask(op="prefill", tokens=[1]) == {
            "asked": {"op": "prefill", "tokens": [1]}
        }
    finally:
        for engine in engines:
            engine.close()
    assert "no such library" in refused["broken"]
    assert "absent" in refused


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_an_engine_tells_its_peak_memory_and_its_childrens() -> None:
    held = "data = bytearray(64 * 2**20)"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '''{held}{ECHO}'''])"
    alone = BenchEngine(EngineCommand("alone", (sys.executable, "-c", held + ECHO)))
    parent = BenchEngine(EngineCommand("parent", (sys.executable, "-c", child + ".wait()")))
    try:
        assert 64 * 2**20 < alone.get_peak_bytes() < parent.get_peak_bytes()
    finally:
        alone.close()
        parent.close()
    assert alone.get_peak_bytes() == 0


def test_an_environment_of_a_command_reaches_its_engine() -> None:
    show = "import json, os; print(json.dumps({'ready': os.environ['BENCH_WORD']}), flush=True)"
    engine = BenchEngine(EngineCommand("it", (sys.executable, "-c", show), {"BENCH_WORD": "here"}))
    engine.close()
    assert engine.description == "here"


def test_last_lines_are_those_that_say_something() -> None:
    assert get_last_lines("one\n\ntwo\n three \n\nfour\n\n") == "two\nthree\nfour"


def test_every_peer_that_is_not_installed_has_a_reason(tmp_path: Path) -> None:
    lineup = Lineup(tmp_path / "model.gguf", 2, tmp_path)
    for name in ENGINES:
        if name != OURS:
            with pytest.raises(PeerAbsent, match="make bench-peers"):
                lineup.get_worker(name)
    assert lineup.get_worker(OURS).command[-1] == "2"


def test_a_peer_that_cannot_be_installed_keeps_its_reason_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer("there", ("no-such-thing==1",))
    ran: list[list[str]] = []
    fails = True

    def run(command: list[str]) -> None:
        ran.append(command)
        if fails:
            raise OSError("nothing by that name")

    monkeypatch.setattr("twostroke.bench.install.run", run)
    assert "nothing by that name" in install(peer, tmp_path)
    assert "nothing by that name" in explain_absence(peer, tmp_path)
    fails = False
    assert install(peer, tmp_path).startswith("installed")
    assert "nothing by that name" not in explain_absence(peer, tmp_path)
    count = len(ran)
    assert "is there" in install(peer, tmp_path)
    assert len(ran) == count


def test_every_peer_is_pinned_in_an_environment_of_its_own() -> None:
    assert len({peer.folder for peer in PEERS.values()}) == len(PEERS)
    assert all("==" in one for peer in PEERS.values() for one in peer.requirements)
