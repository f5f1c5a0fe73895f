"""Laws of the durable log: what was written is read back, and damage costs the end only."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from twostroke.core.types import Finished, TokenLogprob
from twostroke.engine.outputs import OutputDelta
from twostroke.errors import InvalidParameter
from twostroke.server.durable import MAGIC, DurableLog, frame, read_records
from twostroke.server.durable_records import read_item, read_record, write_item, write_output

PAYLOADS = [b"one", b"", b"three" * 50, bytes(range(256))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def write(folder: Path, payloads: list[bytes]) -> bytes:
    """The file's bytes after these appends."""
    log = DurableLog(folder)
    for payload in payloads:
        log.append(payload)
    log.close()
    return (folder / "log").read_bytes()


def reopen(folder: Path) -> tuple[list[bytes], int]:
    """What the next process reads, and how much it drops."""
    log = DurableLog(folder)
    try:
        return log.recovered, log.dropped_bytes
    finally:
        log.close()


def test_what_was_appended_is_read_back(folder: Path) -> None:
    write(folder, PAYLOADS)
    assert reopen(folder) == (PAYLOADS, 0)
    assert write(folder, [b"more"])
    assert reopen(folder) == ([*PAYLOADS, b"more"], 0)


def test_a_log_cut_at_any_byte_keeps_whole_records_and_says_what_it_drops(folder: Path) -> None:
    whole = write(folder, PAYLOADS)
    for size in range(len(whole) + 1):
        (folder / "log").write_bytes(whole[:size])
        recovered, dropped = reopen(folder)
        assert recovered == PAYLOADS[: len(recovered)]
        kept = len(MAGIC) + sum(len(frame(one)) for one in recovered) if size >= len(MAGIC) else 0
        assert dropped == size - kept
        assert reopen(folder) == (recovered, 0)


def test_a_changed_byte_ends_the_log_before_its_record(folder: Path) -> None:
    whole = write(folder, PAYLOADS)
    draw = random.Random(5)
    for place in range(len(MAGIC), len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        recovered, used = read_records(bytes(damaged))
        assert recovered == PAYLOADS[: len(recovered)]
        assert len(recovered) < len(PAYLOADS)
        assert used <= place


def test_a_record_that_could_not_be_read_back_is_not_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twostroke.server.durable.MAX_RECORD_BYTES", 8)
    log = DurableLog(folder)
    log.append(b"x" * 8)
    with pytest.raises(OSError, match="more than 8 bytes"):
        log.append(b"x" * 9)
    log.close()
    assert reopen(folder) == ([b"x" * 8], 0)


def test_two_servers_cannot_share_a_folder(folder: Path) -> None:
    log = DurableLog(folder)
    with pytest.raises(InvalidParameter, match="in use by another server"):
        DurableLog(folder)
    log.close()
    DurableLog(folder).close()


def test_a_folder_that_cannot_be_had_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidParameter, match="cannot use"):
        DurableLog(tmp_path / "file" / "state")


def test_nobody_else_may_read_the_log(folder: Path) -> None:
    write(folder, PAYLOADS)
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "log").stat().st_mode & 0o077 == 0


def test_compacting_keeps_what_is_appended_meanwhile(folder: Path) -> None:
    log = DurableLog(folder)
    for payload in PAYLOADS:
        log.append(payload)

    async def run() -> None:
        work = asyncio.ensure_future(log.compact([b"kept"]))
        await asyncio.sleep(0)
        assert log.is_compacting
        log.append(b"meanwhile")
        await work

    asyncio.run(run())
    log.append(b"after")
    log.close()
    assert reopen(folder) == ([b"kept", b"meanwhile", b"after"], 0)


def test_a_compaction_that_did_not_end_changes_nothing(folder: Path) -> None:
    write(folder, PAYLOADS)
    (folder / "log.partial").write_bytes(MAGIC + frame(b"half"))
    assert reopen(folder) == (PAYLOADS, 0)


def draw_deltas(seed: int) -> Iterator[tuple[int, OutputDelta]]:
    """Deltas of every shape."""
    draw = random.Random(seed)
    for _ in range(200):
        count = draw.randrange(4)
        texts = tuple(draw.choice(["", "a", "ß€🌊", "\n\u2028\\"]) for _ in range(count))
        ending = draw.choice([None, Finished("stop"), Finished("length")])
        scores = tuple(
            TokenLogprob(draw.randrange(9), -draw.random(), ((1, -draw.random()),) * 2)
            for _ in range(count)
        )
        tokens = tuple(draw.randrange(200) for _ in range(count))
        choice = draw.randrange(5)
        yield (
            choice,
            OutputDelta(
                choice,
                "".join(texts) + draw.choice(["", "rest"]),
                tokens,
                tuple(bytes([token]) for token in tokens),
                draw.choice([(), scores]),
                draw.choice([(), scores]),
                ending,
                draw.choice([texts, () if count else texts]),
            ),
        )


def test_a_delta_reads_back_as_it_was_to_the_last_bit() -> None:
    for choice, delta in draw_deltas(3):
        kind, request_id, (item,) = read_record(write_output("r", [write_item(choice, delta)]))
        assert (kind, request_id) == ("output", "r")
        assert read_item(item, lambda token: bytes([token])) == (choice, delta)
