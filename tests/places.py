"""Where tests find the files that do not live in the repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"

_FILES = {
    "smollm2-135m": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma3-270m": "gemma-3-270m-q4_k_m.gguf",
}
_REFERENCES = {
    "smollm2-135m": "smollm2_135m_q4_1.json",
    "gemma3-270m": "gemma3_270m_q4_k_m.json",
}


def get_model_path(name: str) -> Path:
    """Path of a pulled model; fails, never skips, when `make test` has not pulled it."""
    cache = Path(os.environ.get("TWOSTROKE_CACHE", Path.home() / ".cache" / "twostroke"))
    path = cache / "models" / _FILES[name]
    assert path.is_file(), f"{path} is missing: run `twostroke pull {name}` (make test does)"
    return path


def get_reference(name: str) -> dict[str, Any]:
    """The independent engines' answers for a model: prompts, ids, log-probabilities."""
    answers: dict[str, Any] = json.loads((SHARED / "reference" / _REFERENCES[name]).read_text())
    return answers
