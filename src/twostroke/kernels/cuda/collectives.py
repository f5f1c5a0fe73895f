"""What the ranks of one model exchange within a step, over torch.distributed.

Owns the process groups of one rank: sums of activations and gathering of logits within a pipeline
stage, hidden states from a stage to the next, drawn tokens back to the first. NCCL's operations
run in the order of the stream and may be captured in a graph once `connect` has returned; gloo's,
on the CPU, return when they are done. Whoever sits in one that a peer never joins is ended by
`exec/ranks.py`. With one rank everything is the identity, and torch.distributed is not imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from twostroke.kernels.cuda.types import Tensor
from twostroke.spec.ranks import WHOLE, RankPlace

# Sums of two are the same in either order: no plan of a library's can change them.
_ORDERED_FROM = 3


@dataclass(frozen=True, slots=True)
class _Groups:
    """The process groups a rank is in; None where it would be alone."""

    stage: Any = None  # its pipeline stage
    tokens: Any = None  # RankLayout.token_ranks
    before: Any = None  # the same shard of the stage before and itself
    after: Any = None  # itself and the same shard of the stage behind


@dataclass(slots=True, eq=False)
class Collectives:
    """One rank's exchanges; all ranks concerned call the same ones in the same order.

    is_exact: a sum must not depend on how many rows are summed at once; beyond two ranks that costs
    memory traffic, as a library's own plan depends on it.
    """

    place: RankPlace = WHOLE
    is_exact: bool = False
    _groups: _Groups = field(default_factory=_Groups)
    # By dtype. One that was outgrown is kept: a captured graph may refer to it.
    _scratch: dict[torch.dtype, list[Tensor]] = field(default_factory=dict)

    def all_reduce(self, x: Tensor) -> None:
        """x, contiguous, summed over the stage's ranks in place; the same bits on all of them."""
        if self._groups.stage is None:
            return
        assert x.is_contiguous()
        tensor = self.place.layout.tensor
        if self.is_exact and tensor >= _ORDERED_FROM:
            parts = self._gather(x, tensor)
            total = parts[0].float()
            for part in parts[1:]:
                total += part
            x.copy_(total)
            return
        import torch.distributed as dist

        dist.all_reduce(x, group=self._groups.stage)

    def gather_logits(self, out: Tensor, part: Tensor) -> None:
        """out (L, ranks * columns) = the parts (L, columns) of the stage's ranks, side by side.

        out is written on the rank that draws only; both are contiguous.
        """
        rows, columns = part.shape
        tensor = self.place.layout.tensor
        assert out.shape == (rows, tensor * columns)
        assert out.is_contiguous()
        if self._groups.stage is None:
            if out.data_ptr() != part.data_ptr():
                out.copy_(part)
            return
        parts = self._gather(part, tensor)
        if self.place.is_sampling:
            out.view(rows, tensor, columns).copy_(parts.transpose(0, 1))

    def send_hidden(self, x: Tensor) -> None:
        """x (T, width), contiguous, to the stage behind, which waits in `receive_hidden`."""
        assert x.is_contiguous()
        import torch.distributed as dist

        dist.send(x, self.place.rank + self.place.layout.tensor, group=self._groups.after)

    def receive_hidden(self, out: Tensor) -> None:
        """out (T, width), contiguous, filled by the stage before."""
        assert out.is_contiguous()
        import torch.distributed as dist

        dist.recv(out, self.place.rank - self.place.layout.tensor, group=self._groups.before)

    def share_tokens(self, tokens: Tensor) -> None:
        """tokens int32, contiguous: in place those that were drawn, wherever tokens are embedded.

        Nothing happens on a rank that neither draws nor embeds.
        """
        if self._groups.tokens is not None:
            assert tokens.is_contiguous()
            import torch.distributed as dist

            source = self.place.layout.sampling_rank
            dist.broadcast(tokens, source, group=self._groups.tokens)

    def get_least(self, value: int, device: torch.device) -> int:
        """The smallest value that any rank of the model passes; waits for all of them."""
        if self.place.layout.world == 1:
            return value
        import torch.distributed as dist

        least = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least.item())

    def close(self) -> None:
        """Destroys the process groups."""
        if self.place.layout.world > 1:
            import torch.distributed as dist

            self._groups = _Groups()
            dist.destroy_process_group()

    def _gather(self, part: Tensor, ranks: int) -> Tensor:
        """(ranks, *part.shape): every rank's part, in scratch memory that the next call reuses."""
        import torch.distributed as dist

        assert part.is_contiguous()
        needed = ranks * part.numel()
        kept = self._scratch.setdefault(part.dtype, [])
        if not kept or kept[-1].numel() < needed:
            kept.append(torch.empty(needed, dtype=part.dtype, device=part.device))
        parts = kept[-1][:needed]
        # The same under the name it has from PyTorch 2.13 on, which warns of the one before.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(parts, part.view(-1), group=self._groups.stage)
        return parts.view(ranks, *part.shape)


def connect(
    place: RankPlace,
    device: torch.device,
    store: str,
    timeout_s: float,
    is_exact: bool = False,
) -> Collectives:
    """Meets the other ranks of the model, all of which call this; once in a process.

    device: where exchanged tensors lie; a GPU each with NCCL, the CPU with gloo. store: path of a
    file that does not exist before the first rank comes, on a disk that all ranks see. timeout_s:
    for a peer to join an operation.
    """
    layout = place.layout
    if layout.world == 1:
        return Collectives(place, is_exact)
    import torch.distributed as dist

    is_gpu = device.type == "cuda"
    timeout = timedelta(seconds=timeout_s)
    # The ranks are on one machine: no host name has to resolve, and no firewall is in the way.
    os.environ.setdefault("NCCL_SOCKET_IFNAME" if is_gpu else "GLOO_SOCKET_IFNAME", "lo")
    if is_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        store=dist.FileStore(store, layout.world),
        rank=place.rank,
        world_size=layout.world,
        timeout=timeout,
        device_id=device if is_gpu else None,
    )
    groups = _make_groups(place, timeout)
    _warm_up(place, groups, device)
    return Collectives(place, is_exact, groups)


def _make_groups(place: RankPlace, timeout: timedelta) -> _Groups:
    """All groups of the layout, which every rank makes in one order; those of this rank."""
    import torch.distributed as dist

    layout = place.layout

    def make(ranks: list[int]) -> Any:
        group = dist.new_group(ranks, timeout=timeout)
        return group if place.rank in ranks else None

    stage = tokens = before = after = None
    if layout.tensor > 1:
        for index in range(layout.stages):
            first = index * layout.tensor
            stage = make(list(range(first, first + layout.tensor))) or stage
    if layout.stages == 1:
        return _Groups(stage, stage)
    tokens = make(list(layout.token_ranks))
    # A pair each: a stage would else wait for the one behind it before it hears the one before.
    for rank in range(layout.world - layout.tensor):
        pair = make([rank, rank + layout.tensor])
        if place.rank == rank:
            after = pair
        elif place.rank == rank + layout.tensor:
            before = pair
    return _Groups(stage, tokens, before, after)


def _warm_up(place: RankPlace, groups: _Groups, device: torch.device) -> None:
    """One operation in every group: connections are made by the first, which no graph may do."""
    one = torch.ones(1, device=device)
    collectives = Collectives(place, False, groups)
    collectives.all_reduce(one)
    collectives.share_tokens(one.to(torch.int32))
    if groups.before is not None:
        collectives.receive_hidden(one)
    if groups.after is not None:
        collectives.send_hidden(one)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
