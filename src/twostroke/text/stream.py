"""StreamDecoder: text that is safe to show, token by token.

It keeps these true. What is shown is never taken back: no part of a character, and nothing a stop
string may still hide. Without a stop, what was shown plus what `finish` gives is the one-shot
decoding of all tokens, character for character. Work per token does not grow with the text.

Which stop string counts: characters are looked at one by one, in order. The first character after
which the text ends in a stop string decides; if it ends in several, the longest does. The text ends
before that stop string, and nothing is shown from then on. So the answer depends on the
characters only, not on how tokens cut them up.

    shown ............ | held: may begin a stop string | bytes of an unfinished character
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from twostroke.errors import InvalidParameter
from twostroke.text.stops import StopMatcher
from twostroke.text.tokenizer import Tokenizer, check_text


class StreamDecoder:
    """Decodes one stream of tokens. Not safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        skip_special: bool = True,
        *,
        after_prompt: bool = True,
    ) -> None:
        """stops: strings that end the text. skip_special: leave control tokens out.

        after_prompt: the tokens continue a prompt, so a leading space is the model's own and is
        shown; otherwise it goes where the vocabulary put it there (`Tokenizer.decode`).
        Raises InvalidParameter for a stop that is empty or no text.
        """
        for stop in stops:
            check_text("stop", stop)
            if not stop:
                raise InvalidParameter("stop", "must not be empty: every text begins with it")
        self._tokenizer = tokenizer
        self._matcher = StopMatcher(stops)
        self._has_stops = bool(stops)
        self._skip_special = skip_special
        self._strips_space = tokenizer.strips_space and not after_prompt
        self._unfinished = b""  # the first bytes of a character
        self._state = 0
        self._held = ""
        self._stop = ""
        self._finished = False

    @property
    def stopped(self) -> bool:
        """True once a stop string was met."""
        return bool(self._stop)

    @property
    def stop(self) -> str:
        """The stop string that was met, or an empty string."""
        return self._stop

    def feed(self, token: int) -> str:
        """Take one more token in; returns the new text that is safe to show, often none.

        Raises InvalidParameter for an id out of range, and takes nothing in then.
        """
        data = self._tokenizer.get_token_bytes(token)
        if self._tokenizer.is_control(token):
            data = b"" if self._skip_special else data
        elif self._strips_space:
            data = data.removeprefix(b" ")
            self._strips_space = False
        return self._take(self._decode(data, final=False))

    def finish(self) -> str:
        """No more tokens will come; returns the text that was held back.

        Bytes of an unfinished character become U+FFFD. Calling it again gives an empty string.
        """
        if self._finished:
            return ""
        self._finished = True
        text = self._take(self._decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _decode(self, data: bytes, final: bool) -> str:
        """The characters that `data` completes; wrong bytes become U+FFFD."""
        data = self._unfinished + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._unfinished = data[used:]
        return text

    def _take(self, text: str) -> str:
        if self._stop:
            return ""
        if not self._has_stops:
            return text
        state, matcher = self._state, self._matcher
        for count, character in enumerate(text, start=1):
            state = matcher.step(state, character)
            stop = matcher.matched[state]
            if stop:
                self._stop = stop
                seen = self._held + text[:count]
                self._held = ""
                return seen[: len(seen) - len(stop)]
        self._state = state
        seen = self._held + text
        shown = len(seen) - matcher.depths[state]
        self._held = seen[shown:]
        return seen[:shown]
