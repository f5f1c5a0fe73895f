"""The SHA-256 of a model's files, taken once for each content.

It owns one folder of the cache: a file there is named for what tells a model file from every other
without reading it, and holds the digest. Reading a large model takes seconds, looking this up none.
A cache that cannot be read or written only costs the time again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from twostroke.errors import UnknownModel
from twostroke.weights.catalog import get_cache_dir
from twostroke.weights.mapping import FileIdentity

_HEX_CHARS = 64


def get_digest(identities: Sequence[FileIdentity], folder: Path | None = None) -> str:
    """The digest over the digests of all `identities`, in their order, in hexadecimal.

    folder: where digests are kept, by default in the model cache. Raises: UnknownModel when a file
    cannot be read any more.
    """
    kept = get_cache_dir() / "digests" if folder is None else folder
    whole = hashlib.sha256()
    for identity in identities:
        whole.update(bytes.fromhex(_get_one(identity, kept)))
    return whole.hexdigest()


def _get_one(identity: FileIdentity, folder: Path) -> str:
    name = hashlib.sha256(repr(identity).encode("utf-8", errors="surrogateescape")).hexdigest()
    path = folder / name
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = path.read_text(encoding="ascii")
        if len(known) == _HEX_CHARS:
            return known
    try:
        with identity.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnknownModel(f"{identity.path}: cannot be read: {reason}") from error
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(digest, encoding="ascii")
        draft.replace(path)
    return digest
