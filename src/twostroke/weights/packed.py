"""Packed weights kept in files, so that a model is packed once and then only mapped.

It owns one folder of the cache. A file is named by a fingerprint of the model's files, of where
each tensor lies and of how this build packs, so that a changed model or build never finds it; it
is packed in place under another name and renamed when it is whole. Every way in which keeping can
fail costs time and nothing else: the weights are then packed into memory. What the bytes mean is
not known here.

    magic | fingerprint | u64 file bytes | u32 probe | zeros … | packed weights from byte 4096 on

The probe is the CRC-32 of the first eight bytes of every page: after a crash, pages that never
reached the disk read as zeros, or not at all. Old files are deleted, those used longest ago first,
where a new one would make the folder larger than KEPT_BYTES.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twostroke.weights.mapping import FileIdentity

Bytes = NDArray[np.uint8]

KEPT_BYTES = 16 * 2**30
# Packing less than this is over before a file could be opened, checked and mapped.
LEAST_BYTES = 8 * 2**20
# A file this young may be written to once more within one tick of its clock, unnoticed.
SETTLED_NS = 2 * 10**9
_ABANDONED_S = 3600
_MAGIC = b"2STROKE-PACKED-1"
_HEADER = struct.Struct("<16s32sQI")
_PAGE = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedFiles:
    """The packed files of one model. folder: of the cache. model: the files it was read from."""

    folder: Path
    model: tuple[FileIdentity, ...]
    kept_bytes: int = KEPT_BYTES
    least_bytes: int = LEAST_BYTES
    settled_ns: int = SETTLED_NS

    def try_map(self, layout: str, size: int) -> Bytes | None:
        """The weights (size,), mapped and read-only, or None where they are not kept.

        layout: says where each tensor lies and how it is packed.
        """
        fingerprint = self._get_fingerprint(layout)
        path = self._get_path(fingerprint)
        try:
            with path.open("rb") as file:
                total = _PAGE + size
                if os.fstat(file.fileno()).st_size != total:
                    return None
                # Reading ahead goes on by itself while this process does other things.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
                mapped = mmap.mmap(file.fileno(), total, access=mmap.ACCESS_READ)
            weights = np.frombuffer(mapped, np.uint8, size, _PAGE)
            if mapped[: _HEADER.size] != _build_header(fingerprint, weights):
                return None
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # its place in the order of deletion
        return weights

    def try_begin(self, layout: str, size: int) -> Draft | None:
        """A new file to pack the weights into, or None where they cannot be kept."""
        if size < self.least_bytes:
            return None
        fingerprint = self._get_fingerprint(layout)
        path = self._get_path(fingerprint)
        draft = path.with_suffix(f".{os.urandom(4).hex()}")
        try:
            self._check_kept(_PAGE + size)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(_PAGE + size)
            with _removed_on_error(draft), draft.open("x+b") as file:
                os.posix_fallocate(file.fileno(), 0, _PAGE + size)
                mapped = mmap.mmap(file.fileno(), _PAGE + size)
        except OSError as error:
            _log.info("the packed weights are not kept: %s", error)
            return None
        return Draft(self, draft, path, fingerprint, mapped)

    def _check_kept(self, total: int) -> None:
        """Raise OSError, saying why, where the file must not be kept."""
        if not hasattr(os, "posix_fallocate"):
            raise OSError("this system cannot reserve room for a file before it is written")
        if total > self.kept_bytes:
            raise OSError(f"{total} bytes are more than the {self.kept_bytes} kept of all models")
        now_ns = time.time_ns()
        for file in self.model:
            if now_ns - max(file.modified_ns, file.changed_ns) < self.settled_ns:
                raise OSError(f"{file.path} was changed a moment ago")

    def _make_room(self, total: int) -> None:
        """Delete what is too much with `total` bytes more, and drafts nobody goes on with."""
        kept: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may be doing the same
                status = path.stat()
                if path.suffix == ".packed":
                    kept.append((status.st_mtime, status.st_size, path))
                elif status.st_mtime < time.time() - _ABANDONED_S:
                    path.unlink()
        room = self.kept_bytes - total - sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if room >= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            room += size

    def _get_fingerprint(self, layout: str) -> bytes:
        digest = hashlib.sha256(layout.encode())
        for file in self.model:
            digest.update(
                struct.pack(
                    "<5Q", file.device, file.inode, file.size, file.modified_ns, file.changed_ns
                )
            )
        return digest.digest()

    def _get_path(self, fingerprint: bytes) -> Path:
        return self.folder / f"{fingerprint.hex()[:32]}.packed"


@dataclass(slots=True, eq=False)
class Draft:
    """A file being packed, which nobody can find before `keep`; left without it, it is deleted."""

    files: PackedFiles
    draft: Path
    path: Path
    fingerprint: bytes
    mapped: mmap.mmap

    @property
    def memory(self) -> Bytes:
        """The weights' bytes, zero and writable. They stay usable when the file is gone."""
        return np.frombuffer(self.mapped, np.uint8, len(self.mapped) - _PAGE, _PAGE)

    def keep(self) -> None:
        """The weights are complete: let them be found, if the model is still the one opened."""
        if not all(file.is_current() for file in self.files.model):
            _log.info("the packed weights are not kept: the model was changed meanwhile")
            return
        header = _build_header(self.fingerprint, self.memory)
        self.mapped[: len(header)] = header
        # The pages stay in the file: they need not count twice when it is mapped anew.
        self.mapped.madvise(mmap.MADV_DONTNEED)
        try:
            self.draft.replace(self.path)
        except OSError as error:
            _log.info("the packed weights are not kept: %s", error)

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self.draft.unlink(missing_ok=True)


def _build_header(fingerprint: bytes, weights: Bytes) -> bytes:
    whole = weights[: weights.size // _PAGE * _PAGE].view(np.uint64)
    probe = zlib.crc32(whole[:: _PAGE // 8].tobytes())
    return _HEADER.pack(_MAGIC, fingerprint, _PAGE + weights.size, probe)


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    is_done = False
    try:
        yield
        is_done = True
    finally:
        if not is_done:
            path.unlink(missing_ok=True)
