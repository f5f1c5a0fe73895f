"""How many free blocks newcomers leave to those that run: a default for `watermark_blocks`.

Owns one formula and its reason. Admission already leaves one spare block to every sequence that
runs (core/roster.py: measure_slack); the watermark is for what they need beyond that until some of
them end. It never keeps anybody out for good: with nothing running there is no watermark. This is
the least; preemptions raise it for a while (core/roster.py).
"""

from __future__ import annotations

# Simulated bursts and overloads of ten and thirty times the pool, with the lengths of Azure's
# conversations and of shorter prompts and longer answers: a sixteenth leaves less than half of the
# preemptions and costs at most 4 % of the time (docs/log.md). Less leaves too many where answers
# are longer than prompts; more costs time where preemptions are rare anyway.
POOL_PARTS = 16
# Few rows cannot use up more than this before one of them ends; a larger pool needs no more.
ROW_BLOCKS = 4


def choose_watermark(num_blocks: int, max_rows: int) -> int:
    """Blocks to keep free of newcomers, of a pool of `num_blocks` with steps of `max_rows` rows."""
    return min(num_blocks // POOL_PARTS, ROW_BLOCKS * max_rows)
