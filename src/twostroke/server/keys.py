"""Keys: who may use the server, as whom, and how fast.

Owns the form of a key and of a key file, and the check of a presented key. Only hashes are kept:
a key is 256 random bits, so its SHA-256 gives nothing away and needs no salt. It keeps true that a
check takes the same time whichever key is right, and that no key is ever part of a message.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twostroke.errors import InvalidParameter

KEY_PREFIX = "sk-"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINE = re.compile(
    rf"({_NAME.pattern})\s+sha256:([0-9a-fA-F]{{64}})(?:\s+rate=([1-9][0-9]{{0,8}}))?"
)
MAX_KEYS = 1000


@dataclass(frozen=True, slots=True)
class Key:
    """One key that is let in.

    tenant: in whose name it acts, empty for a key that names nobody. digest: SHA-256 of the key.
    per_minute: most requests a minute, None for no limit.
    """

    tenant: str
    digest: bytes
    per_minute: int | None = None


def make_key() -> str:
    """A fresh key."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()


def format_line(tenant: str, key: str, per_minute: int | None = None) -> str:
    """The line of a key file that lets `key` in. Raises InvalidParameter for a bad name."""
    if not _NAME.fullmatch(tenant):
        raise InvalidParameter("name", f"must be 1 to 64 of A-Z a-z 0-9 . _ -, not {tenant!r}")
    rate = "" if per_minute is None else f" rate={per_minute}"
    return f"{tenant} sha256:{hash_key(key).hex()}{rate}"


def read_key_file(path: Path) -> tuple[Key, ...]:
    """The keys of a file: one a line, `NAME sha256:HEX [rate=PER_MINUTE]`; `#` begins a comment.

    Raises InvalidParameter naming the line that is wrong, never its text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter("key_file", f"cannot be read: {error}") from None
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        key = _parse_line(text, number)
        if key.digest in keys:
            raise InvalidParameter("key_file", f"line {number} repeats the key of an earlier line")
        keys[key.digest] = key
    if not 1 <= len(keys) <= MAX_KEYS:
        raise InvalidParameter("key_file", f"must hold 1 to {MAX_KEYS} keys, not {len(keys)}")
    return tuple(keys.values())


def _parse_line(text: str, number: int) -> Key:
    match = _LINE.fullmatch(text)
    if match is None:
        raise InvalidParameter(
            "key_file", f"line {number} must read NAME sha256:HEX [rate=PER_MINUTE]"
        )
    name, digest, rate = match.groups()
    return Key(name, bytes.fromhex(digest), None if rate is None else int(rate))


class KeyRing:
    """All keys that are let in; with none of them everybody is."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, authorization: str | None) -> Key | None:
        """The key that an Authorization header (`Bearer KEY`) presents; None for a wrong one."""
        scheme, _, presented = (authorization or "").partition(" ")
        digest = hash_key(presented.strip())
        found = None
        for key in self._keys:  # all of them, always: the time tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found if scheme.lower() == "bearer" else None
