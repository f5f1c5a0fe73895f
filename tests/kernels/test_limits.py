"""Laws of the measured limits; no law is about how fast a machine is."""

from __future__ import annotations

import pytest

from twostroke import _native


@pytest.mark.parametrize("measure", [_native.measure_fp32_rate, _native.measure_int8_rate])
def test_the_best_window_is_no_slower_than_the_median_one(measure) -> None:
    sustained, best = measure(threads=1, seconds=0.03)
    assert 0 < sustained <= best


def test_bandwidth_is_measured_over_any_number_of_threads() -> None:
    for threads in (1, 3):
        sustained, best = _native.measure_read_bandwidth(threads, 1 << 22, 0.02)
        assert 0 < sustained <= best


def test_the_compiler_has_not_emptied_a_loop() -> None:
    """No core does 100,000 operations in a nanosecond; an emptied loop seems to."""
    for measure in (_native.measure_fp32_rate, _native.measure_int8_rate):
        assert measure(1, 0.03)[1] < 1e14


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="threads"):
        _native.measure_fp32_rate(0)
    with pytest.raises(ValueError, match="seconds"):
        _native.measure_int8_rate(1, 0.0)
    with pytest.raises(ValueError, match="bytes"):
        _native.measure_read_bandwidth(2, 100)


def test_features_are_named_once() -> None:
    features = _native.cpu_features()
    assert len(features) == len(set(features))
