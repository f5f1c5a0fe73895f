"""What is asked of an engine: a request, how its tokens are drawn and told, and how it may end.

All is frozen data, complete in itself: replayed anywhere it asks for the same tokens. Token ids are
ints, times integer nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

Token = int
MAX_CONTINUATIONS = 1024


@dataclass(frozen=True, slots=True, order=True)
class SequenceId:
    """One of the `n` continuations of a request; `index` runs from 0."""

    request: str
    index: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log) of `token`, with the most likely alternatives, best first."""

    token: Token
    logprob: float
    top: tuple[tuple[Token, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the next token is drawn from logits; every field is data, so a replay draws the same.

    Applied in this order: penalties and bias on the logits, the grammar's mask, temperature, top-k,
    top-p, min-p.
    temperature: 0 means greedy. top_k: 0 means off. top_p, min_p: 1.0 and 0.0 mean off.
    repetition_penalty: 1.0 means off (Keskar et al. 2019, §4.1); over prompt and output.
    presence_penalty, frequency_penalty: 0.0 means off; over the output only.
    seed: of the counter-based generator; the draw depends on (seed, sequence index, position).
    logit_bias: (token, addend) pairs in ascending token order.
    logprobs: None for none, else how many of the most likely tokens to report beside the chosen
    one. They are of the model's own distribution, before any of the above.
    grammar: empty, or what the output must match, as text/grammar.py writes it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[Token, float], ...] = ()
    logprobs: int | None = None
    grammar: str = ""

    @property
    def needs_history(self) -> bool:
        """True when the draw depends on the tokens so far, or on a mask made from them."""
        return self.has_penalties or self.grammar != ""

    @property
    def has_penalties(self) -> bool:
        """True when logits are changed by which tokens occurred so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the scheduler.

    stop_tokens end a sequence (the stop token itself is emitted last, flagged by the finish
    reason); they are not obeyed before `min_new_tokens`. `n` continuations share the prompt's
    blocks. `prompt_logprobs`: None, else report each prompt token's log-probability with that many
    alternatives. `priority`: smaller is more urgent. `tenant`: who shares are counted for.
    `cache_scope`: adapter and tenant salt; a prefix is reused within one scope only. `ttft_ns`,
    `itl_ns`: targets for the first token and between tokens; 0 means none. `expected_tokens`: the
    output's length as the caller predicts it; 0 means unknown. `resumed`: empty, or for each of the
    n what an earlier run emitted of it, and None for one that had ended, which does not run again.
    Those tokens count as output in every way, but are not emitted a second time.
    """

    id: str
    prompt: tuple[Token, ...]
    max_new_tokens: int
    sampling: SamplingSpec = SamplingSpec()
    n: int = 1
    stop_tokens: frozenset[Token] = frozenset()
    min_new_tokens: int = 0
    prompt_logprobs: int | None = None
    priority: int = 0
    tenant: str = ""
    cache_scope: str = ""
    ttft_ns: int = 0
    itl_ns: int = 0
    expected_tokens: int = 0
    resumed: tuple[tuple[Token, ...] | None, ...] = ()

    @property
    def num_open(self) -> int:
        """Continuations that run: all but those that had ended."""
        return self.n - self.resumed.count(None)

    def get_resumed(self, index: int) -> tuple[Token, ...]:
        """What an earlier run emitted of a continuation."""
        return (self.resumed[index] or ()) if self.resumed else ()

    def find_fault(self, vocab_size: int) -> str:
        """What is wrong with it whoever serves it, as "field: message"; empty if nothing."""
        return (
            self._find_prompt_fault(vocab_size)
            or self._find_number_fault(vocab_size)
            or self._find_resumed_fault(vocab_size)
        )

    def _find_prompt_fault(self, vocab_size: int) -> str:
        """What is wrong with the id or the prompt, whatever its length."""
        prompt = self.prompt
        if type(self.id) is not str or not self.id:
            return "id: must be a string that is not empty"
        if type(prompt) is not tuple or not prompt:
            return "prompt: must be a tuple of at least one token id"
        if set(map(type, prompt)) != {int}:
            return "prompt: token ids must be integers"
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            return f"prompt: token id {wrong} is not in 0 … {vocab_size - 1}"
        return ""

    def _find_number_fault(self, vocab_size: int) -> str:
        """Which number is no integer or out of range."""
        top = 0 if self.prompt_logprobs is None else self.prompt_logprobs
        for name, value, least, most in (
            ("max_new_tokens", self.max_new_tokens, 1, None),
            ("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens),
            ("n", self.n, 1, MAX_CONTINUATIONS),
            ("prompt_logprobs", top, 0, vocab_size),
            ("priority", self.priority, None, None),
            ("ttft_ns", self.ttft_ns, 0, None),
            ("itl_ns", self.itl_ns, 0, None),
            ("expected_tokens", self.expected_tokens, 0, None),
        ):
            if type(value) is not int:
                return f"{name}: must be an integer, not {type(value).__name__}"
            if least is not None and value < least:
                return f"{name}: must be at least {least}, not {value}"
            if most is not None and value > most:
                return f"{name}: must be at most {most}, not {value}"
        return ""

    def _find_resumed_fault(self, vocab_size: int) -> str:
        """Whether what was emitted before can be gone on with."""
        if not self.resumed:
            return ""
        if type(self.resumed) is not tuple or len(self.resumed) != self.n:
            return f"resumed: must be a tuple of {self.n}, one for each continuation"
        if not self.num_open:
            return "resumed: every continuation has ended"
        for tokens in self.resumed:
            if tokens is None:
                continue
            if type(tokens) is not tuple or not set(map(type, tokens)) <= {int}:
                return "resumed: must hold tuples of token ids, or None"
            if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                return f"resumed: token ids must be in 0 … {vocab_size - 1}"
            if len(tokens) >= self.max_new_tokens:
                return f"resumed: {len(tokens)} tokens leave none of {self.max_new_tokens}"
        return ""


# ---- how requests end ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finished:
    """Ended as asked: reason is "stop" (stop token or string) or "length"."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """Could never run; `limit_tokens` is the longest prompt that would, where that is the cause."""

    reason: str
    limit_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Ended because the caller asked."""

    reason: str = "cancelled"


@dataclass(frozen=True, slots=True)
class Failed:
    """Ended because the engine could not go on with it."""

    reason: str


Ending = Finished | Rejected | Cancelled | Failed
