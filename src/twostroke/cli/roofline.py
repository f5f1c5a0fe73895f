"""`twostroke roofline`: where prefill and decode lie under a device's roof, and what bounds them.

Composes a model's counts, a device's limits and an engine's losses into points, a table, a picture
and what is true of common shortcuts. `--device this` measures this machine and opens the model's
own file, so that formats are those that run here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from twostroke.cli.question_options import RooflineOptions
from twostroke.cli.settings import check_name, format_bytes
from twostroke.cli.simulated import ENGINES, KV_ELEMENTS, find_device, find_model
from twostroke.errors import InvalidParameter
from twostroke.plan.roofline import (
    Point,
    Shapes,
    build_points,
    find_kv_batch,
    get_attention_intensity,
    get_working_device,
    list_ridges,
)
from twostroke.plan.roofline_cost import RooflineCost
from twostroke.spec.cost import StepCost
from twostroke.spec.device import DeviceSpec, get_known_device
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import ModelWork, get_model_work

THIS = "this"
_PICTURES = (".png", ".svg")
_MOST_NUMBERS = 40
_LARGEST = 2**20


@dataclass(frozen=True, slots=True)
class Subject:
    """A model on a device. device: with the rates it works with; roofs: those that are drawn."""

    spec: ModelSpec
    work: ModelWork
    device: DeviceSpec
    roofs: tuple[str, ...]
    cost: StepCost
    what: str


def run_roofline(options: RooflineOptions) -> None:
    """Show the roofline. Raises TwostrokeError."""
    shapes = Shapes(
        prompts=_read_numbers("prompt_tokens", options.prompt_tokens),
        batches=_read_numbers("batch", options.batch),
        contexts=_read_numbers("context", options.context),
    )
    paths = check_pictures(options.output or [])
    subject = find_subject(options)
    points = build_points(subject.work, subject.device, subject.cost, shapes)
    _print(subject, points)
    notes = list(list_notes(subject, points))
    print("\nWhat common shortcuts miss:")
    for note in notes:
        print(f"  - {note}")
    for path in paths:
        _draw(subject, points, path)
        print(f"wrote {path}")
    if options.json:
        print(json.dumps(_describe(subject, points, notes)))


def find_subject(options: RooflineOptions) -> Subject:
    """Model, device and cost by their names. Raises TwostrokeError."""
    element = KvElement(check_name("kv", options.kv or KvElement.F16.value, KV_ELEMENTS))
    if options.device == THIS:
        return _find_this(options)
    spec = find_model(options.model)
    device, engine = find_device(options.device)
    work = get_model_work(spec, element)
    cost = RooflineCost(spec, device, 1, ENGINES[engine][0], work)
    working = get_working_device(device)
    what = f"{spec.name} on {device.name}, predicted for an engine as {engine!r}"
    return Subject(spec, work, working, (working.rates[-1][0],), cost, what)


def _find_this(options: RooflineOptions) -> Subject:
    """This machine, measured now, and the model's own file."""
    from twostroke.cli.limits import measure_device
    from twostroke.cli.this_machine import open_this

    spec, settings, cost, source = open_this(options.model, options.kv)
    device = measure_device(settings.threads)
    work = get_model_work(spec, settings.kv_element)
    what = f"{spec.name} on this machine's {settings.threads} threads, predicted from {source}"
    return Subject(spec, work, device, ("int8", "fp32"), cost, what)


def list_notes(subject: Subject, points: Sequence[Point]) -> Iterator[str]:
    """What is true of shortcuts in circulation, with this model's and device's numbers."""
    work, device = subject.work, subject.device
    decodes = [point for point in points if point.stroke == "decode"]
    if decodes:
        context = decodes[0].context
        same = [point for point in decodes if point.context == context]
        rows = ", ".join(f"{each.intensity:.3g} at {each.rows:,}" for each in same)
        yield f"decode's intensity is no constant: by rows at context {context:,} it is {rows}"
        for depth in sorted({point.context for point in decodes}):
            batch = find_kv_batch(work, depth)
            limit = get_attention_intensity(work)
            if batch:
                most = f"at context {depth:,} keys and values are most of the bytes from {batch:,}"
                yield f"{most} rows on; more help little then: attention alone has {limit:.3g}"
    prefills = [point for point in points if point.stroke == "prefill"]
    for point in prefills[-1:]:
        yield (
            f"prefill's intensity is not the length: it is {point.intensity:,.0f} at "
            f"{point.new_tokens:,} tokens, for attention, keys and values and formats count"
        )
    if "a100" in device.name:
        ridges = [get_known_device(name).get_ridge("bf16") for name in ("a100-80gb", "a100-40gb")]
        first, second = (f"{each:.0f}" for each in ridges)
        yield f"the ridge of an A100 is not one number: {first} with 80 GB, {second} with 40 GB"
    for short, long in pairwise(prefills):
        if (short.bound_by, long.bound_by) == ("memory", "compute"):
            yield (
                f"prompts too are bound by memory while they are short: here at "
                f"{short.new_tokens:,} tokens, and by arithmetic at {long.new_tokens:,}"
            )


