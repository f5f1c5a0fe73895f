"""SamplingParams: what a caller asks of one request, checked the moment it is made.

It owns the public names, defaults and ranges of the sampling parameters. Nothing out of range
gets past its constructor: each refusal is an `InvalidParameter` that names the parameter, the
value and the valid range. It never looks at a model; what depends on one (token ids against the
vocabulary, an open `max_tokens` against the context) is settled in `to_request`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twostroke.core.types import Request, SamplingSpec
from twostroke.errors import InvalidParameter
from twostroke.text.grammar import StructuredOutputs, read_structured_outputs
from twostroke.text.tokenizer import check_text

MAX_N = 128
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**20
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0
MAX_TOKENS = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
# Below this a division by the temperature leaves one candidate in 32-bit arithmetic: greedy.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled and when it stops; values are normalised when it is made.

    n: continuations of the prompt, 1 … 128. temperature: 0 is greedy. top_k: 0 or -1 is off.
    top_p, min_p: 1.0 and 0.0 are off. repetition_penalty: 1.0 is off. seed: None draws a fresh
    one when the request is submitted, which the request then records. max_tokens: None goes on
    for as long as the context allows. min_tokens: no end token and none of stop_token_ids is
    obeyed before so many; stop strings always are. stop: up to 16 strings, none of which is part
    of the text. stop_token_ids: end a continuation and are its last token. ignore_eos: the
    model's own end tokens do not stop it. logprobs, prompt_logprobs: None, or how many
    alternatives to report, at most 20. logit_bias: token id to addend. structured_outputs: what the
    text must match, as a StructuredOutputs or a mapping of its fields; the model's end token then
    comes when the text may end, so ignore_eos and min_tokens cannot be asked for beside it. Raises
    InvalidParameter.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._set("n", _check_int("n", self.n, 1, MAX_N))
        for name, low, high in _FLOAT_RANGES:
            self._set(name, _check_float(name, getattr(self, name), low, high))
        self._set("top_k", _check_int("top_k", self.top_k, -1, MAX_TOP_K))
        if self.seed is not None:
            self._set("seed", _check_int("seed", self.seed, -(2**63), 2**64 - 1))
        self._check_lengths()
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, _check_int(name, value, 0, MAX_LOGPROBS))
        for name in ("ignore_eos", "skip_special_tokens"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidParameter(name, f"must be true or false, not {value!r}")
        self._set("stop", _check_stops(self.stop))
        self._set("stop_token_ids", _check_stop_tokens(self.stop_token_ids))
        self._set("logit_bias", _check_biases(self.logit_bias))
        self._set("structured_outputs", read_structured_outputs(self.structured_outputs))
        for name in ("ignore_eos", "min_tokens") if self.structured_outputs is not None else ():
            if getattr(self, name):
                raise InvalidParameter(name, "cannot be asked for beside structured outputs")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, always as a tuple."""
        stops = self.stop
        return (stops,) if isinstance(stops, str) else tuple(stops or ())

    @property
    def grammar(self) -> str:
        """The canonical text of what the output must match; empty for anything."""
        chosen = self.structured_outputs
        return chosen.text if isinstance(chosen, StructuredOutputs) else ""

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            self._set("max_tokens", _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS))
        limit = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        self._set("min_tokens", _check_int("min_tokens", self.min_tokens, 0, limit))

    def _set(self, name: str, value: object) -> None:
        # The one way to store a normalised value in a frozen dataclass; only __post_init__ uses it.
        object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What an engine adds to a request: the model's end tokens, vocabulary size and context in
    tokens, and the target for a first token, 0 for none."""

    stop_ids: frozenset[int]
    vocab_size: int
    context_tokens: int
    ttft_ns: int = 0


def to_request(
    params: SamplingParams,
    request_id: str,
    prompt: tuple[int, ...],
    *,
    seed: int,
    limits: ModelLimits,
    priority: int = 0,
) -> Request:
    """The scheduler's request for checked parameters and token ids.

    seed: used where params.seed is None. An open max_tokens becomes what the context leaves, and
    at least 1, so that a prompt that fills the context is the scheduler's to reject.
    Raises InvalidParameter for token ids outside the vocabulary.
    """
    for token in params.logit_bias or {}:
        _check_in_vocabulary("logit_bias", token, limits.vocab_size)
    for token in params.stop_token_ids:
        _check_in_vocabulary("stop_token_ids", token, limits.vocab_size)
    stop_ids = frozenset() if params.ignore_eos else limits.stop_ids
    room = max(1, limits.context_tokens - len(prompt))
    return Request(
        id=request_id,
        prompt=prompt,
        max_new_tokens=room if params.max_tokens is None else params.max_tokens,
        sampling=_to_sampling_spec(params, seed),
        n=params.n,
        stop_tokens=stop_ids | frozenset(params.stop_token_ids),
        min_new_tokens=params.min_tokens,
        prompt_logprobs=params.prompt_logprobs,
        priority=priority,
        ttft_ns=limits.ttft_ns,
    )


def _to_sampling_spec(params: SamplingParams, seed: int) -> SamplingSpec:
    greedy = params.temperature < GREEDY_TEMPERATURE
    chosen = seed if params.seed is None else params.seed
    return SamplingSpec(
        temperature=0.0 if greedy else params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=chosen % 2**64,
        logit_bias=tuple(sorted((params.logit_bias or {}).items())),
        logprobs=params.logprobs,
        grammar=params.grammar,
    )


_FLOAT_RANGES = (
    ("temperature", 0.0, MAX_TEMPERATURE),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


def _check_int(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidParameter(name, f"must be an integer from {low} to {high}, not {value!r}")
    number = int(value)
    if not low <= number <= high:
        raise InvalidParameter(name, f"must be from {low} to {high}, not {_shorten(number)}")
    return number


def _check_float(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidParameter(name, f"must be a number from {low:g} to {high:g}, not {value!r}")
    # Compared before the conversion: a huge int does not fit a float. NaN fails both comparisons.
    number: Any = value
    if not low <= number <= high:
        raise InvalidParameter(name, f"must be from {low:g} to {high:g}, not {_shorten(number)}")
    return float(number)


def _check_stops(stops: Any) -> tuple[str, ...]:
    if stops is None:
        return ()
    strings = (stops,) if isinstance(stops, str) else stops
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise InvalidParameter("stop", f"must be a string or a list of strings, not {stops!r}")
    if len(strings) > MAX_STOPS:
        raise InvalidParameter("stop", f"must be at most {MAX_STOPS} strings, not {len(strings)}")
    for string in strings:
        if not isinstance(string, str):
            raise InvalidParameter("stop", f"must be strings, not {string!r}")
        if not 1 <= len(string) <= MAX_STOP_CHARS:
            raise InvalidParameter(
                "stop", f"each must have 1 to {MAX_STOP_CHARS} characters, not {len(string)}"
            )
        check_text("stop", string)
    return tuple(strings)


def _check_stop_tokens(tokens: Any) -> tuple[int, ...]:
    if tokens is None:
        return ()
    if not isinstance(tokens, Sequence | frozenset | set) or isinstance(tokens, str | bytes):
        raise InvalidParameter("stop_token_ids", f"must be a list of token ids, not {tokens!r}")
    if len(tokens) > MAX_STOP_TOKEN_IDS:
        raise InvalidParameter(
            "stop_token_ids", f"must be at most {MAX_STOP_TOKEN_IDS} ids, not {len(tokens)}"
        )
    return tuple(sorted(_check_int("stop_token_ids", token, 0, MAX_TOKENS) for token in tokens))


def _check_biases(biases: Any) -> dict[int, float]:
    if biases is None:
        return {}
    if not isinstance(biases, Mapping):
        raise InvalidParameter("logit_bias", f"must map token ids to numbers, not be {biases!r}")
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidParameter(
            "logit_bias", f"must have at most {MAX_LOGIT_BIASES} entries, not {len(biases)}"
        )
    limit = MAX_LOGIT_BIAS
    return {
        _check_int("logit_bias", token, 0, MAX_TOKENS): _check_float(
            "logit_bias", value, -limit, limit
        )
        for token, value in biases.items()
    }


def _check_in_vocabulary(name: str, token: int, vocab_size: int) -> None:
    if token >= vocab_size:
        raise InvalidParameter(name, f"token ids must be from 0 to {vocab_size - 1}, not {token}")


def _shorten(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {math.ceil(value.bit_length() * math.log10(2))} digits"
    return str(value)
