"""The memory of an executor's child: the KV pool, host blocks and a mark of the step it is in.

The parent owns it and the children map it, so a child that dies takes nothing along. It is an open
file of a memory file system that never has a name: under /dev/shm where that has room, else (a
container's /dev/shm is small) the same kind of file from the kernel's own mount. When the last
process lets go of it, it is gone.

    page 0: u64 step begun last, plus one | KV pool, whole pages | host blocks, whole pages
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import DeviceError

Bytes = NDArray[np.uint8]

_FOLDER = "/dev/shm"
_MARK = struct.Struct("<Q")
_CHUNK = 32 << 20  # reserved in one go: so much of it may a close have to wait for


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """Bytes of the KV pool and of the host blocks, each rounded up to whole pages in the file."""

    kv_bytes: int
    host_bytes: int = 0

    @property
    def kv_start(self) -> int:
        """Where the pool begins."""
        return mmap.PAGESIZE

    @property
    def host_start(self) -> int:
        """Where the host blocks begin."""
        return self.kv_start + _round_up(self.kv_bytes)

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return self.host_start + _round_up(self.host_bytes)


def _round_up(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class SharedMemory:
    """The parent's hold on the file. Raises DeviceError when there is not so much memory."""

    def __init__(self, sizes: MemorySizes) -> None:
        self.sizes = sizes
        self.descriptor = _open_file(sizes.total)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        try:
            os.ftruncate(self.descriptor, sizes.total)
            self.mapped = MappedMemory(self.descriptor, sizes)
        except (OSError, OverflowError) as error:
            self._close()
            raise DeviceError(f"{sizes.total:,} bytes cannot be shared: {error}") from error

    def close(self) -> None:
        """Let go of it, for good; again does nothing."""
        self._close()
        self.mapped.close()

    def reserve(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Take the memory now: what was granted once cannot be lacking later.

        Slow for a large pool, so it runs beside other things, and stops early once it is not
        wanted; must be over before `close`. Raises OSError when memory is short.
        """
        for start in range(0, self.sizes.total, _CHUNK):
            if not is_wanted():
                return
            os.posix_fallocate(self.descriptor, start, min(_CHUNK, self.sizes.total - start))


def _open_file(size: int) -> int:
    with contextlib.suppress(OSError):
        room = os.statvfs(_FOLDER)
        if room.f_bavail * room.f_frsize >= size:
            return os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        return os.memfd_create("twostroke-kv", os.MFD_CLOEXEC)
    except (OSError, AttributeError) as error:
        raise DeviceError(f"there is no memory to share with an executor: {error}") from error


class MappedMemory:
    """The file as one process sees it. kv: the pool's bytes; host: those of the host blocks."""

    def __init__(self, descriptor: int, sizes: MemorySizes) -> None:
        self._map = mmap.mmap(descriptor, sizes.total)
        self.kv: Bytes = np.frombuffer(self._map, np.uint8, sizes.kv_bytes, sizes.kv_start)
        self.host: Bytes = np.frombuffer(self._map, np.uint8, sizes.host_bytes, sizes.host_start)

    def close(self) -> None:
        """Unmap it; an array that still views it keeps it mapped."""
        nothing = np.zeros(0, np.uint8)
        self.kv = self.host = nothing
        with contextlib.suppress(BufferError):
            self._map.close()

    def mark_begun(self, step: int) -> None:
        """Note that a step is about to touch the pool."""
        _MARK.pack_into(self._map, 0, step + 1)

    def get_begun(self) -> int:
        """The step noted last; -1 for none."""
        step: int = _MARK.unpack_from(self._map, 0)[0] - 1
        return step
