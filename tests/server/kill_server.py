"""A whole server in a process of its own, to be killed: a tiny real model and a durable log.

`python kill_server.py STATE PORT`: prints the port it serves on, 0 taking any. It makes as many
steps as the file STATE/steps says and then stands still and prints "held"; without that file it
makes all of them.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from fakes import make_vocabulary
from tiny_models import TINY_SPECS, make_config, make_tensors
from twostroke.core.scheduler import Scheduler
from twostroke.engine.async_llm import AsyncLLM
from twostroke.engine.clock import MonotonicClock
from twostroke.engine.service import EngineParts
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import LocalExecutor, RunnerSizes
from twostroke.server.serve import ServeOptions, run
from twostroke.server.settings import ServerSettings
from twostroke.spec.quant import Format
from twostroke.text.chat import ChatTemplate
from twostroke.text.tokenizer import Tokenizer

SIZES = RunnerSizes(threads=1, num_blocks=200, block_tokens=16, max_step_tokens=128)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


class CountedExecutor(LocalExecutor):
    """Stands still after so many steps; a library's class is inherited from in no other way."""

    allowance = Path()
    made = 0

    def run_pending(self) -> tuple[int, int, int]:
        if self.allowance.exists() and self.made >= int(self.allowance.read_text()):
            time.sleep(0.2)  # so that clients have seen what was made, most likely
            print("held", flush=True)
            time.sleep(3600)
        self.made += 1
        return super().run_pending()


def main(state: Path, port: int) -> None:
    """Serve until killed."""
    vocabulary = make_vocabulary()
    spec = replace(TINY_SPECS["llama"], vocab_size=len(vocabulary.tokens))
    executor = CountedExecutor(CpuRunner(spec, make_tensors(spec, Format.Q8_0), SIZES), SIZES)
    executor.allowance = state / "steps"
    config = replace(make_config(spec, SIZES), cache_seed="tiny")
    parts = EngineParts(
        spec=spec,
        tokenizer=Tokenizer.from_vocabulary(vocabulary),
        chat_template=ChatTemplate(TEMPLATE),
        scheduler=Scheduler(config),
        executor=executor,
        clock=MonotonicClock(),
        model_name="tiny",
    )
    run(
        AsyncLLM(parts),
        ServeOptions(port=port, settings=ServerSettings(state=state)),
        lambda host, port: print(port, flush=True),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
