"""Attention over key blocks with a running maximum and sum, in NumPy; also with a mistake in it.

Owns the update that FlashAttention makes at every key block (Dao et al. 2022, algorithm 1, lines
10 to 13; Milakov & Gimelshein 2018, §3), and the update that circulates, which forgets the old sum.
Small and plain: it is to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def attend_whole(q: F64, k: F64, v: F64) -> F64:
    """softmax(q·kᵀ / √d)·v with all scores: q (queries, d), k and v (keys, d) → (queries, d)."""
    scores = q @ k.T / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: F64 = weights @ v / weights.sum(axis=1, keepdims=True)
    return result


def attend_in_blocks(
    q: F64, k: F64, v: F64, block: int, keeps_sum: bool = True
) -> Iterator[tuple[int, F64]]:
    """(keys seen, result over them) after each block of keys.

    With `keeps_sum` the old result, which was divided by its sum l, is multiplied by it again
    before it joins the new: O = (l·exp(m − m')·O + exp(S − m')·V) / l'. Without, as claimed, it is
    not.
    """
    result: Any = np.zeros_like(q)
    highest = np.full((len(q), 1), -np.inf)
    total = np.zeros((len(q), 1))
    for start in range(0, len(k), block):
        keys, values = k[start : start + block], v[start : start + block]
        scores = q @ keys.T / np.sqrt(q.shape[1])
        risen = np.maximum(highest, scores.max(axis=1, keepdims=True))
        weights = np.exp(scores - risen)
        kept = np.exp(highest - risen)
        risen_total = kept * total + weights.sum(axis=1, keepdims=True)
        old = kept * (total if keeps_sum else 1.0) * result
        result = (old + weights @ values) / risen_total
        highest, total = risen, risen_total
        yield start + len(keys), result


def measure_errors(block: int, keys: int, keeps_sum: bool, seed: int = 0) -> list[float]:
    """Largest error after each block, relative to the largest value, against all scores at once."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((rows, 64)) for rows in (8, keys, keys))
    errors = []
    for seen, result in attend_in_blocks(q, k, v, block, keeps_sum):
        truth = attend_whole(q, k[:seen], v[:seen])
        errors.append(float(np.abs(result - truth).max() / np.abs(truth).max()))
    return errors
