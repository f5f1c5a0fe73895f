"""Sampling and scoring in NumPy: the definition that the native sampler is checked against.

Owns the order of the steps (penalties, bias, mask, temperature, top-k, top-p, min-p, one draw) and
the random numbers. Rows are independent: a row's answer never depends on the others. All from the
softmax on is float64; adjusted logits are rounded to float32, so that both implementations compare
the very same numbers.

A NaN logit counts as -inf. A row with no finite logit draws token 0. Where the largest logit is
+inf, the tokens that have it share all the mass.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twostroke.kernels.ops import F32, I32, U64, Drawn, SamplingArrays

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# Philox4x32 (Salmon et al. 2011, table 2 and §4.3): multipliers and the keys' Weyl increments.
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_INCREMENTS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW32 = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(seed: U64, counter: U64) -> U64:
    """Ten rounds of Philox4x32 (Salmon et al. 2011).

    seed (L,) uint64: the key, low word first. counter (L, 2) uint64: four words, low ones first.
    Returns (L, 4) uint64 holding 32-bit words.
    """
    words = [
        counter[:, 0] & _LOW32,
        counter[:, 0] >> _HALF,
        counter[:, 1] & _LOW32,
        counter[:, 1] >> _HALF,
    ]
    keys = [seed & _LOW32, seed >> _HALF]
    for _ in range(_ROUNDS):
        even, odd = _MULTIPLIERS[0] * words[0], _MULTIPLIERS[1] * words[2]
        words = [
            (odd >> _HALF) ^ words[1] ^ keys[0],
            odd & _LOW32,
            (even >> _HALF) ^ words[3] ^ keys[1],
            even & _LOW32,
        ]
        keys = [(key + step) & _LOW32 for key, step in zip(keys, _INCREMENTS, strict=True)]
    return np.stack(words, axis=1)


def get_uniforms(seed: U64, counter: U64) -> F64:
    """One number in [0, 1) per row, with 53 random bits; (L,) float64, arguments as philox4x32."""
    words = philox4x32(seed, counter)
    bits = (words[:, 0] | (words[:, 1] << _HALF)) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def sample(logits: F32, arrays: SamplingArrays) -> Drawn:
    """Draw one token per row.

    logits (L, vocab) float32, not changed. Returns L rows. Raises ValueError when a bias or
    history token is not in the vocabulary.
    """
    rows, vocab = logits.shape
    assert arrays.temperature.shape == (rows,)
    check_tokens(arrays.bias_tokens, vocab)
    check_tokens(arrays.history_tokens, vocab)
    uniforms = get_uniforms(arrays.seed, arrays.counter)
    tokens = np.zeros(rows, np.int32)
    for row in range(rows):
        adjusted = adjust_logits(logits[row], arrays, row)
        if arrays.temperature[row] <= 0:
            tokens[row] = np.argmax(adjusted)
            continue
        order, weights = get_candidates(adjusted, arrays, row)
        cumulative = np.cumsum(weights)
        drawn = np.searchsorted(cumulative, uniforms[row] * cumulative[-1], side="right")
        tokens[row] = order[drawn]
    return score(logits, tokens, arrays.top)


def score(logits: F32, targets: I32, top: I32) -> Drawn:
    """Log-probability of each row's target, and the row's most likely tokens.

    logits (L, vocab) float32; targets (L,) int32; top (L,) int32, -1 for nothing. Returns L rows
    whose tokens are the targets. Raises ValueError when a target is not in the vocabulary.
    """
    rows, vocab = logits.shape
    assert targets.shape == (rows,)
    assert top.shape == (rows,)
    check_tokens(targets, vocab)
    width = min(int(top.max(initial=0)), vocab)
    logprobs = np.full(rows, np.nan, np.float32)
    top_tokens = np.full((rows, width), -1, np.int32)
    top_logprobs = np.full((rows, width), np.nan, np.float32)
    for row in np.flatnonzero(top >= 0):
        log_softmax = get_log_softmax(logits[row])
        best = sort_descending(replace_nan(logits[row]))[: int(top[row])]
        logprobs[row] = log_softmax[targets[row]]
        top_tokens[row, : best.size] = best
        top_logprobs[row, : best.size] = log_softmax[best]
    return Drawn(targets, logprobs, top_tokens, top_logprobs)


def adjust_logits(logits: F32, arrays: SamplingArrays, row: int) -> F32:
    """One row's logits (vocab,) after penalties, bias and mask, as a new float32 array without NaN.

    The repetition penalty divides positive and multiplies negative logits of tokens seen in
    prompt or output (Keskar et al. 2019, §4.1). Each output token then loses `presence` once and
    `frequency` per occurrence. The bias is added then, in float32. What the mask forbids is -inf.
    """
    penalised = replace_nan(logits).astype(np.float64)
    known = slice(arrays.history_offsets[row], arrays.history_offsets[row + 1])
    history = arrays.history_tokens[known]
    seen, repetition = np.unique(history), np.float64(arrays.repetition[row])
    drawn, counts = np.unique(history[arrays.history_prompt[row] :], return_counts=True)
    bias = slice(arrays.bias_offsets[row], arrays.bias_offsets[row + 1])
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf becomes NaN, replaced below
        values = penalised[seen]
        penalised[seen] = np.where(values > 0, values / repetition, values * repetition)
        frequency = np.float64(arrays.frequency[row]) * counts
        penalised[drawn] -= np.float64(arrays.presence[row]) + frequency
        adjusted = penalised.astype(np.float32)
        np.add.at(adjusted, arrays.bias_tokens[bias], arrays.bias_values[bias])
    mask = arrays.mask_bytes[arrays.mask_offsets[row] : arrays.mask_offsets[row + 1]]
    if mask.size:
        adjusted[~unpack_mask(mask, adjusted.size)] = -np.inf
    return replace_nan(adjusted)


def unpack_mask(mask: NDArray[np.uint8], vocab: int) -> NDArray[np.bool_]:
    """Which of `vocab` tokens a mask's bytes allow: bit t % 8 of byte t // 8, none beyond them."""
    allowed = np.zeros(vocab, np.bool_)
    bits = np.unpackbits(mask, bitorder="little")[:vocab]
    allowed[: bits.size] = bits
    return allowed


