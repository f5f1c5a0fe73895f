"""How a preempted sequence comes back: its KV moved out and in again, or computed again.

Owns the comparison of the two predicted times and nothing else. Either way yields the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from twostroke.errors import InvalidParameter
from twostroke.spec.cost import StepCost


def build_swap_choice(
    cost: StepCost, block_bytes: int, step_tokens: int
) -> Callable[[int, int], bool]:
    """A `Policies.prefers_swap`: whether moving so many blocks is quicker than so many tokens.

    block_bytes: KV of one block, all layers. step_tokens: most tokens of a step; tokens are
    computed again in chunks of these, beside nothing else. That overstates the cost of computing
    where chunks share a step, and its weights, with decodes; but the same decodes then wait for
    them, which a copy spares them. On a tie KV is computed again, which needs no host memory.
    Raises InvalidParameter when a size is below 1.
    """
    for name, value in (("block_bytes", block_bytes), ("step_tokens", step_tokens)):
        if value < 1:
            raise InvalidParameter(name, f"must be at least 1, not {value}")

    def prefers_swap(tokens: int, blocks: int) -> bool:
        copies_ns = 2 * cost.predict_copy_ns(blocks * block_bytes)
        computing_ns = 0
        for start in range(0, tokens, step_tokens):
            chunk = cost.get_row_totals(min(step_tokens, tokens - start), start, 0)
            computing_ns += cost.predict_ns(chunk)
            if computing_ns > copies_ns:
                return True
        return False

    return prefers_swap
