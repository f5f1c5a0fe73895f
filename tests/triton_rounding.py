"""Repairs how Triton's interpreter rounds: to nearest even, as a GPU does.

The interpreter of Triton 3.6 drops the bits that bfloat16 and 8-bit floats have no room for, which
doubles their error; bounds that hold on a GPU would have to be loosened for it. Its own float16
conversions, NumPy's, are right and stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_TYPES = {
    tl.float32: (torch.float32, np.float32),
    tl.float16: (torch.float16, np.float16),
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
}
NARROW = (tl.bfloat16, tl.float8e4nv)


def repair_rounding() -> None:
    """Make conversions from and to bfloat16 and float8e4nv round to nearest; once is enough."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_to_nearest", False):
        return
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_repaired(source, target):
            return round_to_nearest(source, target)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if is_repaired(source, target):
            return round_to_nearest(source, target)
        return convert(self, source, target, rounding)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.rounds_to_nearest = True


def is_repaired(source: Any, target: Any) -> bool:
    """Whether this conversion is between floats and one of them is narrow."""
    pair = (source.dtype.scalar, target.scalar)
    return all(each in TORCH_TYPES for each in pair) and any(each in NARROW for each in pair)


def round_to_nearest(source: Any, target: Any) -> Any:
    """The conversion, done by PyTorch."""
    torch_source = TORCH_TYPES[source.dtype.scalar][0]
    torch_target, numpy_target = TORCH_TYPES[target.scalar]
    bits = torch.from_numpy(np.ascontiguousarray(source.data).view(np.uint8).reshape(-1))
    values = bits.clone().view(torch_source).to(torch_target)
    data = values.view(torch.uint8).numpy().view(numpy_target).reshape(source.data.shape)
    return interpreter.TensorHandle(data, target.scalar)
