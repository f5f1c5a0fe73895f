"""Asks a running server something: one GET, with a clear error where nobody answers."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from twostroke.errors import InvalidParameter

_PATIENCE_S = 20.0


def fetch_json(
    url: str, path: str, query: Mapping[str, str], api_key: str | None = None
) -> dict[str, Any]:
    """A JSON object of the server at `url`; `url` may end in /v1. Raises InvalidParameter."""
    text = fetch_text(url, f"{path}?{urllib.parse.urlencode(query)}", api_key)
    try:
        value = json.loads(text)
    except ValueError:
        raise InvalidParameter("url", f"{url} answers {path} with no JSON") from None
    if not isinstance(value, dict):
        raise InvalidParameter("url", f"{url} answers {path} with no object")
    return value


def fetch_text(url: str, path: str, api_key: str | None = None) -> str:
    """The text of an answer. Raises InvalidParameter where there is none."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise InvalidParameter("url", f"must begin with http:// or https://, not {url!r}")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        request = urllib.request.Request(base + path, headers=headers)
        with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
            text: str = answer.read().decode("utf-8", "replace")
            return text
    except urllib.error.HTTPError as error:
        with error:
            hint = "; give its key with --api-key" if error.code == 401 else ""
            raise InvalidParameter("url", f"{url} answers {path} with {error.code}{hint}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InvalidParameter("url", f"{url} does not answer: {reason}") from None