def get_candidates(adjusted: F32, arrays: SamplingArrays, row: int) -> tuple[I64, F64]:
    """The tokens a row may draw, best first, with their unnormalised weights.

    Softmax at the row's temperature, cut after the top-k tokens, then after the smallest set with
    mass ≥ top-p of what is left, then where a weight falls below min-p of the largest. At least
    one token stays. Returns ids (n,) int64 and weights (n,) float64, the first weight being 1.
    """
    order = sort_descending(adjusted)
    top_k = int(arrays.top_k[row])
    if top_k > 0:
        order = order[:top_k]
    if adjusted[order[0]] == -np.inf:
        return order[:1], np.ones(1)
    weights = np.exp(subtract_max(adjusted[order]) / np.float64(arrays.temperature[row]))
    kept = order.size
    if arrays.top_p[row] < 1:
        cumulative = np.cumsum(weights)
        mass = np.float64(arrays.top_p[row]) * cumulative[-1]
        kept = int(np.searchsorted(cumulative, mass, side="left")) + 1
    if arrays.min_p[row] > 0:
        kept = min(kept, int(np.count_nonzero(weights >= np.float64(arrays.min_p[row]))))
    kept = max(kept, 1)
    return order[:kept], weights[:kept]


def get_log_softmax(logits: F32) -> F32:
    """Natural log of the softmax over (vocab,) logits, computed in float64 and rounded to float32.

    -inf where that is out of float32's range, and everywhere when all logits are -inf.
    """
    values = replace_nan(logits)
    if values.max() == -np.inf:
        return np.full(values.shape, -np.inf, np.float32)
    shifted = subtract_max(values)
    with np.errstate(over="ignore"):
        result: F32 = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return result


def subtract_max(values: F32) -> F64:
    """values - max(values) in float64, with 0 at the largest ones even where that is +inf."""
    largest = values.max()
    with np.errstate(invalid="ignore"):
        shifted = values.astype(np.float64) - np.float64(largest)
    result: F64 = np.where(values == largest, 0.0, shifted)
    return result


def sort_descending(values: F32) -> I64:
    """Token ids (vocab,) by falling value, equal values by rising id."""
    return np.argsort(-values, kind="stable")


def replace_nan(values: F32) -> F32:
    """A copy with -inf in place of NaN."""
    return np.where(np.isnan(values), np.float32(-np.inf), values)


def check_tokens(tokens: I32, vocab: int) -> None:
    """Raise ValueError naming the first token id outside [0, vocab)."""
    wrong = tokens[(tokens < 0) | (tokens >= vocab)]
    if wrong.size:
        raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {vocab}")