def check_pictures(names: Sequence[str]) -> list[Path]:
    """The pictures to write. Raises InvalidParameter for one that cannot be."""
    from twostroke.sim.plot import check_plot

    paths = [Path(name) for name in names]
    for path in paths:
        if path.suffix.lower() not in _PICTURES:
            raise InvalidParameter("output", f"{path} must end in one of {', '.join(_PICTURES)}")
        if not path.parent.is_dir():
            raise InvalidParameter("output", f"{path}: there is no folder {path.parent}")
        check_plot()
    return paths


def _draw(subject: Subject, points: Sequence[Point], path: Path) -> None:
    from twostroke.plan.roofline_plot import RooflinePicture, draw_roofline

    picture = RooflinePicture(subject.what, subject.device, subject.roofs, points)
    try:
        draw_roofline(picture, path)
    except OSError as error:
        raise InvalidParameter("output", f"{path} cannot be written: {error.strerror}") from error


def _print(subject: Subject, points: Sequence[Point]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"{subject.what}; weights {format_bytes(subject.spec.weight_bytes)}")
    device = subject.device
    for kind in subject.roofs:
        ridge = device.get_ridge(kind)
        rate, bandwidth = device.get_rate(kind) / 1e12, device.memory_bandwidth / 1e12
        print(f"ridge, {kind}: {rate:,.4g} TFLOP/s / {bandwidth:.4g} TB/s = {ridge:,.0f} FLOP/byte")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "FLOP", "bytes", "FLOP/byte", "KV", "bound by", "at least", "predicted"):
        table.add_column(name, justify="left" if name in ("step", "bound by") else "right")
    for point in points:
        table.add_row(
            _name(point),
            f"{point.flops:.3g}",
            format_bytes(point.bytes),
            f"{point.intensity:,.3g}" if point.intensity < 1000 else f"{point.intensity:,.0f}",
            f"{point.kv_share:.0%}",
            point.bound_by,
            _format_ms(point.floor_s),
            _format_ms(point.predicted_s),
        )
    Console(highlight=False, width=110).print(table)


def _name(point: Point) -> str:
    if point.stroke == "prefill":
        return f"prefill {point.new_tokens:,}"
    return f"decode {point.rows:,} × context {point.context:,}"


def _format_ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.3g} ms" if ms < 1000 else f"{ms:,.0f} ms"


def _describe(subject: Subject, points: Sequence[Point], notes: Sequence[str]) -> dict[str, object]:
    device = subject.device
    return {
        "model": subject.spec.name,
        "device": device.name,
        "memory_bandwidth": device.memory_bandwidth,
        "ridges": dict(list_ridges(device)),
        "points": [{**asdict(point), "intensity": point.intensity} for point in points],
        "notes": list(notes),
    }


def _read_numbers(parameter: str, text: str) -> tuple[int, ...]:
    """Whole numbers between commas, rising. Raises InvalidParameter."""
    words = [word.strip() for word in text.split(",")]
    numbers = [int(word) for word in words if word.isascii() and word.isdigit()]
    is_good = len(numbers) == len(words) <= _MOST_NUMBERS
    if not is_good or not all(1 <= each <= _LARGEST for each in numbers):
        like = f"whole numbers from 1 to {_LARGEST:,} with commas between, such as 1,16,256"
        raise InvalidParameter(parameter, f"must be {like}; not {text!r}")
    return tuple(sorted(set(numbers)))
