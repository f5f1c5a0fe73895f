"""Makes the executor asked for by name out of an open model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from twostroke.errors import DeviceError
from twostroke.exec.cuda_memory import CudaOptions
from twostroke.exec.local import LocalExecutor, RunnerSizes
from twostroke.weights.load import OpenModel
from twostroke.weights.packed import PackedFiles

if TYPE_CHECKING:
    from twostroke.exec.cuda_open import OpenedExecutor

BACKENDS = ("cpu", "reference")


def build_executor(
    model: OpenModel, backend: str, sizes: RunnerSizes, packed: Path | None = None
) -> LocalExecutor:
    """An in-process executor over `model`'s weights; `backend` is "cpu" or "reference".

    packed: the folder where packed weights are kept between starts; None keeps none.
    Raises DeviceError for an unknown backend or when the native module is missing, and
    UnsupportedModel when the backend cannot run the model.
    """
    if backend == "reference":
        from twostroke.exec.reference import ReferenceRunner

        return LocalExecutor(ReferenceRunner(model.spec, model.tensors, sizes), sizes)
    if backend != "cpu":
        raise DeviceError(f"unknown backend {backend!r}: there are {', '.join(BACKENDS)}")
    try:
        from twostroke.exec.cpu import CpuRunner
    except ImportError as error:
        raise DeviceError(
            f"the native CPU module cannot be loaded ({error}); use --backend reference"
        ) from error
    files = None if packed is None else PackedFiles(packed, model.identities)
    return LocalExecutor(CpuRunner(model.spec, model.tensors, sizes, files=files), sizes)


def build_cuda_executor(
    model: OpenModel, options: CudaOptions, progress: Callable[[int, int], None]
) -> OpenedExecutor:
    """An executor on a GPU, its weights loaded and its steps captured, and its KV pool's plan.

    progress: called after each weight with the bytes of the file that are done and those there are.
    Raises DeviceError where PyTorch or Triton is missing, where there is no such GPU, or where the
    model does not fit, and UnsupportedModel when this backend cannot run the model.
    """
    try:
        from twostroke.exec.cuda_open import open_executor
    except ImportError as error:
        raise DeviceError(
            f"--device {options.device} cannot be used ({error}): pip install 'twostroke[cuda]'"
        ) from error
    return open_executor(model.spec, model.tensors, options, progress)
