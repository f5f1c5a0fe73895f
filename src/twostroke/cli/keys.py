"""`twostroke key`, and the keys that `serve` is given."""

from __future__ import annotations

import sys
from pathlib import Path

from twostroke.cli.options import KeyOptions
from twostroke.errors import InvalidParameter
from twostroke.server.keys import Key, format_line, hash_key, make_key, read_key_file

LEAST_KEY_CHARS = 8


def run_key(options: KeyOptions) -> None:
    """Print the line of a fresh key for a key file, and the key itself to standard error.

    Raises InvalidParameter for a name that cannot be one.
    """
    key = make_key()
    print(format_line(options.name, key, options.rate))
    print(f"{key}  (shown once: the file holds its hash)", file=sys.stderr)


def gather_keys(api_key: str | None, key_file: str | None) -> tuple[Key, ...]:
    """The keys that are let in; none of them where neither is given. Raises InvalidParameter."""
    keys = () if key_file is None else read_key_file(Path(key_file))
    if api_key is None:
        return keys
    if len(api_key) < LEAST_KEY_CHARS or not api_key.isascii() or not api_key.isprintable():
        raise InvalidParameter("api_key", f"must be {LEAST_KEY_CHARS} or more printable characters")
    # It names nobody: whom a request's `user` names is the tenant.
    return (*keys, Key("", hash_key(api_key)))
