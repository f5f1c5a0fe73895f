"""Paces that look at no prediction: a fixed budget, the load heuristic, and static batches.

They are what engines do today, kept as honest baselines on the same scheduler and kernels; the
pace that keeps latency targets is in target.py. A pace says how many tokens of prompts a step takes
and how many sequences it admits, never which: that is the order's.
"""

from __future__ import annotations

from twostroke.core.policy import Load, Room
from twostroke.core.types import StepOutcome, StepPlan
from twostroke.errors import InvalidParameter

EVERYBODY = 1 << 62

CHUNK_TOKENS = 2_048
SHORT_TOKENS = 512
LONG_TOKENS = 10_000


class TokenRoom:
    """Room for so many tokens, wherever they are; a `Room` of core/policy.py.

    Rows that are added before anybody asked for tokens are decodes with drafts, whose first token
    the maker of the room has taken off already.
    """

    __slots__ = ("_asked", "_left", "newcomers", "wake_ns")

    def __init__(self, tokens: int, newcomers: int = EVERYBODY, wake_ns: int = 0) -> None:
        self.newcomers = newcomers
        self.wake_ns = wake_ns
        self._left = tokens
        self._asked = False

    def get_tokens(self, start: int, wanted: int) -> int:
        """What is left of the tokens, at most `wanted`."""
        self._asked = True
        return max(0, min(self._left, wanted))

    def add(self, start: int, tokens: int) -> None:
        """Take a row's tokens off."""
        self._left -= tokens if self._asked else tokens - 1


class ChunkRoom:
    """Room for chunks by the load heuristic (LoadHeuristicPace); drafts are none of its business.

    chunk: most tokens of prompts in this step, and half of it for a long one, or for all.
    """

    __slots__ = ("_asked", "_chunk", "_halved", "_placed", "newcomers", "wake_ns")

    def __init__(self, chunk: int, is_halved: bool) -> None:
        self.newcomers = EVERYBODY
        self.wake_ns = 0
        self._halved = chunk // 2
        self._chunk = self._halved if is_halved else chunk
        self._placed = 0
        self._asked = False

    def get_tokens(self, start: int, wanted: int) -> int:
        """Tokens of one more row, whose known tokens end at start + wanted."""
        self._asked = True
        length = start + wanted
        left = (self._halved if length > LONG_TOKENS else self._chunk) - self._placed
        if left <= 0:
            return 0
        return wanted if length <= SHORT_TOKENS else min(left, wanted)

    def add(self, start: int, tokens: int) -> None:
        """Count a row in."""
        if self._asked:
            self._placed += tokens


class FixedPace:
    """Every step takes at most `step_tokens` tokens, decodes among them.

    The budget of Sarathi-Serve (Agrawal et al. 2024, §4.3), set by hand. Raises
    InvalidParameter when step_tokens is below 1.
    """

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = _check("step_tokens", step_tokens, 1)

    def open_step(self, load: Load, now: int) -> Room:
        """What the decodes leave of the budget."""
        return TokenRoom(self.step_tokens - len(load.decodes))

    def note_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Nothing to learn."""


class LoadHeuristicPace:
    """The well-known rule of thumb: prompts go in chunks that shrink when there is much to do.

    A step takes `chunk_tokens` of prompts; half of that when more than 4/5 of the KV blocks are in
    use, or for a prompt longer than LONG_TOKENS; a prompt of at most SHORT_TOKENS is taken whole as
    long as there is any room. Raises InvalidParameter when chunk_tokens is below 2.
    """

    def __init__(self, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.chunk_tokens = _check("chunk_tokens", chunk_tokens, 2)

    def open_step(self, load: Load, now: int) -> Room:
        """The chunk of this step."""
        is_loaded = 5 * (load.num_blocks - load.free_blocks) > 4 * load.num_blocks
        # The length of the first in line is known here even where a step could not take it whole.
        first = load.prefills[0][1] if load.prefills else load.head
        is_long = first is not None and len(first.prompt) > LONG_TOKENS
        return ChunkRoom(self.chunk_tokens, is_loaded or is_long)

    def note_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Nothing to learn."""


class StaticBatchPace:
    """Batches as before continuous batching: nobody joins one that runs (Yu et al. 2022, §3.1).

    While nothing runs, a batch opens as soon as `size` sequences wait or the first of them has
    waited `timeout_ns`. It takes those that wait then, at most `size`, over as many steps as their
    prompts need; whoever comes later waits until all of them have ended. One that is preempted
    waits too, for the next batch. Raises InvalidParameter when size is below 1 or timeout_ns below
    0.
    """

    def __init__(self, size: int, timeout_ns: int) -> None:
        self.size = _check("batch_size", size, 1)
        self.timeout_ns = _check("batch_timeout_ns", timeout_ns, 0)
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


def _check(name: str, value: int, least: int) -> int:
    if value < least:
        raise InvalidParameter(name, f"must be at least {least}, not {value}")
    return value
