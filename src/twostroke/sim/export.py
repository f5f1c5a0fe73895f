"""Results as files: one row for each request, as CSV or Parquet.

Owns the columns and their units, the same in both formats; where a thing never happened there is no
value, not a zero. Rows are written a slice at a time. Parquet needs pyarrow; it takes 170 MB and
nothing else here uses it, so it is an extra.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import InvalidParameter
from twostroke.sim.records import FATES, Records
from twostroke.sim.results import find_met, get_times

_AT_ONCE = 65_536

# Column → what it holds, in order.
COLUMNS = {
    "request": "number, in order of arrival",
    "tenant": "its tenant",
    "priority": "smaller is more urgent",
    "replica": "where it ran; none took it where there is no value",
    "fate": "one of " + ", ".join(FATES),
    "arrival_s": "when it came",
    "queued_s": "until the first step that computed for it",
    "ttft_s": "from arrival to first token",
    "tpot_s": "mean time between its tokens",
    "worst_gap_s": "longest time between two of its tokens",
    "end_to_end_s": "from arrival to its end, of finished ones",
    "prompt_tokens": "length of the prompt",
    "cached_tokens": "of those, found in the prefix cache",
    "new_tokens": "tokens it was answered with",
    "preemptions": "how often it lost its blocks",
    "met_targets": "1 when it finished within its TTFT and TPOT targets",
}


def check_parquet() -> None:
    """Raise InvalidParameter, with the command that helps, when pyarrow is missing."""
    import importlib.util

    if importlib.util.find_spec("pyarrow") is None:
        raise InvalidParameter(
            "output", 'Parquet needs pyarrow: pip install "twostroke[parquet]", or write a .csv'
        )


def write_csv(records: Records, path: Path) -> None:
    """One line for each request, column names first. Raises OSError."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for part in _cut(_build_columns(records), len(records)):
            writer.writerows(zip(*(_list_values(values) for values in part.values()), strict=True))


def write_parquet(records: Records, path: Path) -> None:
    """One row for each request. Raises InvalidParameter without pyarrow, and OSError."""
    check_parquet()
    import pyarrow
    from pyarrow import parquet

    columns = _build_columns(records)
    table = pyarrow.table(
        {
            name: pyarrow.array(values, mask=None if mask is None else mask)
            for name, (values, mask) in columns.items()
        }
    )
    parquet.write_table(table, path, row_group_size=_AT_ONCE)


# name → values and which of them are missing (None: none are)
_Columns = dict[str, tuple[NDArray[Any], NDArray[np.bool_] | None]]


def _build_columns(records: Records) -> _Columns:
    """COLUMNS as arrays."""
    columns = records.get_columns()
    times = get_times(columns)
    has_first = times["has_first"]
    several, replica = columns["new_tokens"] > 1, columns["replica"]
    names = np.array(records.tenants or [""], dtype=object)
    found: dict[str, tuple[NDArray[Any], NDArray[np.bool_] | None]] = {
        "request": (np.arange(len(records)), None),
        "tenant": (names[columns["tenant"]], None),
        "priority": (columns["priority"], None),
        "replica": (replica, replica < 0),
        "fate": (np.array(FATES, dtype=object)[columns["fate"]], None),
        "arrival_s": (columns["arrival_ns"] / 1e9, None),
        "queued_s": (times["queued_s"], np.isnan(times["queued_s"])),
        "ttft_s": (times["ttft_s"], ~has_first),
        "tpot_s": (times["tpot_s"], ~several),
        "worst_gap_s": (columns["worst_gap_ns"] / 1e9, ~several),
        "end_to_end_s": (times["end_to_end_s"], np.isnan(times["end_to_end_s"])),
        "prompt_tokens": (columns["prompt_tokens"], None),
        "cached_tokens": (columns["cached_tokens"], None),
        "new_tokens": (columns["new_tokens"], None),
        "preemptions": (columns["preemptions"], None),
        "met_targets": (find_met(columns, times).astype(np.int8), None),
    }
    assert list(found) == list(COLUMNS)
    return found


def _cut(columns: _Columns, count: int) -> Iterator[_Columns]:
    for start in range(0, count, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        yield {
            name: (values[part], None if mask is None else mask[part])
            for name, (values, mask) in columns.items()
        }


def _list_values(column: tuple[NDArray[Any], NDArray[np.bool_] | None]) -> list[Any]:
    """Values for a CSV; times to the nanosecond, and nothing where there is no value."""
    values, mask = column
    listed = [f"{each:.9f}" for each in values] if values.dtype.kind == "f" else values.tolist()
    if mask is None:
        return listed
    return ["" if missing else each for each, missing in zip(listed, mask.tolist(), strict=True)]
