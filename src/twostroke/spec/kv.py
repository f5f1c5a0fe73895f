"""How keys and values are kept between steps.

Only names and sizes live here; `kernels/reference/ops.py` states how an int8 value is rounded.
Which elements a backend keeps is its own to say.
"""

from __future__ import annotations

import enum

_SCALE_BYTES = 4  # float32


class KvElement(enum.Enum):
    """A stored key's or value's element; the value is its name in settings and native code.

    INT8 and FP8 (E4M3) have one float32 scale for each token's K and each token's V of a head.
    """

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"

    def get_head_bytes(self, head_dim: int) -> int:
        """Bytes of one token's K of one head; V takes as many."""
        if self in (KvElement.INT8, KvElement.FP8):
            return head_dim + _SCALE_BYTES
        return head_dim * (4 if self is KvElement.F32 else 2)
