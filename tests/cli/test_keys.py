"""`twostroke key`, the keys of `serve`, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from twostroke.cli.keys import gather_keys, run_key
from twostroke.cli.options import KeyOptions
from twostroke.cli.serve import is_loopback
from twostroke.errors import InvalidParameter
from twostroke.server.keys import KeyRing


def test_a_key_that_was_made_is_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_key(KeyOptions(name="alice", rate=30))
    made = capsys.readouterr()
    path = tmp_path / "keys"
    path.write_text(made.out)
    (key,) = gather_keys(None, str(path))
    assert (key.tenant, key.per_minute) == ("alice", 30)
    presented = made.err.split()[0]
    assert presented not in made.out
    assert KeyRing([key]).find(f"Bearer {presented}") == key


def test_both_ways_of_giving_keys_go_together(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice sha256:" + "0" * 64)
    keys = gather_keys("sk-12345678", str(path))
    assert [key.tenant for key in keys] == ["alice", ""]
    assert gather_keys(None, None) == ()


@pytest.mark.parametrize("key", ["", "short", "with\ncontrol", "schlüssel-schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(InvalidParameter, match="api_key"):
        gather_keys(key, None)


def test_a_bad_name_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="name"):
        run_key(KeyOptions(name="a b"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("box.example", False),
    ],
)
def test_who_can_reach_a_host(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
