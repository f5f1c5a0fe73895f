"""Fits the overheads of `plan/roofline_cost.py` to published measurements; says how well they hold.

    python -m twostroke.bench.fit_roofline FOLDER

FOLDER holds products of Llama-2-7B on an A100 (Vidur) and whole steps of Llama-2-70B on two to
eight A100-80GB (Splitwise). Of each, every second point is fitted and the others judge; points that
share a configuration never part. Nothing here is random; the last line is one JSON object.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from twostroke.plan.roofline_cost import EAGER, Overheads, RooflineCost
from twostroke.spec.catalog import get_known_model
from twostroke.spec.device import DeviceSpec, get_known_device
from twostroke.spec.work import StepTotals, get_model_work

STEPS_FILE, PRODUCTS_FILE = "llama2_70b_a100_80gb.csv", "vidur_a100_llama2_7b_mlp.csv"
# The products of a layer of Llama-2-7B as Vidur names them: (outputs, inputs).
_PRODUCTS = {
    "attn_pre_proj": (3 * 4096, 4096),
    "attn_post_proj": (4096, 4096),
    "mlp_up_proj": (2 * 11_008, 4096),
    "mlp_down_proj": (4096, 11_008),
}
# Prompts that did not fit into two devices' memory together: the time is that of some of them.
_OVERFULL = (2, 64)
_FITTED = (
    "link_efficiency",
    "link_burst_bytes",
    "link_late_efficiency",
    "layer_host_ns",
    "step_ns",
    "sampled_ns",
    "prompt_ns",
)
_ROUNDS = 6
_ROUND_STEPS = 400

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: rows of new tokens after a context, on so many devices."""

    devices: int
    rows: int
    new_tokens: int
    context: int
    time_ns: float


@dataclass(frozen=True, slots=True)
class Product:
    """All products of one layer for some tokens, on one of so many devices."""

    devices: int
    tokens: int
    time_ns: float


