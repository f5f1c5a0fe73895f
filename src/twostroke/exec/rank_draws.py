"""The draws of a rank that draws nothing: another one of its group does, and tells it."""

from __future__ import annotations

import torch

from twostroke.exec.cuda_draw import DrawTicket
from twostroke.kernels.cuda.types import Tensor
from twostroke.kernels.ops import I32, SamplingArrays


class NoDraws:
    """Stands where DeviceDraws does; its tickets have a token 0 for every row."""

    bytes = 0

    def draw(self, logits: Tensor, arrays: SamplingArrays, tokens: Tensor) -> DrawTicket:
        """Queues nothing, and leaves tokens as they are."""
        return DrawTicket(torch.zeros(arrays.top.size, dtype=torch.int32), arrays.top)

    def score(self, logits: Tensor, targets: I32, top: I32) -> DrawTicket:
        """Queues nothing."""
        return DrawTicket(torch.zeros(targets.size, dtype=torch.int32), top)
