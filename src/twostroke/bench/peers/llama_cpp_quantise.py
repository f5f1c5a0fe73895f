"""Writes a model again in another format with llama.cpp's own quantiser.

Runs in the peers' environment. Arguments: model, output, format (such as Q4_0). The file
appears under its name only when it is whole.
"""

from __future__ import annotations

import ctypes
import os
import sys

import llama_cpp


def quantise(source: str, target: str, name: str) -> None:
    """Write `target`; weights that are quantised already are decoded and quantised again."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.allow_requantize = True
    partial = f"{target}.{os.getpid()}.partial"
    code = llama_cpp.llama_model_quantize(source.encode(), partial.encode(), ctypes.byref(params))
    if code != 0:
        raise SystemExit(f"llama_model_quantize failed with {code}")
    os.replace(partial, target)


if __name__ == "__main__":
    quantise(sys.argv[1], sys.argv[2], sys.argv[3])
