"""Laws of the roofline's points and of exercises that are solved with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from twostroke.plan.roofline import (
    Shapes,
    build_point,
    build_points,
    find_kv_batch,
    get_attention_intensity,
    get_working_device,
)
from twostroke.plan.roofline_cost import CAPTURED, RooflineCost
from twostroke.plan.roofline_plot import RooflinePicture, draw_roofline
from twostroke.spec.catalog import get_known_model
from twostroke.spec.device import DeviceSpec, get_known_device
from twostroke.spec.work import get_model_work

SPEC = get_known_model("llama-2-7b")
WORK = get_model_work(SPEC)
DEVICE = get_working_device(get_known_device("a100-80gb"))
COST = RooflineCost(SPEC, get_known_device("a100-80gb"), 1, CAPTURED, WORK)
SHAPES = Shapes((16, 512, 4096), (1, 16, 256), (512, 4096))


def test_a_prefill_of_7b_at_1024_tokens_is_bound_by_compute_beyond_a_ridge_of_208() -> None:
    # 312 TFLOP/s over 1.5 TB/s.
    device = DeviceSpec("exercise", 1.5e12, (("fp32", 312e12),), 0, 80 * 10**9)
    point = build_point(WORK, device, COST, (1, 1024, 0))
    assert device.get_ridge("fp32") == 208
    assert point.bound_by == "compute"
    assert point.intensity > 208


def test_keys_and_values_of_13b_at_4096_tokens_are_3355443200_bytes() -> None:
    assert get_known_model("llama-2-13b").get_kv_bytes_per_token() * 4096 == 3_355_443_200


def test_every_point_lies_on_or_under_the_roof_and_takes_at_least_its_floor() -> None:
    for point in build_points(WORK, DEVICE, COST, SHAPES):
        roof = min(point.intensity * DEVICE.memory_bandwidth, DEVICE.get_rate("bf16"))
        assert point.flops / point.floor_s <= roof * (1 + 1e-9)
        assert point.predicted_s > point.floor_s


def test_decodes_intensity_grows_with_rows_towards_attentions_own() -> None:
    decodes = [p for p in build_points(WORK, DEVICE, COST, SHAPES) if p.stroke == "decode"]
    deep = [point.intensity for point in decodes if point.context == 4096]
    assert deep == sorted(deep)
    limit = build_point(WORK, DEVICE, COST, (10**6, 1, 10**6)).intensity
    assert limit == pytest.approx(get_attention_intensity(WORK), rel=0.05)


def test_from_a_batch_on_keys_and_values_are_most_of_the_bytes() -> None:
    batch = find_kv_batch(WORK, 4096)
    shares = [build_point(WORK, DEVICE, COST, (n, 1, 4096)).kv_share for n in (batch - 1, batch)]
    assert shares[0] < 0.5 <= shares[1]


def test_a_device_with_matrix_units_does_everything_with_them() -> None:
    assert {rate for _, rate in DEVICE.rates} == {312e12}
    plain = replace(get_known_device("t4"), rates=(("fp32", 8.1e12), ("int8", 130e12)))
    assert get_working_device(plain) == plain


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_points_give_the_same_picture(ending: str, tmp_path: Path) -> None:
    points = build_points(WORK, DEVICE, COST, SHAPES)
    paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
    for path in paths:
        draw_roofline(RooflinePicture("a title", DEVICE, ("bf16",), points), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size > 10_000
