"""A read-only memory mapping of a whole file.

Nothing is read when a file is mapped: the kernel brings pages in when they are touched, and
shares them between processes. The mapping lives as long as any array that views it; nothing may
write through it.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from twostroke.errors import CorruptModel, UnknownModel


def map_file(path: Path, least_bytes: int) -> mmap.mmap:
    """Map a regular file of at least `least_bytes` bytes.

    Raises: UnknownModel if it cannot be opened, CorruptModel if it is too short to be a model.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < max(least_bytes, 1):
                raise CorruptModel(f"{path}: {size} bytes are too few for a model file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnknownModel(f"{path}: cannot be read: {reason}") from error
