"""A whole server in a process of its own, to be killed: a tiny real model and a durable log.

`python kill_server.py STATE PORT [isolated]`: prints the port it serves on, 0 taking any. It makes
as many steps as the file STATE/steps says and then stands still and prints "held"; without that
file it makes all of them. With an isolated executor, as `serve` has it, the step behind those ends
the server and the executor instead.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from child_text import SIZES, IsolatedModel, make_parts, make_runner
from twostroke.engine.async_llm import AsyncLLM
from twostroke.engine.service import EngineParts
from twostroke.exec.local import LocalExecutor
from twostroke.server.serve import ServeOptions, run
from twostroke.server.settings import ServerSettings


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


def main(state: Path, port: int, is_isolated: bool) -> None:
    """Serve until killed."""
    run(
        AsyncLLM(IsolatedModel(state).make_parts() if is_isolated else make_counted_parts(state)),
        ServeOptions(port=port, settings=ServerSettings(state=state)),
        lambda host, port: print(port, flush=True),
    )


def make_counted_parts(state: Path) -> EngineParts:
    """An engine whose executor, in this process, stands still where STATE/steps says."""
    executor = CountedExecutor(make_runner(), SIZES)
    executor.allowance = state / "steps"
    return make_parts(executor)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["isolated"])
