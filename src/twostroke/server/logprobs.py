"""Log-probabilities in the shapes of the two OpenAI APIs.

A token need not be whole characters, so chat carries its bytes beside its text, and completions,
which have no bytes, write such a token as `bytes:\\xe2\\x82`. JSON has no infinity: a
log-probability below -9999 is written as that, the value OpenAI uses for "practically never".
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twostroke.core.types import TokenLogprob

LOWEST_LOGPROB = -9999.0

GetBytes = Callable[[int], bytes]


def to_chat_logprobs(
    entries: Sequence[TokenLogprob], token_bytes: Sequence[bytes], get_bytes: GetBytes
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion.

    Args: entries and token_bytes: parallel, one per token; get_bytes: bytes of any token id.
    """
    content = []
    for entry, data in zip(entries, token_bytes, strict=True):
        top = [_to_chat_entry(get_bytes(token), logprob) for token, logprob in entry.top]
        content.append({**_to_chat_entry(data, entry.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _to_chat_entry(data: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": data.decode("utf-8", errors="backslashreplace"),
        "logprob": clamp(logprob),
        "bytes": list(data),
    }


def clamp(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    # NaN compares false with everything, so it too becomes the lowest.
    return logprob if logprob >= LOWEST_LOGPROB else LOWEST_LOGPROB


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a completion as it is reported.

    data: its bytes. entry: None for a first prompt token, of which a model says nothing.
    is_shown: False for a token that is no part of the text, such as an end token.
    """

    data: bytes
    entry: TokenLogprob | None
    is_shown: bool = True


class CompletionLogprobs:
    """Builds `choices[].logprobs` of one choice of a completion, delta by delta.

    It keeps the offset: `text_offset` is the number of characters of the choice's text that the
    tokens before have completed. hidden_chars: of the first tokens, how many characters are not in
    the text (a begin token's name, the space that a tokenizer puts before a text).
    """

    def __init__(self, get_bytes: GetBytes, hidden_chars: int = 0) -> None:
        self._get_bytes = get_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = -hidden_chars

    def build(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """The shape for the next tokens; mutates the running offset."""
        offsets = []
        for token in tokens:
            offsets.append(max(0, self._offset))
            if token.is_shown:
                self._offset += len(self._decoder.decode(token.data))
        return {
            "tokens": [_to_text(token.data) for token in tokens],
            "token_logprobs": [
                None if token.entry is None else clamp(token.entry.logprob) for token in tokens
            ],
            "top_logprobs": [self._to_top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _to_top(self, token: ScoredToken) -> dict[str, float] | None:
        if token.entry is None:
            return None
        top = {_to_text(self._get_bytes(each)): clamp(value) for each, value in token.entry.top}
        top.setdefault(_to_text(token.data), clamp(token.entry.logprob))
        return top


def _to_text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
