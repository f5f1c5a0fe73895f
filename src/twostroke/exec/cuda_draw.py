"""Draws and scores on the device, queued behind the logits they read, and their way back.

Owns the pinned memory of both directions. A ticket's numbers are there once an event that was
recorded behind it has passed; tickets of the steps in flight never share memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from twostroke.exec.cuda_device import Device, Event
from twostroke.kernels.cuda import sampling
from twostroke.kernels.cuda.sampling_score import ScoredTensors, ScoreScratch, score
from twostroke.kernels.cuda.sampling_tensors import (
    SamplingCounts,
    SamplingMode,
    get_packed_size,
    pack,
    view,
)
from twostroke.kernels.cuda.types import Tensor
from twostroke.kernels.ops import F32, I32, Drawn, SamplingArrays

# Room for penalties and biases to begin with: a dozen bytes each.
_LEAST_HISTORY, _LEAST_BIASES = 2**18, 2**14
_SLOTS = 4  # pinned buffers in turn: a step may need more than one


@dataclass(frozen=True, slots=True)
class DrawTicket:
    """What one draw or score will give, in pinned memory; see kernels.ops.Drawn.

    Log-probabilities are None where no row asked for them; top (L,) is how many alternatives each
    row asked for, -1 for not even its token's.
    """

    tokens: Tensor
    top: I32
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None

    def take(self) -> Drawn:
        """The numbers; only once the device has written them."""
        tokens: I32 = self.tokens.numpy()
        if self.logprobs is None or self.top_tokens is None or self.top_logprobs is None:
            nothing = np.zeros((tokens.size, 0), np.float32)
            missing = np.full(tokens.size, np.nan, np.float32)
            return Drawn(tokens, missing, nothing.astype(np.int32), nothing)
        logprobs: F32 = self.logprobs.numpy()
        best: I32 = self.top_tokens.numpy()
        values: F32 = self.top_logprobs.numpy()
        return Drawn(tokens, logprobs, best, values)


class DeviceDraws:
    """Queues draws of up to `rows` rows at once from logits over `vocab_size` tokens."""

    def __init__(self, device: Device, rows: int, vocab_size: int) -> None:
        self._device, self._rows, self._vocab = device, rows, vocab_size
        self._room = SamplingCounts(rows, _LEAST_BIASES, _LEAST_HISTORY)
        self._scratch = sampling.SamplingScratch.allocate(self._room, device.name)
        self._scores = ScoreScratch.allocate(rows, vocab_size, device.name)
        self._pinned = [device.pin((0,), torch.int32) for _ in range(_SLOTS)]
        self._left: list[Event | None] = [None] * _SLOTS
        self._turn = 0

    @property
    def bytes(self) -> int:
        """Device memory it holds."""
        return self._scratch.bytes + self._scores.bytes

    def draw(self, logits: Tensor, arrays: SamplingArrays, tokens: Tensor) -> DrawTicket:
        """Queues a draw of each row of logits (L, vocab) into tokens (L,) int32 on the device."""
        mode = SamplingMode.of(arrays)
        if mode.is_greedy and not mode.adjusts:
            sampling.draw_greedy(tokens, logits, self._scratch.draw)
        else:
            counts = SamplingCounts.of(arrays)
            words = np.empty(get_packed_size(counts), np.int32)
            pack(arrays, counts, self._vocab, words)
            given = view(self._upload(words), counts)
            self._make_room(counts)
            sampling.draw(tokens, logits, given, mode, self._scratch)
        return self._fetch(logits, tokens, arrays.top, mode.width)

    def score(self, logits: Tensor, targets: I32, top: I32) -> DrawTicket:
        """Queues the log-probabilities of known tokens targets (L,), with `top` alternatives."""
        return self._fetch(logits, self._upload(targets), top, int(top.max(initial=-1)))

    def _fetch(self, logits: Tensor, tokens: Tensor, top: I32, width: int) -> DrawTicket:
        """Queues the scores of tokens (L,) where some row wants them, and copies to the host."""
        if width < 0:
            return DrawTicket(self._to_host(tokens), top)
        scores = ScoredTensors.allocate(tokens.shape[0], width, self._device.name)
        score(scores, logits, tokens, self._upload(top), self._scores)
        return DrawTicket(self._to_host(tokens), top, *map(self._to_host, scores))

    def _make_room(self, counts: SamplingCounts) -> None:
        """Scratch for penalties and biases grows with what rows have, twofold, and stays."""
        room = self._room
        if counts.history > room.history or counts.biases > room.biases:
            history = max(room.history, 2 * counts.history)
            self._room = SamplingCounts(self._rows, max(room.biases, 2 * counts.biases), history)
            self._scratch = sampling.SamplingScratch.allocate(self._room, self._device.name)

    def _to_host(self, values: Tensor) -> Tensor:
        host = self._device.pin(tuple(values.shape), values.dtype)
        host.copy_(values, non_blocking=True)
        return host

    def _upload(self, words: I32) -> Tensor:
        """int32 numbers on the device, through a pinned buffer that nothing else uses meanwhile."""
        self._turn = (self._turn + 1) % _SLOTS
        left = self._left[self._turn]
        if left is not None:
            left.wait()
        if self._pinned[self._turn].numel() < words.size:
            self._pinned[self._turn] = self._device.pin((2 * words.size,), torch.int32)
        pinned = self._pinned[self._turn][: words.size]
        pinned.numpy()[:] = words
        there = torch.empty(words.size, dtype=torch.int32, device=self._device.name)
        there.copy_(pinned, non_blocking=True)
        self._left[self._turn] = self._device.record()
        return there
