"""A GPU as the executor uses it: streams, events, graphs, pinned memory; and a stand-in on the CPU.

Owns the calls that only a GPU answers, so that everything above runs on `HostDevice` too: there,
work is done when it is asked for, an event has always happened, and a graph is its function.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from twostroke.errors import DeviceError

Run = Callable[[], None]


class Event(Protocol):
    """A place in a stream. `wait` blocks the calling thread until everything before is done."""

    def wait(self) -> None: ...

    def has_passed(self) -> bool: ...

    def get_ns_since(self, earlier: Event) -> int: ...


class Device(Protocol):
    """Where tensors lie (`name`, as PyTorch has it) and work is queued.

    use: within it, work is queued on the main stream. use_copies: within it on the stream for
    copies, which first waits for what the main stream has been given so far. record: an event
    behind all that was queued on the stream in use. wait_for: what is queued from now on runs
    behind `event`. capture: a graph of what `run` queues. get_free: (free, total) bytes.
    pin: host memory (size,) int32 or bytes that copies to and from the device can use directly.
    """

    name: str

    def use(self) -> contextlib.AbstractContextManager[None]: ...

    def use_copies(self) -> contextlib.AbstractContextManager[None]: ...

    def record(self) -> Event: ...

    def wait_for(self, event: Event) -> None: ...

    def capture(self, run: Run) -> Run: ...

    def pin(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...

    def get_free(self) -> tuple[int, int]: ...

    def synchronize(self) -> None: ...


class _GpuEvent:
    """An event of CUDA's."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def wait(self) -> None:
        self.event.synchronize()

    def has_passed(self) -> bool:
        return bool(self.event.query())

    def get_ns_since(self, earlier: Event) -> int:
        assert isinstance(earlier, _GpuEvent)
        return max(0, round(earlier.event.elapsed_time(self.event) * 1e6))


class GpuDevice:
    """One NVIDIA GPU (see Device). Raises DeviceError when it cannot be used."""

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("PyTorch finds no CUDA device here; use --device cpu")
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise DeviceError(f"there is no cuda:{index}: this machine has {count} CUDA devices")
        self.name = f"cuda:{index}"
        self._index = index
        with torch.cuda.device(index):
            self._main = torch.cuda.Stream()
            self._copies = torch.cuda.Stream()

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """See Device."""
        with torch.cuda.device(self._index), torch.cuda.stream(self._main):
            yield

    @contextlib.contextmanager
    def use_copies(self) -> Iterator[None]:
        """See Device."""
        self._copies.wait_stream(self._main)
        with torch.cuda.device(self._index), torch.cuda.stream(self._copies):
            yield

    def record(self) -> Event:
        """See Device."""
        return _GpuEvent()

    def wait_for(self, event: Event) -> None:
        """See Device."""
        assert isinstance(event, _GpuEvent)
        torch.cuda.current_stream().wait_event(event.event)

    def capture(self, run: Run) -> Run:
        """See Device. `run` is called once before, so that its kernels are compiled."""
        run()
        self._main.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._main):
            run()
        replay: Run = graph.replay
        return replay

    def pin(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See Device."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def get_free(self) -> tuple[int, int]:
        """See Device."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._index)
        return int(free), int(total)

    def synchronize(self) -> None:
        """Waits for all that was queued."""
        torch.cuda.synchronize(self._index)


class _HostEvent:
    """A moment that has passed."""

    def __init__(self) -> None:
        self._at_ns = time.perf_counter_ns()

    def wait(self) -> None:
        return

    def has_passed(self) -> bool:
        return True

    def get_ns_since(self, earlier: Event) -> int:
        assert isinstance(earlier, _HostEvent)
        return self._at_ns - earlier._at_ns


class HostDevice:
    """The CPU in place of a GPU (see Device): kernels run in Triton's interpreter.

    memory_bytes: what `get_free` answers.
    """

    def __init__(self, memory_bytes: int = 2**30) -> None:
        self.name = "cpu"
        self._memory_bytes = memory_bytes

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """See Device."""
        yield

    @contextlib.contextmanager
    def use_copies(self) -> Iterator[None]:
        """See Device."""
        yield

    def record(self) -> Event:
        """See Device."""
        return _HostEvent()

    def wait_for(self, event: Event) -> None:
        """See Device."""

    def capture(self, run: Run) -> Run:
        """See Device."""
        return run

    def pin(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See Device."""
        return torch.zeros(shape, dtype=dtype)

    def get_free(self) -> tuple[int, int]:
        """See Device."""
        return self._memory_bytes, self._memory_bytes

    def synchronize(self) -> None:
        """See Device."""
