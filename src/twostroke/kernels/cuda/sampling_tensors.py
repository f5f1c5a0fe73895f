"""How each row is sampled, as a GPU holds it: a `SamplingArrays` in one buffer of 32-bit words.

Owns the order of the arrays in that buffer, so that one copy brings all of them to the device and
the tensors there keep their addresses. Token ids are checked here, on the host: a kernel must never
meet one outside the vocabulary. Rows beyond those given (padding) draw greedily and report nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from twostroke.kernels.cuda.types import Tensor
from twostroke.kernels.ops import I32, SamplingArrays
from twostroke.kernels.reference.sampling import check_tokens


@dataclass(frozen=True, slots=True)
class SamplingCounts:
    """Room in a buffer: for `rows` rows, `biases` bias entries and `history` history tokens."""

    rows: int
    biases: int = 0
    history: int = 0

    @classmethod
    def of(cls, arrays: SamplingArrays) -> SamplingCounts:
        """The room that `arrays` fill."""
        return cls(arrays.temperature.size, arrays.bias_tokens.size, arrays.history_tokens.size)


class SamplingTensors(NamedTuple):
    """The fields of `SamplingArrays` (kernels/ops.py) on the device, float32 or int32.

    seed (L, 2), counter (L, 4): the 64-bit numbers as 32-bit words, low ones first.
    Biases of a row stand in order of rising token, equal tokens in the order given.
    A tuple, because Triton passes a tuple of tensors to a kernel as it is.
    """

    seed: Tensor
    counter: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    bias_values: Tensor
    top_k: Tensor
    top: Tensor
    history_prompt: Tensor
    bias_offsets: Tensor
    history_offsets: Tensor
    bias_tokens: Tensor
    history_tokens: Tensor


_FLOATS = frozenset(
    ["temperature", "top_p", "min_p", "repetition", "presence", "frequency", "bias_values"]
)
# Fields begin at a multiple of this many words, 16 bytes: Triton compiles anew for each other set
# of pointers that are so aligned.
ALIGNED = 4
# What the fields of padding rows hold: anything that a kernel may read without harm.
_PADDING = {"top": -1}


@dataclass(frozen=True, slots=True)
class SamplingMode:
    """What any of a step's rows needs, known on the host: it decides which kernels are launched.

    is_greedy: every row takes its largest logit. adjusts: penalties or biases change some logit.
    width: most alternatives that a row reports, -1 where no row wants log-probabilities.
    """

    is_greedy: bool
    adjusts: bool
    width: int

    @classmethod
    def of(cls, arrays: SamplingArrays) -> SamplingMode:
        """What the rows of `arrays` need."""
        penalised = (
            (arrays.repetition != 1).any()
            or (arrays.presence != 0).any()
            or (arrays.frequency != 0).any()
        )
        return cls(
            is_greedy=not (arrays.temperature > 0).any(),
            adjusts=bool(arrays.bias_tokens.size or (arrays.history_tokens.size and penalised)),
            width=int(arrays.top.max(initial=-1)),
        )


def get_packed_size(counts: SamplingCounts) -> int:
    """Words of a buffer with this much room."""
    _, start, length = _lay_out(counts)[-1]
    return start + length


def pack(arrays: SamplingArrays, counts: SamplingCounts, vocab: int, out: I32) -> None:
    """Write `arrays` into `out` (get_packed_size(counts),) int32, laid out for `counts`.

    Raises ValueError, leaving `out` as it was, when a bias or history token is not in the
    vocabulary.
    """
    check_tokens(arrays.bias_tokens, vocab)
    check_tokens(arrays.history_tokens, vocab)
    own = SamplingCounts.of(arrays)
    assert own.rows <= counts.rows
    assert own.biases <= counts.biases
    assert own.history <= counts.history
    bias_tokens, bias_values = _sort_biases(arrays)
    for name, start, length in _lay_out(counts):
        field = {"bias_tokens": bias_tokens, "bias_values": bias_values}.get(name)
        words = _get_words(getattr(arrays, name) if field is None else field)
        part = out[start : start + length]
        part[: words.size] = words
        if name.endswith("_offsets"):
            part[words.size :] = words[-1]
        else:
            part[words.size :] = _PADDING.get(name, 0)


def view(packed: Tensor, counts: SamplingCounts) -> SamplingTensors:
    """The tensors inside `packed` (int32), which holds what `pack` wrote for `counts`."""
    fields = {}
    for name, start, length in _lay_out(counts):
        part = packed[start : start + length]
        fields[name] = part.view(torch.float32) if name in _FLOATS else part
    fields["seed"] = fields["seed"].view(counts.rows, 2)
    fields["counter"] = fields["counter"].view(counts.rows, 4)
    return SamplingTensors(**fields)


def upload(arrays: SamplingArrays, vocab: int, device: torch.device | str) -> SamplingTensors:
    """The tensors of `arrays` on a device, in a buffer of their own; waits for the copy."""
    counts = SamplingCounts.of(arrays)
    packed = np.empty(get_packed_size(counts), np.int32)
    pack(arrays, counts, vocab, packed)
    return view(torch.from_numpy(packed).to(device), counts)


def _lay_out(counts: SamplingCounts) -> list[tuple[str, int, int]]:
    """Each field's name, first word and number of words."""
    lengths = dict.fromkeys(SamplingTensors._fields, counts.rows) | {
        "seed": 2 * counts.rows,
        "counter": 4 * counts.rows,
        "bias_offsets": counts.rows + 1,
        "history_offsets": counts.rows + 1,
        "bias_tokens": counts.biases,
        "bias_values": counts.biases,
        "history_tokens": counts.history,
    }
    places = []
    start = 0
    for name, length in lengths.items():
        places.append((name, start, length))
        start += -(-length // ALIGNED) * ALIGNED
    return places


def _get_words(array: NDArray[np.generic]) -> I32:
    words: I32 = np.ascontiguousarray(array).reshape(-1).view(np.int32)
    return words


def _sort_biases(arrays: SamplingArrays) -> tuple[I32, NDArray[np.float32]]:
    """Bias tokens and values with each row's tokens rising; mostly they are already."""
    tokens, values = arrays.bias_tokens, arrays.bias_values
    if tokens.size < 2:
        return tokens, values
    rows = np.repeat(np.arange(arrays.bias_offsets.size - 1), np.diff(arrays.bias_offsets))
    if ((np.diff(tokens) >= 0) | (np.diff(rows) > 0)).all():
        return tokens, values
    order = np.lexsort((tokens, rows))  # stable
    return tokens[order], values[order]