def read_steps(folder: Path) -> tuple[list[Point], list[Point]]:
    """Prefills and decodes, the median of the repeats of each configuration."""
    prefills: dict[tuple[int, ...], list[float]] = defaultdict(list)
    decodes: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for line in _read(folder / STEPS_FILE):
        names = ("tensor_parallel", "batch_size", "prompt_size", "token_size")
        devices, rows, prompt, new = (int(line[name]) for name in names)
        if (devices, rows) == _OVERFULL:
            continue
        prefills[devices, rows, prompt].append(float(line["prompt_time"]) * 1e6)
        # The context halfway; a few thousand keys more or less change a step by less than 1 %.
        if new == 128:
            decodes[devices, rows, prompt + new // 2].append(float(line["token_time"]) * 1e6)
    return (
        [Point(n, rows, size, 0, median(times)) for (n, rows, size), times in prefills.items()],
        [Point(n, rows, 1, depth, median(times)) for (n, rows, depth), times in decodes.items()],
    )


def read_products(folder: Path) -> list[Product]:
    """Products of a layer, summed."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for line in _read(folder / PRODUCTS_FILE):
        place = int(line["num_tensor_parallel_workers"]), int(line["num_tokens"])
        found[place].append(sum(float(line[f"time_stats.{op}.median"]) for op in _PRODUCTS) * 1e6)
    return [Product(*place, median(times)) for place, times in sorted(found.items())]


def predict_product_ns(product: Product, device: DeviceSpec, overheads: Overheads) -> float:
    """Time of a layer's products as RooflineCost adds them up, each for itself."""
    bandwidth = device.memory_bandwidth * overheads.memory_efficiency
    rate = device.get_rate("bf16") * overheads.matrix_efficiency
    seconds = 0.0
    for outputs, inputs in _PRODUCTS.values():
        weights = outputs * inputs / product.devices
        seconds += max(2 * weights / bandwidth, 2 * weights * product.tokens / rate)
    return seconds * 1e9 + len(_PRODUCTS) * overheads.kernel_ns


def get_errors(points: Sequence[Point], overheads: Overheads) -> Vector:
    """Relative errors (points,) of predicted steps."""
    spec, device = get_known_model("llama-2-70b"), get_known_device("a100-80gb")
    work = get_model_work(spec)
    costs = {
        devices: RooflineCost(spec, device, devices, overheads, work)
        for devices in {point.devices for point in points}
    }
    errors = []
    for point in points:
        row = work.get_row_totals(point.new_tokens, point.context, 1)
        totals = StepTotals(*(point.rows * each for each in row))
        errors.append(costs[point.devices].predict_ns(totals) / point.time_ns - 1)
    return np.array(errors)


def get_product_errors(products: Sequence[Product], overheads: Overheads) -> Vector:
    """Relative errors (products,) of predicted products."""
    device = get_known_device("a100-80gb")
    predicted = [predict_product_ns(each, device, overheads) for each in products]
    return np.array([p / each.time_ns - 1 for p, each in zip(predicted, products, strict=True)])


def fit(folder: Path) -> Overheads:
    """The overheads nearest to every second point; what is not fitted stays as in EAGER."""
    products = read_products(folder)[::2]
    prefills, decodes = (points[::2] for points in read_steps(folder))

    def get_product_loss(overheads: Overheads) -> float:
        return get_loss(get_product_errors(products, overheads))

    def get_step_loss(overheads: Overheads) -> float:
        losses = (get_loss(get_errors(each, overheads)) for each in (prefills, decodes))
        return sum(losses)

    first = ("memory_efficiency", "matrix_efficiency", "kernel_ns")
    fitted = search(EAGER, first, get_product_loss)
    return search(fitted, _FITTED, get_step_loss)


def judge(folder: Path, overheads: Overheads) -> Mapping[str, tuple[float, float]]:
    """Median and 90th percentile of the relative errors of the points that were not fitted."""
    prefills, decodes = (points[1::2] for points in read_steps(folder))
    errors = {
        "products": get_product_errors(read_products(folder)[1::2], overheads),
        "prefill": get_errors(prefills, overheads),
        "decode": get_errors(decodes, overheads),
    }
    return {
        name: (float(np.median(np.abs(each))), float(np.quantile(np.abs(each), 0.9)))
        for name, each in errors.items()
    }


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def get_loss(errors: Vector) -> float:
    """Mean size of relative errors, too long and too short alike."""
    return float(np.mean(np.abs(np.log1p(errors))))


def search(
    start: Overheads, names: Sequence[str], get_loss: Callable[[Overheads], float]
) -> Overheads:
    """Overheads with `names` moved to the least loss (Nelder & Mead 1965, on logarithms).

    Started anew from where it stopped, because its simplex may collapse too early.
    """

    def build(logs: Vector) -> Overheads:
        return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def get(logs: Vector) -> float:
        overheads = build(logs)
        shares = (value for name, value in asdict(overheads).items() if "efficiency" in name)
        return np.inf if max(shares) > 1 else get_loss(overheads)

    best = np.log([getattr(start, name) for name in names])
    for _ in range(_ROUNDS):
        best = _descend(get, best)
    return build(best)


def _descend(get: Callable[[Vector], float], start: Vector) -> Vector:
    corners = [start, *(start - 0.3 * axis for axis in np.eye(len(start)))]
    ranked = sorted(((get(each), at, each) for at, each in enumerate(corners)))
    for step in range(len(start) + 1, _ROUND_STEPS):
        (_, _, worst), centre = ranked[-1], np.mean([each for *_, each in ranked[:-1]], axis=0)
        tried = [(get(place), step, place) for place in (2 * centre - worst,)]
        if tried[0][0] < ranked[0][0]:
            place = 3 * centre - 2 * worst
            tried.append((get(place), step, place))
        elif tried[0][0] >= ranked[-2][0]:
            place = (centre + worst) / 2
            tried.append((get(place), step, place))
        chosen = min(tried, key=lambda each: each[0])
        if chosen[0] < ranked[-1][0]:
            ranked[-1] = chosen
        else:
            best = ranked[0][2]
            shrunk = [(best + each) / 2 for *_, each in ranked[1:]]
            ranked[1:] = [(get(each), step + at, each) for at, each in enumerate(shrunk)]
        ranked.sort(key=lambda each: each[:2])
    return ranked[0][2]


def main(folder: Path) -> None:
    """Fit, judge, and print both."""
    overheads = fit(folder)
    for name, value in asdict(overheads).items():
        print(f"{name:22} {value:,.3f}")
    errors = judge(folder, overheads)
    for name, (middle, most) in errors.items():
        print(f"{name:22} median error {middle:.1%}, 90th percentile {most:.1%}, not fitted")
    print(json.dumps({"overheads": asdict(overheads), "errors": errors}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
