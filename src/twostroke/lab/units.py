"""The eleven units in their order: the only place that names them all."""

from __future__ import annotations

from twostroke.errors import InvalidParameter
from twostroke.lab import (
    batching,
    chunking,
    disaggregation,
    flash,
    kv_arithmetic,
    paging,
    quantisation,
    recovery,
    roofline,
    speculation,
    strokes,
)
from twostroke.lab.unit import Unit

NUMBERS, SIMULATOR, ENGINE = "numbers", "simulator", "engine"


def list_units() -> tuple[Unit, ...]:
    """All units, first to last."""
    rows = (
        ("The two strokes", strokes, NUMBERS,
         (strokes.draw_decode_floor, strokes.draw_prefill_floor)),
        ("The roofline", roofline, NUMBERS, (roofline.draw_bound,)),
        ("KV arithmetic", kv_arithmetic, NUMBERS, (kv_arithmetic.draw_kv, kv_arithmetic.draw_fit)),
        ("Static, continuous, every iteration", batching, ENGINE, (batching.draw_steps,)),
        ("PagedAttention", paging, SIMULATOR, (paging.draw_blocks, paging.draw_share)),
        ("FlashAttention", flash, NUMBERS, (flash.draw_scores,)),
        ("Chunked prefill", chunking, SIMULATOR, (chunking.draw_steps,)),
        ("Disaggregation and its true cost", disaggregation, SIMULATOR,
         (disaggregation.draw_transfer,)),
        ("Failure recovery", recovery, SIMULATOR,
         (recovery.draw_interval, recovery.draw_overhead)),
        ("Quantisation", quantisation, NUMBERS, (quantisation.draw_size,)),
        ("Speculation", speculation, ENGINE, (speculation.draw_tokens,)),
    )  # fmt: skip
    return tuple(
        Unit(number, title, module.IDEA, runs_on, module.run, questions)
        for number, (title, module, runs_on, questions) in enumerate(rows, 1)
    )


def find_unit(number: int) -> Unit:
    """A unit by its number. Raises InvalidParameter."""
    units = list_units()
    if not 1 <= number <= len(units):
        raise InvalidParameter("unit", f"must be from 1 to {len(units)}, not {number}")
    return units[number - 1]
