"""DurableLog: an append-only file of checksummed records that outlives `kill -9`.

    magic | length crc payload | length crc payload | …

It owns one folder, locked for as long as the log is open, so that two servers cannot share one. A
record is written whole, by one call, before `append` returns: what the operating system has taken
survives the death of the process. It is not forced to the disk, so a loss of power may take the
newest records; whatever a file ends with, opening it keeps every whole record before the first
that is not, cuts the rest off, and says how much that was. It knows nothing of what records mean.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from twostroke.errors import InvalidParameter

MAGIC = b"twostroke log 1\n"
MAX_RECORD_BYTES = 2**28

_FRAME = struct.Struct("<II")  # bytes of the payload; CRC-32 of that number and the payload
_LENGTH = struct.Struct("<I")


def frame(payload: bytes) -> bytes:
    """A payload as it stands in the file."""
    checksum = zlib.crc32(payload, zlib.crc32(_LENGTH.pack(len(payload))))
    return _FRAME.pack(len(payload), checksum) + payload


def read_records(data: bytes) -> tuple[list[bytes], int]:
    """The payloads of the whole records that `data` begins with, and how many bytes those take."""
    if not data.startswith(MAGIC):
        return [], 0
    payloads: list[bytes] = []
    place = len(MAGIC)
    while place + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, place)
        payload = data[place + _FRAME.size : place + _FRAME.size + length]
        if length > MAX_RECORD_BYTES or len(payload) < length:
            break
        if zlib.crc32(payload, zlib.crc32(_LENGTH.pack(length))) != checksum:
            break
        payloads.append(payload)
        place += _FRAME.size + length
    return payloads, place


class DurableLog:
    """An open log. Not thread-safe: appends and `compact` belong to one event loop.

    recovered: the payloads found when it was opened. dropped_bytes: what could not be read then.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the log in `folder`. Raises InvalidParameter when another server has it,
        or it cannot be written."""
        self._path = folder / "log"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._open_file()
            except OSError:
                os.close(self._lock)
                raise
        except BlockingIOError:
            raise InvalidParameter("state", f"{folder} is in use by another server") from None
        except OSError as error:
            raise InvalidParameter("state", f"cannot use {folder}: {error.strerror}") from None

    def _open_file(self) -> None:
        self._partial.unlink(missing_ok=True)  # of a compaction that did not end
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        data = self._path.read_bytes()
        self.recovered, self.size = read_records(data)
        self.dropped_bytes = len(data) - self.size
        self._carried: list[bytes] | None = None
        if not self.size or self.dropped_bytes:
            os.ftruncate(self._file, self.size)
        if not self.size:
            self._write(MAGIC)

    @property
    def _partial(self) -> Path:
        return self._path.with_suffix(".partial")

    @property
    def is_compacting(self) -> bool:
        """True while `compact` runs."""
        return self._carried is not None

    def append(self, payload: bytes) -> None:
        """Write one record. Raises OSError, and may leave a torn record behind then."""
        # Whoever opens the log would take the length of a longer one for damage.
        if len(payload) > MAX_RECORD_BYTES:
            raise OSError(errno.EFBIG, f"a record has more than {MAX_RECORD_BYTES} bytes")
        self._write(frame(payload))
        if self._carried is not None:
            self._carried.append(payload)

    async def compact(self, payloads: Sequence[bytes]) -> None:
        """Make these records, and what is appended meanwhile, all that the log holds.

        They are written beside the log, by a thread, and take its place in one move. Raises OSError
        with the log as it was.
        """
        assert self._carried is None
        self._carried = []
        new: int | None = None
        try:
            new = await asyncio.to_thread(_write_anew, self._partial, payloads)
            if self._file < 0:
                raise OSError(errno.EBADF, "the log was closed meanwhile")
            write_all(new, b"".join(map(frame, self._carried)))
            os.replace(self._partial, self._path)
        except OSError:
            if new is not None:
                os.close(new)
            raise
        finally:
            self._carried = None
        old, self._file = self._file, new
        os.close(old)
        self.size = os.fstat(self._file).st_size

    def close(self) -> None:
        """Close the file and let others have the folder; again does nothing."""
        numbers, self._file, self._lock = (self._file, self._lock), -1, -1
        for number in numbers:
            if number >= 0:
                os.close(number)

    def _write(self, data: bytes) -> None:
        write_all(self._file, data)
        self.size += len(data)


def _write_anew(path: Path, payloads: Sequence[bytes]) -> int:
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        write_all(number, b"".join((MAGIC, *map(frame, payloads))))
        os.fsync(number)  # or a loss of power could leave the new name on an empty file
    except OSError:
        os.close(number)
        raise
    return number


def write_all(number: int, data: bytes) -> None:
    """Write to a descriptor to the last byte. Raises OSError, with a part of them written."""
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]
