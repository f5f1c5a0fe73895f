"""The attention kernels alone: prefill beside PyTorch's fused attention, decode beside bandwidth.

Prefill's rate counts the causal half only, as spec/work.py does. PyTorch is given contiguous keys
and values and its own choice of kernel; the kernels it can be told to take are timed beside that.
Decode reads another layer of the pool at every launch, so that no cache helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from twostroke.bench.gpu.kernels import HeadSizes, make_case
from twostroke.bench.gpu.results import Row
from twostroke.bench.gpu.timing import Launch, Pace, capture, time_interleaved
from twostroke.kernels.cuda.types import Tensor
from twostroke.spec.work import count_pairs

# Bytes of keys and values that launches take in turn; far more than an L2 cache holds.
_ROTATED_BYTES = 512 << 20
_LEAST_TURNS = 3  # of every copy, in one sample


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention: `batch` rows of `tokens` queries that end at `context`."""

    name: str
    batch: int
    tokens: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def flops(self) -> int:
        """Operations: a multiply-add for q·k and one for p·v, each (query, key) pair and value."""
        pairs = count_pairs(self.tokens, self.context - self.tokens, None)
        return 4 * self.batch * pairs * self.heads * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, 16 bits each."""
        return 4 * self.batch * self.context * self.kv_heads * self.head_dim


SHAPES = (
    AttentionShape("prefill-8192", 1, 8192, 8192, 32, 32),
    AttentionShape("prefill-8192-grouped", 1, 8192, 8192, 32, 8),
    AttentionShape("prefill-2048", 1, 2048, 2048, 32, 32),
    AttentionShape("decode-1x8192", 1, 1, 8192, 32, 32),
    AttentionShape("decode-32x2048", 32, 1, 2048, 32, 32),
    AttentionShape("decode-32x2048-grouped", 32, 1, 2048, 32, 8),
    AttentionShape("decode-32x8192-grouped", 32, 1, 8192, 32, 8),
)
FAKE_SHAPES = (
    AttentionShape("prefill-100", 1, 100, 100, 4, 2, 64),
    AttentionShape("decode-2x100", 2, 1, 100, 4, 2, 64),
)

_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def measure_attention(
    shapes: Sequence[AttentionShape], device: torch.device, pace: Pace
) -> list[Row]:
    """Times of ours and of PyTorch's, in turns, with the greatest difference of their results."""
    return [_measure(shape, device, pace) for shape in shapes]


def _measure(shape: AttentionShape, device: torch.device, pace: Pace) -> Row:
    copies = 1
    if device.type == "cuda" and shape.tokens == 1:
        copies = max(2, _ROTATED_BYTES // shape.kv_bytes)
    sizes = HeadSizes(shape.heads, shape.kv_heads, shape.head_dim)
    cases = [
        make_case(shape.batch, shape.tokens, shape.context, sizes, device) for _ in range(copies)
    ]
    tensors = [(case.q, case.k, case.v) for case in cases]
    launches = {
        "ours": [case.prepare() for case in cases],
        "sdpa": [_make_sdpa(shape, *each) for each in tensors],
    }
    if device.type == "cuda":
        for name, backend in _BACKENDS.items():
            told = [_use(_make_sdpa(shape, *each), backend) for each in tensors]
            if _can_run(told[0]):
                launches[name] = told
    error = _get_error(shape, launches["ours"][0], tensors[0])
    rounds = {name: _go_round(each, device) for name, each in launches.items()}
    times = time_interleaved(rounds, device, pace)
    turns = _LEAST_TURNS * copies
    return {
        "name": shape.name,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "context": shape.context,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "flops": shape.flops,
        "kv_bytes": shape.kv_bytes,
        "error": error,
        **{f"{name}_s": timed.seconds / turns for name, timed in times.items()},
    }


def _go_round(launches: Sequence[Launch], device: torch.device) -> Launch:
    """One launch after the other, _LEAST_TURNS times; on a GPU as one graph, without the host."""

    def launch() -> None:
        for _ in range(_LEAST_TURNS):
            for each in launches:
                each()

    return capture(launch, device) if device.type == "cuda" else launch


def _make_sdpa(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> Launch:
    grouped = shape.heads != shape.kv_heads
    return lambda: functional.scaled_dot_product_attention(
        q, k, v, is_causal=shape.tokens > 1, enable_gqa=grouped
    )


def _use(launch: Launch, backend: SDPBackend) -> Launch:
    def launch_with() -> Any:
        with sdpa_kernel(backend):
            return launch()

    return launch_with


def _can_run(launch: Launch) -> bool:
    try:
        launch()
    except RuntimeError:  # PyTorch's word for a kernel that does not take these shapes
        return False
    return True


def _get_error(shape: AttentionShape, launch: Launch, tensors: tuple[Tensor, ...]) -> float:
    """Relative difference of our result from PyTorch's, by norms; NaN where ours is."""
    ours = launch().float()
    theirs = _make_sdpa(shape, *tensors)().float()
    theirs = theirs.transpose(1, 2).reshape(ours.shape)
    return float((ours - theirs).norm() / theirs.norm())
