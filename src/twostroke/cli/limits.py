"""What this machine allows: its limits, measured now, and the least time of one request's strokes.

Work comes from `spec/work.py`, rates from the native probes, or on a GPU from PyTorch's own copies
and products; here they meet. The limit is the best that a probe reached, not its mean, so that a
share is never flattered by a busy machine.
"""

from __future__ import annotations

from collections.abc import Iterable

from twostroke.cli.machine import read_machine
from twostroke.cli.settings import ResolvedSettings
from twostroke.cli.strokes import Measured, StrokeFloor, add_floors
from twostroke.exec.cuda_formats import describe_held
from twostroke.spec.device import DeviceSpec
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import RowShape, StepShape, get_floor_seconds, get_model_work

_BANDWIDTH_SECONDS = 0.15
_BANDWIDTH_BYTES = 224 * 2**20  # seven times a large cache, and less than an engine takes
_RATE_SECONDS = 0.06
# Decode steps whose floor is computed; those between differ by the KV of a few tokens, which
# grows evenly, so the mean over evenly spaced ones is the mean over all.
_DECODE_SAMPLES = 256


def measure_limits(settings: ResolvedSettings) -> DeviceSpec:
    """The limits of the device that the engine ran on, in well under a second."""
    if settings.is_on_gpu:
        from twostroke.cli.gpu_limits import measure_gpu

        return measure_gpu(settings.device)
    return measure_device(settings.threads)


def measure_device(threads: int) -> DeviceSpec:
    """This machine's limits with `threads` threads, in well under a second."""
    from twostroke import _native

    _, bandwidth = _native.measure_read_bandwidth(
        threads, bytes=_BANDWIDTH_BYTES, seconds=_BANDWIDTH_SECONDS
    )
    _, int8 = _native.measure_int8_rate(threads, seconds=_RATE_SECONDS)
    _, fp32 = _native.measure_fp32_rate(threads, seconds=_RATE_SECONDS)
    return DeviceSpec(
        name="cpu",
        memory_bandwidth=bandwidth,
        rates=(("int8", int8), ("fp32", fp32)),
        threads=threads,
        memory_bytes=read_machine().available_bytes,
        features=tuple(_native.cpu_features()),
    )


def get_stroke_floors(
    spec: ModelSpec, settings: ResolvedSettings, measured: Measured, device: DeviceSpec
) -> tuple[StrokeFloor, StrokeFloor | None]:
    """Least time of prefill, and of decode where there was one, for a request that ran alone."""
    prompt = measured.prompt_tokens
    held = describe_held(spec, settings.weights) if settings.weights else spec
    work = get_model_work(held, settings.kv_element)

    def add(rows: Iterable[RowShape]) -> StrokeFloor:
        return add_floors(
            get_floor_seconds(work.get_step_work(StepShape((row,))), device) for row in rows
        )

    prefill = add(cut_prompt(prompt, settings.step_tokens))
    steps = measured.new_tokens - 1
    if steps < 1:
        return prefill, None
    chosen = range(0, steps, max(1, steps // _DECODE_SAMPLES))
    some = add(RowShape(1, prompt + step, 1) for step in chosen)
    return prefill, StrokeFloor(some.seconds * steps / len(chosen), some.bound_by)


def cut_prompt(prompt_tokens: int, step_tokens: int) -> list[RowShape]:
    """The chunks of a prompt that has every step to itself; only the last is sampled."""
    starts = range(0, prompt_tokens, step_tokens)
    ends = [*starts[1:], prompt_tokens]
    return [
        RowShape(end - start, start, int(end == prompt_tokens))
        for start, end in zip(starts, ends, strict=True)
    ]


def format_device(device: DeviceSpec) -> str:
    """The measured limits in one line."""
    if device.has_rate("bf16"):
        bandwidth, rate = device.memory_bandwidth / 1e9, device.get_rate("bf16") / 1e12
        return (
            f"limits measured now, {device.name}: {bandwidth:,.0f} GB/s copied, "
            f"bf16 {rate:,.0f} Tflop/s"
        )
    bandwidth, int8, fp32 = (
        device.memory_bandwidth / 1e9,
        device.get_rate("int8") / 1e9,
        device.get_rate("fp32") / 1e9,
    )
    return (
        f"limits measured now, {device.threads} threads: {bandwidth:.3g} GB/s read, "
        f"int8 {int8:,.0f} Gop/s, fp32 {fp32:,.0f} Gflop/s"
    )
