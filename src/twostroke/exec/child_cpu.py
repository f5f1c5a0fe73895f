"""What a child runs for a model file: the CPU executor, its weights mapped and its pool given.

The parent describes the work in plain values, the child does it. A replacement must compute with
the very weights of the first, so both name the model's files by their identities.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twostroke.errors import CorruptModel
from twostroke.exec.child_memory import MappedMemory, MemorySizes
from twostroke.exec.child_process import ChildSetup
from twostroke.exec.local import LocalExecutor, RunnerSizes, get_kv_shape
from twostroke.spec.kv import KvElement
from twostroke.weights.load import OpenModel, open_model
from twostroke.weights.mapping import FileIdentity
from twostroke.weights.packed import PackedFiles


def describe_child(model: OpenModel, sizes: RunnerSizes, packed: Path) -> ChildSetup:
    """What a child is told, to run `model`.

    packed: the folder where packed weights are kept, which all children map.
    """
    values = (
        str(model.path.absolute()),
        tuple(_to_values(each) for each in model.identities),
        (
            sizes.threads,
            sizes.num_blocks,
            sizes.block_tokens,
            sizes.max_step_tokens,
            sizes.kv_element.value,
            sizes.host_blocks,
        ),
        str(packed),
    )
    return ChildSetup(f"{__name__}:make_executor", values)


def measure_memory(model: OpenModel, sizes: RunnerSizes) -> MemorySizes:
    """The memory that a child of these sizes works on."""
    kv_bytes = get_kv_shape(model.spec, sizes).bytes
    return MemorySizes(kv_bytes, kv_bytes // sizes.num_blocks * sizes.host_blocks)


def make_executor(job: tuple[Any, ...], memory: MappedMemory) -> LocalExecutor:
    """The executor that `describe_child` described. Raises a ModelError or DeviceError."""
    from twostroke.exec.cpu import CpuRunner

    path, identities, sizes, packed = job
    threads, num_blocks, block_tokens, max_step_tokens, element, host_blocks = sizes
    runner_sizes = RunnerSizes(
        threads, num_blocks, block_tokens, max_step_tokens, KvElement(element), host_blocks
    )
    model = open_model(Path(path))
    if tuple(_to_values(each) for each in model.identities) != identities:
        raise CorruptModel(f"{path}: the file was changed since it was first opened")
    files = PackedFiles(Path(packed), model.identities)
    runner = CpuRunner(model.spec, model.tensors, runner_sizes, files=files, memory=memory.kv)
    return LocalExecutor(runner, runner_sizes, memory.host)


def _to_values(identity: FileIdentity) -> tuple[int, ...]:
    """An identity but for the path, which may be written in several ways."""
    return (
        identity.device,
        identity.inode,
        identity.size,
        identity.modified_ns,
        identity.changed_ns,
    )
