"""A read-only memory mapping of a whole file, and which file it is.

Nothing is read when a file is mapped: the kernel brings pages in when they are touched, and
shares them between processes. The mapping lives as long as any array that views it; nothing may
write through it.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import CorruptModel, UnknownModel


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells a file with its content from every other, without reading it.

    Whoever writes to a file changes its times; whoever replaces it, its inode. changed_ns is the
    time the system itself keeps and no program can set.
    """

    path: Path
    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    def is_current(self) -> bool:
        """Whether the file at the path is still this one."""
        try:
            return _identify(self.path, os.stat(self.path)) == self
        except OSError:
            return False


def map_file(path: Path, least_bytes: int) -> tuple[mmap.mmap, FileIdentity]:
    """Map a regular file of at least `least_bytes` bytes.

    Raises: UnknownModel if it cannot be opened, CorruptModel if it is too short to be a model.
    """
    try:
        with path.open("rb") as file:
            identity = _identify(path, os.fstat(file.fileno()))
            if identity.size < max(least_bytes, 1):
                raise CorruptModel(f"{path}: {identity.size} bytes are too few for a model file")
            return mmap.mmap(file.fileno(), identity.size, access=mmap.ACCESS_READ), identity
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnknownModel(f"{path}: cannot be read: {reason}") from error


def release_pages(data: NDArray[np.uint8]) -> None:
    """Let go of the memory behind `data`, a view of a file that `map_file` has mapped.

    It is read again when touched. Arrays that are no such view are left alone.
    """
    base: object = data
    while isinstance(base, np.ndarray):
        base = base.base
    mapping = base.obj if isinstance(base, memoryview) else None
    # A read-only buffer of a mapping: dropping its pages loses nothing.
    if not isinstance(mapping, mmap.mmap) or not isinstance(base, memoryview) or not base.readonly:
        return
    start = data.ctypes.data - np.frombuffer(mapping, np.uint8, 1).ctypes.data
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, start + data.nbytes
    if first < end:
        mapping.madvise(mmap.MADV_DONTNEED, first, end - first)


def _identify(path: Path, status: os.stat_result) -> FileIdentity:
    return FileIdentity(
        path,
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
