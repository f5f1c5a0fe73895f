"""Advice: which change would help a running engine most, from its own counters.

Pure: a snapshot of metrics in, ranked advice out. Every piece says what it would change, by how
much at most, and from which numbers; gains are bounds on throughput or on a latency, by the
roofline's reasoning and never by guessing. Where nothing stands out it says so. It must never
advise on too few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# Fewer steps than this say nothing.
LEAST_STEPS = 50
# A gain below this is not worth anybody's change.
LEAST_GAIN = 0.05

_QUEUE_SHARE = 0.2
_FULL_POOL = 0.9
_LOW_HITS = 0.1
_PYTHON_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a server has counted so far, or between two moments; seconds and counts.

    cause_seconds: wall time of steps by engine/accounts.CAUSES. floor_seconds: least time of their
    work. queue_seconds, prefill_seconds, decode_seconds: summed over requests that ended. waiting:
    now. kv_usage: share of the pool's blocks in use now.
    """

    steps: int = 0
    wall_seconds: float = 0.0
    floor_seconds: float = 0.0
    cause_seconds: Mapping[str, float] = field(default_factory=dict)
    requests: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def busy_seconds(self) -> float:
        """Wall time of steps without what was idle before them."""
        return max(0.0, self.wall_seconds - self.cause_seconds.get("idle", 0.0))

    @property
    def decode_rows(self) -> float:
        """Tokens written in a step, on average: how many sequences share what a step reads."""
        return self.generation_tokens / self.steps if self.steps else 0.0

    @property
    def limit_share(self) -> float:
        """The least time of all work over the busy time."""
        return self.floor_seconds / self.busy_seconds if self.busy_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Advice:
    """One change. gain: how much of the named target it can save at most, 0 to 1."""

    change: str
    target: str
    gain: float
    evidence: str


def advise(snapshot: Snapshot) -> list[Advice]:
    """What would help, the largest gain first; empty where nothing would by LEAST_GAIN.

    Empty also with fewer than LEAST_STEPS steps, which the caller tells apart by looking.
    """
    if snapshot.steps < LEAST_STEPS or not snapshot.busy_seconds:
        return []
    found = [rule(snapshot) for rule in _RULES]
    chosen = [advice for advice in found if advice is not None and advice.gain >= LEAST_GAIN]
    return sorted(chosen, key=lambda advice: -advice.gain)


def _advise_pool(snapshot: Snapshot) -> Advice | None:
    """Requests wait for KV blocks: more of them let more decode at once."""
    waits = _get_queue_share(snapshot)
    if snapshot.kv_usage < _FULL_POOL or (waits < _QUEUE_SHARE and not snapshot.preemptions):
        return None
    return Advice(
        "give the KV pool more memory (--kv-memory), or store keys in 8 bits (--kv int8)",
        "time of requests",
        waits,
        f"{snapshot.kv_usage:.0%} of the KV blocks are in use, {snapshot.waiting} requests wait, "
        f"{snapshot.preemptions} preemptions; requests spent {waits:.0%} of their time queued",
    )


def _advise_capacity(snapshot: Snapshot) -> Advice | None:
    """Requests wait although blocks are free: steps are the bottleneck, not memory."""
    waits = _get_queue_share(snapshot)
    if waits < _QUEUE_SHARE or snapshot.kv_usage >= _FULL_POOL:
        return None
    return Advice(
        "let more sequences share a step (--max-rows), or send less to this engine",
        "time of requests",
        waits,
        f"requests spent {waits:.0%} of their time queued with {1 - snapshot.kv_usage:.0%} of the "
        f"KV blocks free; a step writes {snapshot.decode_rows:.1f} tokens on average",
    )


def _advise_batch(snapshot: Snapshot) -> Advice | None:
    """Weights are read for few sequences: a step of twice as many reads them once."""
    read = snapshot.cause_seconds.get("bandwidth", 0.0)
    share = read / snapshot.busy_seconds
    if snapshot.decode_rows < 1 or snapshot.waiting:
        return None
    # Twice the rows halve how often the weights are read for a token.
    return Advice(
        "send more requests at once: the weights are read for each step, whoever shares it",
        "time of a token over all requests",
        share / 2,
        f"{share:.0%} of the busy time goes into reading weights, for {snapshot.decode_rows:.1f} "
        "tokens a step; with twice as many a step, half of that",
    )


def _advise_drafts(snapshot: Snapshot) -> Advice | None:
    """Drafts that are refused cost arithmetic and save nothing."""
    if not snapshot.drafted:
        return None
    rate = snapshot.accepted / snapshot.drafted
    if rate >= 0.5:
        return None
    wasted = (snapshot.drafted - snapshot.accepted) / (
        snapshot.drafted + snapshot.generation_tokens + snapshot.prompt_tokens
    )
    return Advice(
        "leave --drafts out: few of its guesses are right here",
        "tokens computed",
        wasted,
        f"{snapshot.accepted} of {snapshot.drafted} drafted tokens were right ({rate:.0%})",
    )


def _advise_prompts(snapshot: Snapshot) -> Advice | None:
    """Prefill dominates and nothing of it is shared."""
    lives = snapshot.queue_seconds + snapshot.prefill_seconds + snapshot.decode_seconds
    share = snapshot.prefill_seconds / lives if lives else 0.0
    hits = snapshot.prefix_hits / snapshot.prefix_queries if snapshot.prefix_queries else 0.0
    if share < 0.3 or hits >= _LOW_HITS:
        return None
    return Advice(
        "begin prompts with what they share (system prompt, documents) so that its KV is reused",
        "time of requests",
        share,
        f"requests spent {share:.0%} of their time in prefill and {hits:.0%} of prompt tokens "
        "were found in the prefix cache; what is shared costs nothing the second time",
    )


def _advise_python(snapshot: Snapshot) -> Advice | None:
    """Python around steps: large only where steps are very short."""
    share = snapshot.cause_seconds.get("python", 0.0) / snapshot.busy_seconds
    if share < _PYTHON_SHARE:
        return None
    return Advice(
        "share steps among more requests, or ask for whole answers instead of streams: steps are "
        "short, and Python around each is not",
        "time of steps",
        share,
        f"{share:.0%} of the busy time is Python around steps of "
        f"{1e3 * snapshot.busy_seconds / snapshot.steps:.2f} ms",
    )


def _advise_wait(snapshot: Snapshot) -> Advice | None:
    """The way to an executor elsewhere."""
    share = snapshot.cause_seconds.get("wait", 0.0) / snapshot.busy_seconds
    return Advice(
        "run the executor nearer: the engine waits for its answers beyond what it computes",
        "time of steps",
        share,
        f"{share:.0%} of the busy time is waiting for the executor beyond its own steps",
    )


def _get_queue_share(snapshot: Snapshot) -> float:
    lives = snapshot.queue_seconds + snapshot.prefill_seconds + snapshot.decode_seconds
    return snapshot.queue_seconds / lives if lives else 0.0


_RULES: tuple[Callable[[Snapshot], Advice | None], ...] = (
    _advise_pool,
    _advise_capacity,
    _advise_batch,
    _advise_drafts,
    _advise_prompts,
    _advise_python,
    _advise_wait,
)
