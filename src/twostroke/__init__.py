"""Twostroke: an LLM inference engine built around prefill and decode.

    from twostroke import LLM, SamplingParams

    with LLM("smollm2-135m") as llm:
        print(llm.generate("The sea is", SamplingParams(max_tokens=16))[0].completions[0].text)

The names below are loaded on first use, so that `import twostroke` itself costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twostroke.cli.compose import LLM
    from twostroke.engine.async_llm import AsyncLLM
    from twostroke.engine.outputs import RequestOutput
    from twostroke.engine.params import SamplingParams

__all__ = ["LLM", "AsyncLLM", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "twostroke.cli.compose",
    "AsyncLLM": "twostroke.engine.async_llm",
    "RequestOutput": "twostroke.engine.outputs",
    "SamplingParams": "twostroke.engine.params",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("twostroke")
    if name not in _HOMES:
        raise AttributeError(f"module 'twostroke' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
