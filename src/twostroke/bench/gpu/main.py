"""The GPU benchmark's driver: card, kernels, models one after another, then the report.

    python -m twostroke.bench.gpu                               everything, in under eight minutes
    python -m twostroke.bench.gpu --only steps --models llama-2-7b
    python -m twostroke.bench.gpu --merge first.json second.json

Results are saved after each section, so a run that is cut off keeps what it has; later runs, and
--merge, put sections of several runs into one report. The last line of standard output is one JSON
object; people read the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from twostroke.bench.gpu.results import Run, load, save
from twostroke.bench.gpu.schedule import ALL, Choice, describe_plan, plan_visits
from twostroke.bench.gpu.workloads import FAKE_MODELS, MODELS
from twostroke.bench.main import get_commit, say
from twostroke.bench.workloads import choose
from twostroke.errors import TwostrokeError

RESULTS, REPORT, PICTURE = "results.json", "results.md", "results.png"


def main() -> None:
    """Run the benchmark from the command line; exit 1 when it cannot be run."""
    try:
        run(parse_arguments(sys.argv[1:]))
    except TwostrokeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises InvalidParameter for unknown sections and models."""
    parser = argparse.ArgumentParser(
        prog="python -m twostroke.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", default="all", help=f"sections, of {', '.join(ALL)}; the ceilings come always")
    add("--models", default="all", help=f"of {', '.join(model.name for model in MODELS)}")
    add("--out", type=Path, default=Path("docs/gpu"), help="folder for results and report")
    add("--budget", type=float, default=470.0, help="seconds that the whole run may take")
    add("--trace", type=Path, help="an Azure or Mooncake trace for the served requests' lengths")
    add("--merge", type=Path, nargs="+", metavar="FILE", help="report on these, measure nothing")
    add("--keep", action="store_true", help="add to the results in --out in place of them")
    add("--commit", default="", help="the commit measured, where git cannot tell")
    add("--fake", action="store_true", help="tiny models on the CPU, in Triton's interpreter")
    options = parser.parse_args(arguments)
    known = FAKE_MODELS if options.fake else MODELS
    options.models = choose(options.models, tuple(model.name for model in known), "models")
    options.only = choose(options.only, ALL, "only")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure what was asked for and report. Raises TwostrokeError."""
    if options.merge:
        runs = [one for path in options.merge for one in load(path)]
        report(runs, options.out)
        return
    path = options.out / RESULTS
    earlier = load(path) if options.keep and path.exists() else []
    if options.fake:
        # Read by Triton when a kernel is defined, so before any module with kernels is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    choice = Choice(options.only, options.models, options.budget, options.fake, options.trace)
    for line in describe_plan(plan_visits(choice), options.budget):
        say(line)
    from twostroke.bench.gpu.drive import measure

    def keep(one: Run) -> None:
        save([*earlier, one], path)

    about = describe_run(options.commit or get_commit())
    found = measure(choice, about, keep, say)
    report([*earlier, found], options.out)


def describe_run(commit: str) -> dict[str, object]:
    """What a run is of: commit, command, versions."""
    import torch
    import triton

    return {
        "commit": commit,
        "command": sys.argv[1:],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def report(runs: Sequence[Run], folder: Path) -> None:
    """Write JSON, tables and picture into `folder`, and one JSON object to standard output."""
    from twostroke.bench.gpu.bars import judge
    from twostroke.bench.gpu.fit import find_device, fit, list_points
    from twostroke.bench.gpu.plot import draw
    from twostroke.bench.gpu.report import list_steps, write_report

    device = next((found for one in runs if (found := find_device(one.ceilings.card))), None)
    fitted = None if device is None else fit(list_points(runs), device)
    verdicts = judge(runs, fitted)
    text = write_report(runs, verdicts, fitted)
    save(runs, folder / RESULTS)
    (folder / REPORT).write_text(text, encoding="utf-8")
    draw(list_steps(runs, fitted), folder / PICTURE, runs[-1].ceilings.card)
    say(text)
    summary = {
        "ceilings": [one.ceilings.describe() for one in runs],
        "bars": [verdict.describe() for verdict in verdicts],
        "plan": None if fitted is None else fitted.describe(),
        "missing": {what: why for one in runs for what, why in one.missing.items()},
        "seconds": [one.seconds for one in runs],
        "results": str(folder / RESULTS),
    }
    print(json.dumps(summary))
