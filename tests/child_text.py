"""A tiny real model that speaks text, in this process or in an isolated child.

`make_executor` is what children are told to call. With a state folder a child counts its steps, and
takes its parent and itself down in the one that the file `steps` there names.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from child_engine import WatchedRunner
from fakes import make_vocabulary
from tiny_models import TINY_SPECS, make_config, make_tensors
from twostroke.core.ports import Executor
from twostroke.core.scheduler import Scheduler
from twostroke.engine.clock import MonotonicClock
from twostroke.engine.loop import LoopPolicy
from twostroke.engine.service import EngineParts
from twostroke.errors import ExecutorLost
from twostroke.exec.child_executor import ChildExecutor
from twostroke.exec.child_memory import MappedMemory, MemorySizes
from twostroke.exec.child_process import ChildSetup
from twostroke.exec.child_supervisor import ChildSupervisor
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import LocalExecutor, Runner, RunnerSizes, get_kv_shape
from twostroke.kernels.ops import StepArrays
from twostroke.spec.quant import Format
from twostroke.text.chat import ChatTemplate
from twostroke.text.tokenizer import Tokenizer

SIZES = RunnerSizes(threads=1, num_blocks=200, block_tokens=16, max_step_tokens=128)
SPEC = replace(TINY_SPECS["llama"], vocab_size=len(make_vocabulary().tokens))
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def make_runner(memory: MappedMemory | None = None) -> CpuRunner:
    """The model's runner, over memory of its own or memory given."""
    kv = None if memory is None else memory.kv
    return CpuRunner(SPEC, make_tensors(SPEC, Format.Q8_0), SIZES, memory=kv)


def make_executor(job: tuple[Any, ...], memory: MappedMemory) -> LocalExecutor:
    """For a child. job: a state folder, or nothing."""
    runner: Runner = make_runner(memory)
    allowance = Path(job[0]) / "steps" if job else None
    if allowance is not None and allowance.exists():
        runner = WatchedRunner(runner, _end_both_in(int(allowance.read_text())))
    return LocalExecutor(runner, SIZES, memory.host)


def _end_both_in(last: int) -> Callable[[StepArrays], None]:
    made = 0

    def end_both(step: StepArrays) -> None:
        nonlocal made
        made += 1
        if made > last:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    return end_both


def make_parts(executor: Executor, policy: LoopPolicy | None = None) -> EngineParts:
    """An engine over this executor."""
    return EngineParts(
        spec=SPEC,
        tokenizer=Tokenizer.from_vocabulary(make_vocabulary()),
        chat_template=ChatTemplate(TEMPLATE),
        scheduler=Scheduler(replace(make_config(SPEC, SIZES), cache_seed="tiny")),
        executor=executor,
        clock=MonotonicClock(),
        model_name="tiny",
        policy=policy or LoopPolicy(),
    )


class IsolatedModel:
    """The model in a child that is replaced when it dies. executor: the one in use."""

    def __init__(self, state: Path | None = None) -> None:
        kv_bytes = get_kv_shape(SPEC, SIZES).bytes
        job = () if state is None else (str(state),)
        self._supervisor = ChildSupervisor(
            ChildSetup("child_text:make_executor", job),
            MemorySizes(kv_bytes, 0),
            lambda plan: 60 * 10**9,
        )
        self.executor: ChildExecutor = self._supervisor.open()
        self.num_replaced = 0

    def make_parts(self) -> EngineParts:
        """An engine over it, which closes it."""
        policy = LoopPolicy(replace_executor=self._replace, on_closed=self._supervisor.close)
        return make_parts(self.executor, policy)

    def _replace(self, lost: ExecutorLost) -> ChildExecutor:
        self.executor = self._supervisor.replace(lost)
        self.num_replaced += 1
        return self.executor
