"""One weight as it lies in memory: its description and its stored bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twostroke.spec.model import TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class HostTensor:
    """A weight in host memory.

    spec: canonical name, logical shape, format. data: (spec.bytes,) uint8, read-only, usually a
    view on the mapped file, which it keeps alive; rows lie one after another, each in whole blocks.
    """

    spec: TensorSpec
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        assert self.data.dtype == np.uint8, self.data.dtype
        assert self.data.shape == (self.spec.bytes,), (self.spec, self.data.shape)
        assert not self.data.flags.writeable, self.spec.name
