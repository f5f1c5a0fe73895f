"""A trace played again: faster or slower, longer or shorter, in part or several times over.

Owns what may be changed about a trace before it is simulated. With nothing changed every request
comes out as recorded, in the same order and number. The file is read anew for each pass, a line at
a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twostroke.sim.lengths import AS_RECORDED, Scaled
from twostroke.sim.traces import Drawn, TraceSummary, read_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """How a trace is played.

    prompt, new: what happens to lengths. speed: 2 plays it in half the time. requests, seconds:
    stop after so many, or before that instant of the replay; None plays all. passes: how often;
    each one's prefixes are texts of their own, as another hour's users would send.
    """

    prompt: Scaled = AS_RECORDED
    new: Scaled = AS_RECORDED
    speed: float = 1.0
    requests: int | None = None
    seconds: float | None = None
    passes: int = 1


def replay_trace(path: Path, summary: TraceSummary, how: Replay) -> Iterator[Drawn]:
    """The requests of a trace, played so; `summary` is of the same file.

    A further pass begins one mean gap after the last request. Raises InvalidParameter.
    """
    end_ns = None if how.seconds is None else round(how.seconds * 1e9)
    period_ns = summary.duration_ns
    if summary.requests > 1:
        period_ns += summary.duration_ns // (summary.requests - 1)
    left = how.requests
    for turn in range(how.passes):
        shift_ns, shift_id = turn * period_ns, turn * (summary.most_prefix_id + 1)
        for one in read_trace(path):
            at_ns = shift_ns + one.at_ns
            if how.speed != 1.0:
                at_ns = round(at_ns / how.speed)
            if left == 0 or (end_ns is not None and at_ns >= end_ns):
                return
            if left is not None:
                left -= 1
            prefix, prefix_tokens = one.prefix, one.prefix_tokens
            if prefix:
                prefix = tuple(each + shift_id for each in prefix) if shift_id else prefix
                prefix_tokens = how.prompt.scale(prefix_tokens)
            prompt, new = how.prompt.scale(one.prompt_tokens), how.new.scale(one.new_tokens)
            yield Drawn(at_ns, prompt, new, prefix, prefix_tokens)
