"""Laws of drawing and scoring on the GPU: the answers are the reference's, token for token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sampling_cases import GREEDY, get_edge_distance, make_arrays, make_random_spec
from twostroke.core.types import SamplingSpec
from twostroke.kernels.cuda import sampling as cuda
from twostroke.kernels.cuda.sampling_score import ScoredTensors, ScoreScratch, score
from twostroke.kernels.cuda.sampling_tensors import (
    SamplingCounts,
    SamplingMode,
    get_packed_size,
    pack,
    upload,
    view,
)
from twostroke.kernels.ops import F32, I32, SamplingArrays
from twostroke.kernels.reference import sampling as reference

INF = float("inf")
# Sums that differ in their order differ by about this; a draw so near an edge may go either way.
CLEAR = 1e-11


def allocate(counts: SamplingCounts, device: str) -> cuda.SamplingScratch:
    """Scratch in which something else has been left."""
    scratch = cuda.SamplingScratch.allocate(counts, device)
    for each in (*scratch.draw, *scratch.adjust):
        each.fill_(77)
    return scratch


def draw(
    logits: F32, arrays: SamplingArrays, device: str, choice: cuda.DrawChoice = cuda.CHOICE
) -> I32:
    """Tokens drawn on the device; the logits must be there again afterwards, bit for bit."""
    rows, vocab = logits.shape
    on_device = torch.from_numpy(logits.copy()).to(device)
    tokens = torch.full((rows,), -7, dtype=torch.int32, device=device)
    sampling, mode = upload(arrays, vocab, device), SamplingMode.of(arrays)
    scratch = allocate(SamplingCounts.of(arrays), device)
    cuda.draw(tokens, on_device, sampling, mode, scratch, choice)
    assert np.array_equal(on_device.cpu().numpy().view(np.int32), logits.view(np.int32))
    return tokens.cpu().numpy()


def assert_drawn_alike(logits: F32, arrays: SamplingArrays, device: str) -> None:
    expected = reference.sample(logits, arrays).tokens
    drawn = draw(logits, arrays, device)
    for row in np.flatnonzero(drawn != expected):
        distance = get_edge_distance(logits, arrays, row)
        assert distance < CLEAR, f"row {row}: {drawn[row]}, not {expected[row]}"


def make_rows(logits: F32, specs: list[SamplingSpec]) -> tuple[F32, SamplingArrays]:
    """Each row of logits with each spec and a seed of its own."""
    several = [
        replace(spec, seed=17 * at + spec.seed) for at in range(len(logits)) for spec in specs
    ]
    return np.repeat(logits, len(specs), axis=0), make_arrays(several, [()] * len(several))


# ---- drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "vocab"), [(0, 2), (1, 100), (2, 1000), (3, 2500)])
def test_random_rows_draw_what_the_reference_draws(seed: int, vocab: int, device: str) -> None:
    random = np.random.default_rng(seed)
    rows = 6 if device == "cpu" else 200
    logits = random.normal(size=(rows, vocab)) * random.choice([0.1, 1, 4, 20], size=(rows, 1))
    logits = np.where(random.random((rows, 1)) < 0.3, np.round(logits), logits)  # many ties
    logits[random.random(logits.shape) < 0.02] = -INF
    specs = [make_random_spec(random, vocab) for _ in range(rows)]
    histories = [tuple(random.integers(0, vocab, size=9).tolist()) for _ in range(rows)]
    assert_drawn_alike(logits.astype(np.float32), make_arrays(specs, histories), device)


def test_each_cut_alone_and_all_together(device: str) -> None:
    random = np.random.default_rng(5)
    logits = random.normal(0, 3, (1 if device == "cpu" else 40, 3000)).astype(np.float32)
    cuts = [{"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 1500, "top_p": 0.99}]
    cuts += [{}, {"top_p": 1e-9}, {"min_p": 1e-9, "top_k": 5000}]
    specs = [SamplingSpec(temperature=0.9, **cut) for cut in cuts]
    assert_drawn_alike(*make_rows(logits, specs), device)


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e4])
def test_flat_rows_are_divided_by_id(temperature: float, device: str) -> None:
    logits = np.zeros((2, 2000), np.float32)
    logits[1] = np.repeat(np.arange(4), 500) * -0.01  # more of a value than are ordered at once
    specs = [
        SamplingSpec(temperature=temperature),
        SamplingSpec(temperature=temperature, top_k=900, top_p=0.7),
    ]
    assert_drawn_alike(*make_rows(logits, specs), device)


def test_more_candidates_than_are_listed_draw_alike(device: str) -> None:
    random = np.random.default_rng(13)
    shape = (1, 9000) if device == "cpu" else (40, 150_000)
    logits = random.normal(0, 0.5, shape).astype(np.float32)
    specs = [SamplingSpec(temperature=1.0, top_p=top_p) for top_p in (0.9, 1.0)]
    assert_drawn_alike(*make_rows(logits, specs[: 1 if device == "cpu" else 2]), device)


def test_a_crowd_far_below_the_best_is_told_apart(device: str) -> None:
    random = np.random.default_rng(6)
    logits = random.normal(-10, 0.01, (1, 4000)).astype(np.float32)  # weighs 0.18 in all
    logits[0, 321] = 0
    specs = [SamplingSpec(temperature=1.0, seed=seed) for seed in range(400)]
    uniforms = reference.get_uniforms(*_get_numbers(specs))
    chosen = [spec for spec, uniform in zip(specs, uniforms, strict=True) if uniform > 0.9][:2]
    assert len(chosen) == 2
    chosen.append(SamplingSpec(temperature=1.0, top_k=2000, top_p=0.9, seed=chosen[0].seed))
    arrays = make_arrays(chosen, [()] * 3)
    assert_drawn_alike(np.repeat(logits, 3, axis=0), arrays, device)
    assert (reference.sample(np.repeat(logits, 3, axis=0), arrays).tokens[:2] != 321).all()


def _get_numbers(specs: list[SamplingSpec]) -> tuple[np.ndarray, np.ndarray]:
    arrays = make_arrays(specs[:1], [()])
    seeds = np.array([spec.seed for spec in specs], np.uint64)
    return seeds, np.repeat(arrays.counter, len(specs), axis=0)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 1e4])
def test_odd_logits_draw_what_the_reference_draws(temperature: float, device: str) -> None:
    nan = float("nan")
    logits = np.array(
        [
            [nan, -INF, nan, -INF, nan],
            [nan, -INF, 1, -INF, 0.5],
            [0, INF, nan, INF, 5],
            [-3e38, 3e38, -INF, 3e38, -0.0],
            [-0.0, 0.0, -0.0, -1, nan],
        ],
        np.float32,
    )
    rows, arrays = make_rows(logits, [SamplingSpec(temperature=temperature, top_p=0.95)])
    assert_drawn_alike(rows, arrays, device)


def test_history_and_bias_may_name_a_token_again_and_again(device: str) -> None:
    random = np.random.default_rng(8)
    vocab, rows = 50, 4
    logits = random.normal(0, 2, (rows, vocab)).astype(np.float32)
    logits[0, :5] = np.nan
    specs = [
        SamplingSpec(repetition_penalty=1.7, presence_penalty=0.3, frequency_penalty=0.2),
        SamplingSpec(temperature=1.0, frequency_penalty=-0.5, seed=3),
        SamplingSpec(temperature=1.0),
        GREEDY,
    ]
    histories = [(), *(tuple(random.integers(0, 9, size=700).tolist()) for _ in range(3))]
    arrays = make_arrays(specs, histories)
    biased = np.array([3, 3, 3, 7, 2, 7, 7, 49, 2], np.int32)
    arrays = replace(
        arrays,
        bias_offsets=np.array([0, 4, 4, 9, 9], np.int32),
        bias_tokens=biased,
        bias_values=np.array([1e8, -1e8, 3, 1, 2, 1e9, -1e9, -INF, 1], np.float32),
    )
    assert_drawn_alike(logits, arrays, device)


@pytest.mark.parametrize("vocab", [1, 7, 5001])
def test_greedy_takes_the_smallest_id_of_the_largest_logit(vocab: int, device: str) -> None:
    random = np.random.default_rng(9)
    logits = random.integers(-3, 3, (4, vocab)).astype(np.float32)
    logits[0] = -INF
    logits[1, ::3] = np.nan
    logits[2] = -0.0
    logits[2, vocab // 2] = 0.0
    tokens = torch.full((4,), -7, dtype=torch.int32, device=device)
    scratch = allocate(SamplingCounts(4), device)
    cuda.draw_greedy(tokens, torch.from_numpy(logits).to(device), scratch.draw)
    expected = np.argmax(reference.replace_nan(logits), axis=1)
    assert np.array_equal(tokens.cpu().numpy(), expected)


def test_a_row_draws_alike_in_any_batch_division_and_stride(device: str) -> None:
    random = np.random.default_rng(10)
    rows, vocab = 2, 2500
    logits = random.normal(0, 2, (rows, vocab)).astype(np.float32)
    specs = [replace(make_random_spec(random, vocab), temperature=1.3) for _ in range(rows)]
    arrays = make_arrays(specs, [()] * rows)
    together = draw(logits, arrays, device)
    divided = draw(logits, arrays, device, cuda.DrawChoice(programs=1))
    assert np.array_equal(divided, together)
    wide = torch.full((rows, vocab + 3), 99.0, device=device)
    wide[:, 1 : vocab + 1] = torch.from_numpy(logits)
    tokens = torch.full((rows,), -7, dtype=torch.int32, device=device)
    sampling, mode = upload(arrays, vocab, device), SamplingMode.of(arrays)
    scratch = allocate(SamplingCounts.of(arrays), device)
    cuda.draw(tokens, wide[:, 1 : vocab + 1], sampling, mode, scratch)
    assert np.array_equal(tokens.cpu().numpy(), together)


def test_draws_can_be_captured_and_replayed(device: str) -> None:
    if device == "cpu":
        pytest.skip("graphs are a GPU's")
    random = np.random.default_rng(11)
    vocab, counts = 5000, SamplingCounts(8, 40, 100)
    packed = torch.zeros(get_packed_size(counts), dtype=torch.int32, device=device)
    logits = torch.zeros((8, vocab), device=device)
    tokens = torch.zeros(8, dtype=torch.int32, device=device)
    scratch = allocate(counts, device)
    mode = SamplingMode(is_greedy=False, adjusts=True, width=-1)

    def run() -> None:
        cuda.draw(tokens, logits, view(packed, counts), mode, scratch)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for rows in (8, 3, 8):
        values = random.normal(0, 3, (rows, vocab)).astype(np.float32)
        specs = [make_random_spec(random, vocab) for _ in range(rows)]
        histories = [tuple(random.integers(0, vocab, size=9).tolist()) for _ in range(rows)]
        arrays = make_arrays(specs, histories)
        buffer = np.empty(get_packed_size(counts), np.int32)
        pack(arrays, counts, vocab, buffer)
        packed.copy_(torch.from_numpy(buffer))
        logits[:rows].copy_(torch.from_numpy(values))
        graph.replay()
        drawn = tokens[:rows].cpu().numpy()
        assert np.array_equal(drawn, reference.sample(values, arrays).tokens)


# ---- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [3, 4097])
def test_scores_are_those_of_the_reference(vocab: int, device: str) -> None:
    random = np.random.default_rng(vocab)
    rows = 7
    logits = random.normal(0, 4, (rows, vocab)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many ties
    logits[2, ::2] = np.nan
    logits[3] = -INF
    logits[4, [0, vocab - 1]] = INF
    logits[5] *= 1e37
    targets = random.integers(0, vocab, rows).astype(np.int32)
    top = np.minimum(np.array([20, 20, 3, 2, 2, 5, -1], np.int32), vocab)
    expected = reference.score(logits, targets, top)
    answer = ScoredTensors.allocate(rows, expected.top_tokens.shape[1], device)
    scratch = ScoreScratch.allocate(rows, vocab, device)
    for each in (*answer, *scratch):
        each.fill_(77)
    inputs = [torch.from_numpy(each).to(device) for each in (logits, targets, top)]
    score(answer, *inputs, scratch)
    assert np.array_equal(answer.top_tokens.cpu(), expected.top_tokens)
    # Both are float64 rounded once.
    np.testing.assert_allclose(answer.logprobs.cpu(), expected.logprobs, rtol=2e-7)
    np.testing.assert_allclose(answer.top_logprobs.cpu(), expected.top_logprobs, rtol=2e-7)


def test_rows_that_report_nothing_need_no_alternatives(device: str) -> None:
    logits = torch.zeros((2, 100), device=device)
    answer = ScoredTensors.allocate(2, 0, device)
    targets = torch.zeros(2, dtype=torch.int32, device=device)
    top = torch.tensor([0, -1], dtype=torch.int32, device=device)
    score(answer, logits, targets, top, ScoreScratch.allocate(2, 100, device))
    np.testing.assert_allclose(answer.logprobs.cpu(), [-np.log(100), np.nan], rtol=1e-6)


# ---- arrays in one buffer ------------------------------------------------------------------------


def test_what_is_packed_is_what_is_viewed() -> None:
    random = np.random.default_rng(12)
    specs = [make_random_spec(random, 50) for _ in range(3)]
    arrays = make_arrays(specs, [(1, 2), (), (3,)])
    counts = SamplingCounts(5, 20, 9)
    buffer = np.full(get_packed_size(counts), 2**30, np.int32)
    pack(arrays, counts, 50, buffer)
    tensors = view(torch.from_numpy(buffer), counts)
    assert tensors.temperature.tolist() == [*arrays.temperature.tolist(), 0, 0]
    assert tensors.top.tolist() == [*arrays.top.tolist(), -1, -1]
    assert tensors.history_offsets.tolist() == [0, 2, 2, 3, 3, 3]
    assert tensors.bias_offsets.tolist() == [0, 3, 6, 9, 9, 9]
    assert np.array_equal(tensors.bias_values[:9], arrays.bias_values)
    assert np.array_equal(tensors.seed.numpy().view(np.uint64)[:3, 0], arrays.seed)
    assert np.array_equal(tensors.counter.numpy().view(np.uint64)[:3], arrays.counter)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    for spec, history in ((SamplingSpec(logit_bias=((4, 1.0),)), ()), (GREEDY, (-1,))):
        with pytest.raises(ValueError, match="outside the vocabulary of 4"):
            upload(make_arrays([spec], [history]), 4, "cpu")
