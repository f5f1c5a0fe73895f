"""Repairs Triton's interpreter where it treats narrow floats unlike a GPU.

The interpreter of Triton 3.6 cuts off the bits that bfloat16 and 8-bit floats have no room for,
which doubles their error, and multiplies matrices of bfloat16 as the integers it keeps them in.
Bounds that hold on a GPU would have to be loosened for it, or kernels written around it. Its
float16, NumPy's, is right and stays.
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


def repair_interpreter() -> None:
    """Convert from and to narrow floats, and multiply them, as a GPU does; once is enough."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "is_repaired", False):
        return
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_narrow(source, target):
            return round_to_nearest(source, target)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if is_narrow(source, target):
            return round_to_nearest(source, target)
        return convert(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        wide = [
            round_to_nearest(each, tl.float32) if each.dtype.scalar in NARROW else each
            for each in (a, b)
        ]
        return dot(self, *wide, *others)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    builder.is_repaired = True


def is_narrow(source: Any, target: Any) -> bool:
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
