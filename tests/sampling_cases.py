"""Rows for sampling tests, and how far a draw is from the edge where rounding would decide it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from twostroke.core.types import Row, SamplingSpec, SequenceId
from twostroke.exec.sampling import build_sampling_arrays
from twostroke.kernels.ops import F32, SamplingArrays
from twostroke.kernels.reference import sampling

GREEDY = SamplingSpec()


def make_row(
    spec: SamplingSpec, position: int = 7, index: int = 0, history: tuple[int, ...] = ()
) -> Row:
    """A decode row whose new token will stand at `position`; a third of the history is prompt."""
    sequence = SequenceId("request", index)
    return Row(sequence, (1,), position - 1, (0,), spec, history, len(history) // 3)


def make_arrays(specs: list[SamplingSpec], histories: list[tuple[int, ...]]) -> SamplingArrays:
    """One row a spec, at differing positions."""
    return build_sampling_arrays(
        [
            make_row(spec, 7 + at, at % 3, history)
            for at, (spec, history) in enumerate(zip(specs, histories, strict=True))
        ]
    )


def make_random_spec(random: np.random.Generator, vocab: int) -> SamplingSpec:
    """A spec with each setting on or off."""

    def maybe(value: float, off: float) -> float:
        return value if random.random() < 0.5 else off

    tokens = sorted(random.choice(vocab, size=min(vocab, 3), replace=False).tolist())
    return SamplingSpec(
        temperature=maybe(float(random.uniform(0.2, 3)), 1.0),
        top_k=int(maybe(int(random.integers(1, 2 * vocab)), 0)),
        top_p=maybe(float(random.uniform(0, 1)), 1.0),
        min_p=maybe(float(random.uniform(0, 0.3)), 0.0),
        repetition_penalty=maybe(float(random.uniform(0.5, 2)), 1.0),
        presence_penalty=maybe(float(random.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(random.uniform(-2, 2)), 0.0),
        seed=int(random.integers(0, 2**63)),
        logit_bias=tuple((token, float(random.normal())) for token in tokens),
        logprobs=int(random.integers(0, 6)) if random.random() < 0.5 else None,
    )


def get_edge_distance(logits: F32, arrays: SamplingArrays, row: int) -> float:
    """Smallest change of a cumulated or relative probability that could change the row's draw."""
    adjusted = sampling.adjust_logits(logits[row], arrays, row)
    open_arrays = replace(arrays, top_p=np.ones_like(arrays.top_p), min_p=0 * arrays.min_p)
    _, weights = sampling.get_candidates(adjusted, open_arrays, row)
    _, kept = sampling.get_candidates(adjusted, arrays, row)
    uniform = sampling.get_uniforms(arrays.seed, arrays.counter)[row]
    cumulative = np.cumsum(weights) / weights.sum()
    distances = [np.abs(np.cumsum(kept)[:-1] / kept.sum() - uniform)]
    if arrays.top_p[row] < 1:
        distances.append(np.abs(cumulative - arrays.top_p[row]))
    if arrays.min_p[row] > 0:
        distances.append(np.abs(weights - arrays.min_p[row]))
    return float(np.concatenate(distances).min(initial=1.0))
