"""Writes a GGUF model as a Hugging Face folder of float32 safetensors, for vLLM to read.

Runs in the Transformers environment. Arguments: model, folder. The folder appears under its name
only when it is whole.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers


def export(source: Path, folder: Path) -> None:
    """Decode the weights and write them with the tokenizer."""
    place = {"gguf_file": source.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.parent), dtype=torch.float32, **place
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), **place)
    model.hf_quantizer = None  # the weights are plain by now; with it they cannot be saved
    del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
