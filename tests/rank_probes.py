"""Ranks whose steps check what `kernels/cuda/collectives.py` promises, between real processes.

A plan's first token names the check; every rank knows what all ranks hold, because what a rank
holds follows from its number. A check that fails loses the group with the assertion's words.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

import torch

from twostroke.core.ports import ExecutorInfo, OnDone
from twostroke.core.types import BlockId, RowResult, StepOutcome, StepPlan
from twostroke.exec.rank_wire import RankContext
from twostroke.kernels.cuda.collectives import Collectives, connect
from twostroke.spec.ranks import RankPlace

CPU = torch.device("cpu")
Check = Callable[[Collectives], None]


def make_part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What rank `rank` holds: random numbers of every size, the same on every call."""
    generator = torch.Generator().manual_seed(100 + rank)
    values = torch.randn(shape, generator=generator) * torch.exp(
        3 * torch.randn(shape, generator=generator)
    )
    return values.to(dtype)


def get_stage_ranks(place: RankPlace) -> range:
    """All ranks of the place's stage."""
    first = place.stage * place.layout.tensor
    return range(first, first + place.layout.tensor)


def check_sums(collectives: Collectives) -> None:
    """A sum is that of the stage's ranks, rounded no more than once an addition, in place."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((1, 8), (5, 33)):
            parts = [make_part(rank, shape, dtype) for rank in get_stage_ranks(collectives.place)]
            x = make_part(collectives.place.rank, shape, dtype)
            collectives.all_reduce(x)
            exact = sum(part.double() for part in parts)
            sizes = sum(part.double().abs() for part in parts)
            bound = (len(parts) - 1) * torch.finfo(dtype).eps * sizes
            assert bool(((x.double() - exact).abs() <= bound).all()), (dtype, shape)


def check_sums_of_rows(collectives: Collectives) -> None:
    """With `is_exact` a row's sum does not depend on how many rows are summed, bit for bit."""
    assert collectives.is_exact
    whole = make_part(collectives.place.rank, (37, 65), torch.bfloat16)
    rows = {row: whole[row : row + 1].clone() for row in (0, 17, 36)}
    for one in (whole, *rows.values()):
        collectives.all_reduce(one)
    assert all(torch.equal(whole[row], one[0]) for row, one in rows.items())


def check_logits(collectives: Collectives) -> None:
    """The rank that draws has the parts of its stage side by side, exactly; padding included."""
    place = collectives.place
    if not place.is_last_stage:
        return
    for rows in (1, 3, 2):
        parts = [make_part(rank, (rows, 5), torch.float32) for rank in get_stage_ranks(place)]
        out = torch.full((rows, 5 * len(parts)), torch.nan)
        collectives.gather_logits(out, make_part(place.rank, (rows, 5), torch.float32))
        if place.is_sampling:
            assert torch.equal(out, torch.cat(parts, dim=1))


def check_hidden(collectives: Collectives) -> None:
    """Hidden states pass from shard to shard through all stages, two steps behind each other."""
    place, tensor = collectives.place, collectives.place.layout.tensor
    for step in (1.0, 2.0):
        x = torch.full((3, 4), step)
        if not place.is_first_stage:
            x = torch.full((3, 4), torch.nan)
            collectives.receive_hidden(x)
            assert torch.equal(x, torch.full((3, 4), step) + place.rank - tensor)
        if not place.is_last_stage:
            collectives.send_hidden(torch.full((3, 4), step) + place.rank)


def check_tokens(collectives: Collectives) -> None:
    """Every rank that embeds has the tokens of the rank that draws; the others keep their own."""
    place = collectives.place
    tokens = torch.arange(4, dtype=torch.int32) + 10 * place.rank
    collectives.share_tokens(tokens)
    source = place.layout.sampling_rank if place.rank in place.layout.token_ranks else place.rank
    assert torch.equal(tokens, torch.arange(4, dtype=torch.int32) + 10 * source)


def check_least(collectives: Collectives) -> None:
    """The least is that of all ranks."""
    assert collectives.get_least(50 - collectives.place.rank, CPU) == 51 - (
        collectives.place.layout.world
    )


def die_in_a_sum(collectives: Collectives) -> None:
    """The last rank is killed while the others wait for its part."""
    if collectives.place.rank == collectives.place.layout.world - 1:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    collectives.get_least(1, CPU)


CHECKS: tuple[Check, ...] = (
    check_sums,
    check_logits,
    check_hidden,
    check_tokens,
    check_least,
    check_sums_of_rows,
    die_in_a_sum,
)


class Probe:
    """An Executor whose steps are checks."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def describe(self) -> ExecutorInfo:
        return ExecutorInfo("probe", "probe", 1, 1, 1, 1, 1, 1)

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        CHECKS[plan.rows[0].tokens[0]](self.collectives)
        on_done(StepOutcome(plan.step, (RowResult(plan.rows[0].sequence, (1,)),), 1))

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        return b""

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        return

    def close(self) -> None:
        self.collectives.close()


def make_probe(context: RankContext, job: object) -> Probe:
    """The factory of probes; the job is whether sums are to be exact."""
    torch.set_num_threads(1)
    is_exact = bool(job)
    return Probe(connect(context.place, CPU, context.store, context.timeout_s, is_exact))
