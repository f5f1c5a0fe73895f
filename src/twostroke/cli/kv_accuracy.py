"""What eight-bit keys and values cost, as it was measured.

The numbers are what `tests/models/test_reference_answers.py` measures on the CPU backend against
answers of independent float32 engines; that test fails when they no longer hold. They are of two
small models: what another model loses is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec

# Mean |difference| of a token's log-probability (nats), teacher-forced on greedy continuations.
MEASURED_ERRORS: Mapping[str, Mapping[KvElement, float]] = MappingProxyType(
    {
        "smollm2-135m": {KvElement.F16: 0.028, KvElement.INT8: 0.031},
        "gemma3-270m": {KvElement.F16: 0.022, KvElement.INT8: 0.027},
    }
)


def describe_int8(spec: ModelSpec) -> str:
    """The memory that int8 takes of f16's with this model, and its measured cost in accuracy."""
    half, small = (
        spec.get_kv_bytes_per_token(element) for element in (KvElement.F16, KvElement.INT8)
    )
    costs = ", ".join(
        f"{errors[KvElement.INT8]} (f16: {errors[KvElement.F16]}) on {model}"
        for model, errors in MEASURED_ERRORS.items()
    )
    return f"{small / half:.0%} of f16's memory; mean log-probability error {costs}"
