"""Laws of sampling: the reference against hand-made cases, the native sampler against it."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from sampling_cases import GREEDY, get_edge_distance, make_arrays, make_random_spec, make_row
from twostroke import _native
from twostroke.core.types import SamplingSpec
from twostroke.exec.sampling import build_sampling_arrays
from twostroke.kernels.ops import F32, I32, Drawn, SamplingArrays
from twostroke.kernels.reference import sampling as reference

INF = np.float32(np.inf)


def sample_native(logits: F32, arrays: SamplingArrays, threads: int = 1) -> Drawn:
    pool = _native.ThreadPool(threads) if threads > 1 else None
    return Drawn(*_native.sample(logits, arrays, pool))


def score_native(logits: F32, targets: I32, top: I32) -> Drawn:
    return Drawn(*_native.score(logits, targets, top))


SAMPLERS = pytest.mark.parametrize("sample", [reference.sample, sample_native])
SCORERS = pytest.mark.parametrize("score", [reference.score, score_native])


def draw(sample, logits: list[float], spec: SamplingSpec, history: tuple[int, ...] = ()) -> int:
    arrays = make_arrays([spec], [history])
    return int(sample(np.array([logits], np.float32), arrays).tokens[0])


def draw_many(sample, logits: list[float], spec: SamplingSpec, count: int = 4000) -> I32:
    rows = [make_row(spec, 1 + at) for at in range(count)]
    many = np.tile(np.array(logits, np.float32), (count, 1))
    return sample(many, build_sampling_arrays(rows)).tokens


# ---- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [
        (0, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            2**64 - 1,
            (2**64 - 1, 2**64 - 1),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            0x299F31D0_A4093822,
            (0x85A308D3_243F6A88, 0x03707344_13198A2E),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(seed, counter, words) -> None:
    result = reference.philox4x32(np.array([seed], np.uint64), np.array([counter], np.uint64))
    assert result[0].tolist() == list(words)


def test_uniforms_are_in_range_and_even() -> None:
    counter = np.stack([np.arange(40_000), np.zeros(40_000)], axis=1).astype(np.uint64)
    uniforms = reference.get_uniforms(np.full(40_000, 11, np.uint64), counter)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    counts = np.histogram(uniforms, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


@SAMPLERS
def test_the_draw_depends_on_seed_position_and_index_only(sample) -> None:
    logits = np.zeros((6, 50_000), np.float32)
    spec = SamplingSpec(temperature=1.0, seed=5)
    rows = [
        make_row(spec, 9, 0),
        make_row(spec, 9, 0),
        make_row(spec, 10, 0),
        make_row(spec, 9, 1),
        make_row(replace(spec, seed=6), 9, 0),
        make_row(replace(spec, seed=5 + 2**64), 9, 0),
    ]
    tokens = sample(logits, build_sampling_arrays(rows)).tokens
    assert tokens[0] == tokens[1] == tokens[5]
    assert len({tokens[0], tokens[2], tokens[3], tokens[4]}) == 4


# ---- each setting by hand ------------------------------------------------------------------------


@SAMPLERS
def test_greedy_takes_the_smallest_id_of_the_largest_logit(sample) -> None:
    assert draw(sample, [1, 3, 3, 2], GREEDY) == 1


@SAMPLERS
def test_greedy_obeys_penalties_and_bias(sample) -> None:
    repetition = SamplingSpec(repetition_penalty=2.0)
    assert draw(sample, [3, 2, 1], repetition, history=(0,)) == 1
    assert draw(sample, [-1, -1.5, -9], repetition, history=(0,)) == 1
    assert draw(sample, [3, 2, 1], SamplingSpec(logit_bias=((2, 5.0),))) == 2


@SAMPLERS
def test_presence_and_frequency_count_the_output_only(sample) -> None:
    # Of six history tokens the first two are prompt; token 0 is there twice, token 1 thrice.
    history = (0, 0, 1, 1, 1, 2)
    assert draw(sample, [3, 2.9, 0], SamplingSpec(presence_penalty=1.0), history) == 0
    assert draw(sample, [3, 4.5, 0], SamplingSpec(presence_penalty=1.0), history) == 1
    assert draw(sample, [3, 4.5, 0], SamplingSpec(frequency_penalty=0.6), history) == 0


@SAMPLERS
def test_top_k_keeps_ties_with_the_smaller_id(sample) -> None:
    spec = SamplingSpec(temperature=1.0, top_k=2)
    assert set(draw_many(sample, [1, 1, 1, 0], spec).tolist()) == {0, 1}


@SAMPLERS
def test_top_p_keeps_the_smallest_set_that_reaches_it(sample) -> None:
    logits = np.log([0.5, 0.25, 0.15, 0.1]).tolist()
    for top_p, kept in ((0.0, 1), (0.49, 1), (0.6, 2), (0.8, 3), (0.95, 4)):
        drawn = draw_many(sample, logits, SamplingSpec(temperature=1.0, top_p=top_p))
        assert set(drawn.tolist()) == set(range(kept)), top_p


@SAMPLERS
def test_top_p_refers_to_what_top_k_left(sample) -> None:
    # After top-k the first token has 0.5 / 0.75 of the mass.
    logits = np.log([0.5, 0.25, 0.15, 0.1]).tolist()
    spec = SamplingSpec(temperature=1.0, top_k=2, top_p=0.6)
    assert set(draw_many(sample, logits, spec).tolist()) == {0}


@SAMPLERS
def test_min_p_is_relative_to_the_most_likely(sample) -> None:
    logits = np.log([0.5, 0.25, 0.15, 0.1]).tolist()
    spec = SamplingSpec(temperature=1.0, min_p=0.25)
    assert set(draw_many(sample, logits, spec).tolist()) == {0, 1, 2}


@SAMPLERS
def test_draws_follow_the_distribution(sample) -> None:
    expected = np.array([0.5, 0.25, 0.15, 0.1])
    spec = SamplingSpec(temperature=0.5, seed=3)
    drawn = draw_many(sample, (np.log(expected) / 2).tolist(), spec, 8000)
    counts = np.bincount(drawn, minlength=4)
    deviation = np.sqrt(8000 * expected * (1 - expected))
    assert (np.abs(counts - 8000 * expected) < 5 * deviation).all()


@SAMPLERS
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 1e4])
def test_odd_logits_never_crash_or_draw_a_masked_token(sample, temperature: float) -> None:
    spec = SamplingSpec(temperature=temperature, logprobs=2)
    nan = float("nan")
    assert draw(sample, [nan, -INF, nan], spec) == 0
    assert draw(sample, [nan, -INF, 1, -INF], spec) == 2
    assert draw(sample, [0, INF, nan, -INF], spec) == 1
    assert draw(sample, [-3e38, 3e38, -INF], replace(spec, temperature=0.0)) == 1


@SAMPLERS
def test_a_biased_token_can_be_forbidden(sample) -> None:
    spec = SamplingSpec(temperature=1.0, logit_bias=((0, -float(INF)),))
    assert 0 not in draw_many(sample, [9, 1, 1, 1], spec)


# ---- log-probabilities ---------------------------------------------------------------------------


@SCORERS
def test_logprobs_are_the_log_softmax_of_raw_logits(score) -> None:
    logits = np.random.default_rng(1).normal(0, 4, (3, 1000)).astype(np.float32)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    scored = score(logits, np.array([0, 7, 999], np.int32), np.array([0, 3, -1], np.int32))
    assert scored.tokens.tolist() == [0, 7, 999]
    np.testing.assert_allclose(scored.logprobs[:2], exact[[0, 1], [0, 7]], rtol=1e-6)
    best = np.argsort(-exact[1])[:3]
    assert scored.top_tokens.tolist() == [[-1] * 3, best.tolist(), [-1] * 3]
    np.testing.assert_allclose(scored.top_logprobs[1], exact[1, best], rtol=1e-6)
    assert np.isnan(scored.logprobs[2])
    assert np.isnan(scored.top_logprobs[[0, 2]]).all()


@SAMPLERS
def test_logprobs_are_those_before_penalties_bias_and_temperature(sample) -> None:
    spec = SamplingSpec(temperature=0.1, logit_bias=((1, 50.0),), logprobs=1)
    drawn = sample(np.array([[1.0, 0.0]], np.float32), make_arrays([spec], [()]))
    assert drawn.tokens[0] == 1
    np.testing.assert_allclose(drawn.logprobs[0], -np.log1p(np.e), rtol=1e-6)
    assert drawn.top_tokens[0, 0] == 0


@SCORERS
def test_logprobs_of_extreme_logits_are_finite_where_they_should_be(score) -> None:
    logits = np.array([[1e4, -1e4, 1e4, np.nan]], np.float32)
    scored = score(logits, np.array([0], np.int32), np.array([4], np.int32))
    np.testing.assert_allclose(scored.top_logprobs[0, :2], [-np.log(2)] * 2, rtol=1e-6)
    assert scored.top_tokens[0].tolist() == [0, 2, 1, 3]
    np.testing.assert_allclose(scored.top_logprobs[0, 2], -2e4 - np.log(2), rtol=1e-6)
    assert scored.top_logprobs[0, 3] == -INF


# ---- the native sampler against the reference ---------------------------------------------------


def assert_same_log_probabilities(actual: Drawn, expected: Drawn, rows: np.ndarray) -> None:
    np.testing.assert_allclose(actual.logprobs[rows], expected.logprobs[rows], atol=1e-5, rtol=0)
    assert np.array_equal(actual.top_tokens, expected.top_tokens)
    np.testing.assert_allclose(actual.top_logprobs, expected.top_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_native_draws_what_the_reference_draws(seed: int) -> None:
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    vocab = int(random.choice([1, 2, 31, 33, 64, 100, 1000, 3001]))
    rows = 60
    scale = random.choice([0.1, 1.0, 4.0, 20.0], size=(rows, 1))
    logits = (random.normal(size=(rows, vocab)) * scale).astype(np.float32)
    logits[random.random(logits.shape) < 0.02] = -INF
    logits = np.where(random.random((rows, 1)) < 0.3, np.round(logits), logits)  # many ties
    specs = [make_random_spec(random, vocab) for _ in range(rows)]
    histories = [tuple(random.integers(0, vocab, size=9).tolist()) for _ in range(rows)]
    arrays = make_arrays(specs, histories)
    expected, actual = reference.sample(logits, arrays), sample_native(logits, arrays)
    clear = np.array([get_edge_distance(logits, arrays, row) > 1e-6 for row in range(rows)])
    assert clear.mean() > 0.9
    assert np.array_equal(actual.tokens[clear], expected.tokens[clear])
    assert_same_log_probabilities(actual, expected, actual.tokens == expected.tokens)


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_native_draws_alike_from_a_large_vocabulary(scale: float) -> None:
    random = np.random.default_rng(4)
    logits = (random.normal(size=(10, 49_152)) * scale).astype(np.float32)
    settings = [{}, {"top_p": 0.97}, {"min_p": 0.02}, {"top_k": 700}, {"top_p": 0.3}]
    specs = [
        SamplingSpec(temperature=temperature, seed=seed, logprobs=20, **setting)
        for seed, setting in enumerate(settings)
        for temperature in (0.8, 1.6)
    ]
    arrays = make_arrays(specs, [()] * len(specs))
    expected, actual = reference.sample(logits, arrays), sample_native(logits, arrays)
    clear = np.array([get_edge_distance(logits, arrays, row) > 1e-6 for row in range(10)])
    assert np.array_equal(actual.tokens[clear], expected.tokens[clear])
    assert clear.sum() >= 5
    assert_same_log_probabilities(actual, expected, actual.tokens == expected.tokens)


def test_a_row_is_bit_for_bit_the_same_in_any_batch_alignment_and_thread_count() -> None:
    random = np.random.default_rng(8)
    rows, vocab = 24, 5003
    logits = random.normal(0, 3, (rows, vocab)).astype(np.float32)
    specs = [replace(make_random_spec(random, vocab), logprobs=3) for _ in range(rows)]
    rows_alone = [make_row(spec, 5 + at, 0, (1, 2, 3, 2)) for at, spec in enumerate(specs)]
    together = sample_native(logits, build_sampling_arrays(rows_alone), threads=2)
    for at in range(rows):
        unaligned = np.empty(vocab + 1, np.float32)[1:]
        unaligned[:] = logits[at]
        alone = sample_native(unaligned[None], build_sampling_arrays([rows_alone[at]]))
        for field in fields(Drawn):
            one = getattr(alone, field.name)[0]
            assert np.array_equal(one, getattr(together, field.name)[at], equal_nan=True)


# ---- masks ---------------------------------------------------------------------------------------


def draw_masked(sample, logits: list[float], spec: SamplingSpec, mask: bytes) -> Drawn:
    row = replace(make_row(spec), mask=mask)
    return sample(np.array([logits], np.float32), build_sampling_arrays([row]))


@SAMPLERS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_the_mask_allows_is_drawn(sample, temperature: float) -> None:
    spec = SamplingSpec(temperature=temperature, top_k=1, logit_bias=((1, 100.0),))
    logits = [float(token == 3) for token in range(10)]
    assert draw_masked(sample, logits, spec, b"\x04\x00").tokens.tolist() == [2]
    assert draw_masked(sample, logits, spec, b"\x00\x02").tokens.tolist() == [9]


@SAMPLERS
def test_tokens_beyond_the_bytes_of_a_mask_are_not_drawn(sample) -> None:
    logits = [float(token) for token in range(10)]
    assert draw_masked(sample, logits, GREEDY, b"\xff").tokens.tolist() == [7]


@SAMPLERS
def test_a_row_without_a_mask_is_free_beside_one_that_has_one(sample) -> None:
    rows = [make_row(GREEDY), replace(make_row(GREEDY), mask=b"\x01"), make_row(GREEDY)]
    logits = np.tile(np.arange(5, dtype=np.float32), (3, 1))
    assert sample(logits, build_sampling_arrays(rows)).tokens.tolist() == [4, 0, 4]


@SAMPLERS
def test_a_mask_changes_no_log_probability(sample) -> None:
    spec = SamplingSpec(logprobs=3)
    drawn = draw_masked(sample, [0.0, 1.0, 2.0], spec, b"\x01")
    free = sample(np.array([[0.0, 1.0, 2.0]], np.float32), make_arrays([spec], [()]))
    assert drawn.tokens.tolist() == [0]
    assert drawn.top_tokens.tolist() == free.top_tokens.tolist() == [[2, 1, 0]]
    assert np.array_equal(drawn.top_logprobs, free.top_logprobs)
    assert drawn.logprobs[0] == free.top_logprobs[0, 2]


def test_native_draws_what_the_reference_draws_through_masks() -> None:
    random = np.random.default_rng(3)
    for vocab in (1, 7, 8, 9, 100, 3001):
        logits = random.normal(size=(40, vocab)).astype(np.float32)
        rows = []
        for at in range(40):
            bits = random.random(vocab) < random.choice([0.01, 0.5, 0.99])
            bits[random.integers(vocab)] = True
            mask = np.packbits(bits, bitorder="little").tobytes()
            spec = replace(make_random_spec(random, vocab), temperature=0.8)
            rows.append(replace(make_row(spec, at + 1), mask=mask if at % 5 else b""))
        arrays = build_sampling_arrays(rows)
        expected, actual = reference.sample(logits, arrays), sample_native(logits, arrays)
        clear = np.array([get_edge_distance(logits, arrays, row) > 1e-6 for row in range(40)])
        assert np.array_equal(actual.tokens[clear], expected.tokens[clear])
        for at, row in enumerate(rows):
            if row.mask:
                token = int(actual.tokens[at])
                assert row.mask[token // 8] >> token % 8 & 1, at


@SAMPLERS
def test_a_token_outside_the_vocabulary_is_refused(sample) -> None:
    logits = np.zeros((1, 4), np.float32)
    for spec, history in ((SamplingSpec(logit_bias=((4, 1.0),)), ()), (GREEDY, (-1,))):
        with pytest.raises(ValueError, match="outside the vocabulary of 4"):
            sample(logits, make_arrays([spec], [history]))


@SCORERS
def test_a_target_outside_the_vocabulary_is_refused(score) -> None:
    with pytest.raises(ValueError, match="token id 9 is outside the vocabulary of 4"):
        score(np.zeros((1, 4), np.float32), np.array([9], np.int32), np.array([0], np.int32))


@SAMPLERS
def test_no_rows_give_no_tokens(sample) -> None:
    assert sample(np.zeros((0, 8), np.float32), build_sampling_arrays([])).tokens.shape == (0,)
