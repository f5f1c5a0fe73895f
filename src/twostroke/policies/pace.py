"""Paces that look at no prediction: a fixed budget, the load heuristic, and static batches.

They are what engines do today, kept as honest baselines on the same scheduler and kernels; the
pace that keeps latency targets is in target.py. A pace says how many tokens of prompts a step takes
and how many sequences it admits, never which: that is the order's.
"""

from __future__ import annotations

from twostroke.core.policy import Load, Room
from twostroke.core.types import Request, StepOutcome, StepPlan
from twostroke.errors import InvalidParameter

EVERYBODY = 1 << 62

CHUNK_TOKENS = 2_048
SHORT_TOKENS = 512
LONG_TOKENS = 10_000


class TokenRoom:
    """Room for so many tokens, wherever they are; a `Room` of core/policy.py."""

    __slots__ = ("_left", "newcomers", "wake_ns")

    def __init__(self, tokens: int, newcomers: int = EVERYBODY, wake_ns: int = 0) -> None:
        self.newcomers = newcomers
        self.wake_ns = wake_ns
        self._left = tokens

    def get_tokens(self, start: int) -> int:
        """What is left of the tokens."""
        return max(0, self._left)

    def add(self, start: int, tokens: int) -> None:
        """Take a row's tokens off."""
        self._left -= tokens


class FixedPace:
    """Every step takes at most `step_tokens` tokens, decodes among them (Agrawal et al. 2024, §4.3).

    Raises InvalidParameter when step_tokens is below 1.
    """

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = _check("step_tokens", step_tokens)

    def open_step(self, load: Load, now: int) -> Room:
        """What the decodes leave of the budget."""
        return TokenRoom(self.step_tokens - len(load.decodes))

    def note_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Nothing to learn."""


class LoadHeuristicPace:
    """The well-known rule of thumb: prompts go in chunks that shrink when there is much to do.

    A step takes `chunk_tokens` of prompts; half of that when more than 4/5 of the KV blocks are in
    use or the prompt is longer than LONG_TOKENS; and a prompt of at most SHORT_TOKENS whole. The
    prompt that is looked at is the first in line. Raises InvalidParameter when chunk_tokens is
    below 2.
    """

    def __init__(self, chunk_tokens: int = CHUNK_TOKENS) -> None:
        if chunk_tokens < 2:
            raise InvalidParameter(
                "chunk_tokens", f"must be at least 2 to be halved, not {chunk_tokens}"
            )
        self.chunk_tokens = chunk_tokens

    def open_step(self, load: Load, now: int) -> Room:
        """The chunk of this step."""
        first = _find_first(load)
        if first is None:
            return TokenRoom(self.chunk_tokens)
        prompt_tokens = len(first.prompt)
        is_loaded = 5 * (load.num_blocks - load.free_blocks) > 4 * load.num_blocks
        chunk = self.chunk_tokens
        if is_loaded or prompt_tokens > LONG_TOKENS:
            chunk //= 2
        return TokenRoom(max(chunk, prompt_tokens) if prompt_tokens <= SHORT_TOKENS else chunk)

    def note_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Nothing to learn."""


class StaticBatchPace:
    """Batches as before continuous batching: nobody joins one that runs (Yu et al. 2022, §3.1).

    While nothing runs, a batch opens as soon as `size` sequences wait or the first of them has
    waited `timeout_ns`. It takes those that wait then, at most `size`, over as many steps as their
    prompts need; whoever comes later waits until all of them have ended. One that is preempted
    waits too, for the next batch. Raises InvalidParameter when size is below 1 or timeout_ns below 0.
    """

    def __init__(self, size: int, timeout_ns: int) -> None:
        self.size = _check("size", size)
        if timeout_ns < 0:
            raise InvalidParameter("timeout_ns", f"must be at least 0, not {timeout_ns}")
        self.timeout_ns = timeout_ns
        # What is left of its `newcomers` is what is yet to be admitted of the batch.
        self._room = TokenRoom(EVERYBODY, 0)

    def open_step(self, load: Load, now: int) -> Room:
        """Room for what is left of the batch; for a new one when it is time."""
        left, wake_ns = min(self._room.newcomers, load.waiting), 0
        if not left and load.waiting and not load.decodes and not load.prefills:
            due_ns = load.oldest_ns + self.timeout_ns
            if load.waiting >= self.size or now >= due_ns:
                left = min(self.size, load.waiting)
            else:
                wake_ns = due_ns
        self._room = TokenRoom(EVERYBODY, left, wake_ns)
        return self._room

    def note_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Nothing to learn."""


def _find_first(load: Load) -> Request | None:
    """The request whose prompt is first in line: of those that run, else of those that wait."""
    return load.prefills[0][1] if load.prefills else load.head


def _check(name: str, value: int) -> int:
    if value < 1:
        raise InvalidParameter(name, f"must be at least 1, not {value}")
    return value
