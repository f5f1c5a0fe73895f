"""Laws of reading traces: the shared files keep their counts and sums, a bad line is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from places import SHARED
from twostroke.errors import InvalidParameter
from twostroke.sim.traces import AZURE_COLUMNS, Drawn, read_trace, summarise_trace

HEADER = ",".join(AZURE_COLUMNS)
ROW = "2023-11-16 18:15:46.6805900,374,44"
OBJECT = '{"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [0, 7]}'


def write(folder: Path, *lines: str | bytes) -> Path:
    """A trace file of these lines."""
    path = folder / "trace"
    path.write_bytes(
        b"\n".join(each if isinstance(each, bytes) else each.encode() for each in lines)
    )
    return path


@pytest.mark.parametrize(
    ("name", "requests", "prompt_tokens", "new_tokens", "seconds"),
    [
        ("azure2023_conv.csv", 19_366, 22_361_870, 4_088_665, 3501.721937),
        ("azure2023_code.csv", 8_819, 18_059_974, 245_896, 3435.948056),
        ("mooncake_conversation_trace.jsonl", 12_031, 144_793_823, 4_122_048, 3536.999),
    ],
)
def test_the_shared_traces_keep_their_counts_and_sums(
    name: str, requests: int, prompt_tokens: int, new_tokens: int, seconds: float
) -> None:
    found = summarise_trace(SHARED / "traces" / name)
    assert (found.requests, found.prompt_tokens, found.new_tokens) == (
        requests,
        prompt_tokens,
        new_tokens,
    )
    assert found.duration_ns == round(seconds * 1e9)


def test_times_are_counted_from_the_first_request(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEADER,
        "2023-11-16 23:59:59.5,1,2",
        "2023-11-17 00:00:00.0000001,3,4",
        "2023-11-17 00:00:00.0000001+00:00,3,4",
    )
    later = 500_000_100
    assert list(read_trace(path)) == [
        Drawn(0, 1, 2),
        Drawn(later, 3, 4),
        Drawn(later, 3, 4),
    ]


def test_line_ends_of_either_kind_and_one_at_the_end_are_fine(tmp_path: Path) -> None:
    plain = list(read_trace(write(tmp_path, HEADER, ROW)))
    assert list(read_trace(write(tmp_path, HEADER + "\r", ROW + "\r", ""))) == plain
    assert list(read_trace(write(tmp_path, b"\xef\xbb\xbf" + HEADER.encode(), ROW))) == plain


def test_prefix_ids_are_read(tmp_path: Path) -> None:
    assert list(read_trace(write(tmp_path, OBJECT))) == [Drawn(0, 600, 3, (0, 7), 512)]
    bare = '{"timestamp": 5, "input_length": 600, "output_length": 3}'
    assert list(read_trace(write(tmp_path, bare))) == [Drawn(0, 600, 3)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2023-11-16 18:15:46.68,374", "3 columns"),
        ("2023-11-16 18:15:46.68,374,44,1", "3 columns"),
        ("2023-11-16 18:15:46.68,374,many", "GeneratedTokens as a whole number, not 'many'"),
        ("2023-11-16 18:15:46.68,3.5,4", "ContextTokens as a whole number, not '3.5'"),
        ("2023-11-16 18:15:46.68,٣,4", "ContextTokens as a whole number"),
        ("2023-11-16 18:15:46.68,-374,44", "ContextTokens from 1"),
        ("2023-11-16 18:15:46.68,374,0", "GeneratedTokens from 1"),
        ("2023-11-16 18:15:46.68,99999999,4", "ContextTokens from 1 to 10,000,000"),
        ("2023-11-16 18:15:46.68,99999999999999999999,4", "ContextTokens from 1 to 10,000,000"),
        ("2023-11-16 25:15:46.68,374,44", "TIMESTAMP such as"),
        ("2023-13-16 18:15:46.68,374,44", "day of the calendar"),
        ("nan,374,44", "TIMESTAMP such as"),
        ("2023-11-16 18:15:46.6805800,374,44", "1e-05 s earlier"),
        ("", "not an empty line"),
        (b"\xff\xfe\x00\x01", "UTF-8"),
        (b"1," * 2**20, "under 1,048,576 bytes"),
    ],
)
def test_a_bad_csv_line_is_named(tmp_path: Path, line: str | bytes, expected: str) -> None:
    path = write(tmp_path, HEADER, ROW, line, ROW)
    with pytest.raises(InvalidParameter, match="trace, line 3: expected") as caught:
        list(read_trace(path))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (OBJECT[:40], "one JSON object on the line"),
        (OBJECT[:-1] + ', "timestamp": 9}', "each key once; 'timestamp' comes twice"),
        ('{"timestamp": 5, "input_len', "Unterminated string starting at character 18"),
        (OBJECT.replace("600", "NaN"), "input_length as a whole number, not nan"),
        (OBJECT.replace("600", "true"), "input_length as a whole number, not True"),
        (OBJECT.replace("600", "-600"), "input_length from 1"),
        (OBJECT.replace("600", "1025"), "3 hash_ids"),
        (OBJECT.replace(": 3", ": 0"), "output_length from 1"),
        (OBJECT.replace(": 5", ": -5"), "timestamp in whole milliseconds"),
        (OBJECT.replace(": 5", ": 1e999"), "timestamp in whole milliseconds"),
        (OBJECT.replace(": 5", ": 4"), "earlier"),
        (OBJECT.replace("7", '"7"'), "hash_ids as a list"),
        (OBJECT.replace("[0, 7]", "7"), "hash_ids as a list"),
        (OBJECT.replace("timestamp", "time"), "timestamp is missing"),
        (OBJECT.replace("}", ', "more": 1}'), "'more' is unknown"),
        ("[1, 2]", "a JSON object"),
        ("[" * 100_000, "one JSON object on the line"),
        (OBJECT.replace("600", "6" * 5000), "one JSON object on the line"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path, OBJECT, line)
    with pytest.raises(InvalidParameter, match="trace, line 2: expected") as caught:
        list(read_trace(path))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (HEADER.encode(), "no request"),
        (ROW.encode(), "line 1: expected the column names"),
        (b"\x7fELF\x02\x01", "line 1: expected the column names"),
        (b"TIMESTAMP,ContextTokens", "line 1: expected the column names"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(InvalidParameter, match=expected):
        list(read_trace(write(tmp_path, content)))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="cannot be read: No such file"):
        summarise_trace(tmp_path / "none.csv")
    with pytest.raises(InvalidParameter, match="is no file"):
        summarise_trace(tmp_path)


def test_control_characters_of_a_bad_line_do_not_reach_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter) as caught:
        list(read_trace(write(tmp_path, HEADER, "\x1b[2J,1,1")))
    assert "\x1b" not in str(caught.value)


@given(content=st.binary(max_size=200), head=st.sampled_from([b"", HEADER.encode() + b"\n", b"{"]))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, head: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp(), head + content)
    try:
        found = list(read_trace(path))
    except InvalidParameter:
        return
    assert found


def test_a_trace_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    lines = [json.dumps({"timestamp": n, "input_length": 1, "output_length": 1}) for n in range(9)]
    reader = read_trace(write(tmp_path, *lines, "junk"))
    assert [next(reader).at_ns for _ in range(9)] == [n * 10**6 for n in range(9)]


def test_reading_needs_no_numpy() -> None:
    import subprocess

    code = "import sys, twostroke.sim.traces; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
