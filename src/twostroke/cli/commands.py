"""The commands by name, and what each exits with.

Each command's work is in the module of its own name, imported when it runs: no engine, tokenizer or
server library may be imported here, so that `--help` and errors come at once. Here also is the one
place where an error becomes an exit code: 2 for what the caller must change, 1 for everything else
that is ours to report, 130 after Ctrl-C, 141 when nobody reads the output any more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twostroke.cli.insight_options import AblateOptions, AdviseOptions, ExplainOptions
from twostroke.cli.options import (
    GenerateOptions,
    KeyOptions,
    MachineOptions,
    ModelOption,
    ProfileOptions,
    SamplingOptions,
    SchedulingOptions,
    ServeOptions,
)
from twostroke.cli.question_options import (
    BatchOptions,
    BenchOptions,
    LabOptions,
    LoadOptions,
    PlanOptions,
    RooflineOptions,
    SimulatedMachineOptions,
    SimulationOutput,
)
from twostroke.errors import InvalidRequest, TwostrokeError, UnknownModel


@dataclass(frozen=True, slots=True)
class Command:
    """A command: `run` takes one value of each group of options, and its docstring is the help."""

    run: Callable[..., None]
    groups: tuple[type[Any], ...]


def pull(model: ModelOption) -> None:
    """Fetch a model into the cache and check it."""
    from twostroke.cli.models import run_pull

    run_pull(model.model)


def models() -> None:
    """List models and what each costs in memory."""
    from twostroke.cli.models import run_models

    run_models()


def generate(
    model: ModelOption, generation: GenerateOptions, sampling: SamplingOptions, on: MachineOptions
) -> None:
    """Answer one prompt and show both strokes."""
    from twostroke.cli.generate import run_generate

    run_generate(model.model, generation, sampling, on)


def chat(model: ModelOption, sampling: SamplingOptions, on: MachineOptions) -> None:
    """Talk with a model."""
    from twostroke.cli.chat import run_chat

    run_chat(model.model, sampling, on)


def profile(model: ModelOption, profiling: ProfileOptions, on: MachineOptions) -> None:
    """Show where a prefill's and a decode step's time goes, op by op."""
    from twostroke.cli.profile import run_profile

    run_profile(model.model, profiling, on)


def calibrate(model: ModelOption, on: MachineOptions) -> None:
    """Measure what steps cost on this machine, for scheduling and simulation."""
    from twostroke.cli.calibrate import run_calibrate

    run_calibrate(model.model, on)


def bench(
    what: BenchOptions, load: LoadOptions, scheduling: SchedulingOptions, on: MachineOptions
) -> None:
    """Run a load on the real engine, and show beside it what the simulator predicts."""
    from twostroke.cli.bench import run_bench

    run_bench(what, load, scheduling, on)


def serve(
    model: ModelOption, serving: ServeOptions, scheduling: SchedulingOptions, on: MachineOptions
) -> None:
    """Serve a model over an OpenAI-compatible API."""
    from twostroke.cli.serve import run_serve

    run_serve(model.model, serving, scheduling, on)


def simulate(
    machine: SimulatedMachineOptions,
    load: LoadOptions,
    scheduling: SchedulingOptions,
    output: SimulationOutput,
) -> None:
    """Show what requests would experience on other hardware, with the scheduler that serves."""
    from twostroke.cli.simulate import run_simulate

    run_simulate(machine, load, scheduling, output)


def key(options: KeyOptions) -> None:
    """Make a key: its line for `serve --key-file` goes to stdout, the key itself to stderr."""
    from twostroke.cli.keys import run_key

    run_key(options)


def roofline(options: RooflineOptions) -> None:
    """Show what bounds a model's strokes on a device, and how long they take."""
    from twostroke.cli.roofline import run_roofline

    run_roofline(options)


def plan(options: PlanOptions) -> None:
    """Say which devices, how many and in which pools, keep what is asked, and what they cost."""
    from twostroke.cli.plan import run_plan

    run_plan(options)


def explain(options: ExplainOptions, on: MachineOptions) -> None:
    """Show where the time of one request went, beside the least it could have taken."""
    from twostroke.cli.explain import run_explain

    run_explain(options, on)


def batch(files: BatchOptions, on: MachineOptions) -> None:
    """Answer a file of requests, each line once; begun again, it goes on."""
    from twostroke.cli.batch import run_batch_file

    run_batch_file(files, on)


def ablate(options: AblateOptions) -> None:
    """Measure what each technique buys on this machine: the same load with it and without."""
    from twostroke.cli.ablate import run_ablate

    run_ablate(options)


def advise(options: AdviseOptions) -> None:
    """Say which change would help a running server most, and by how much."""
    from twostroke.cli.advise import run_advise

    run_advise(options)


def lab(options: LabOptions) -> None:
    """Learn what the engine does: eleven experiments with their pictures, and exercises."""
    from twostroke.cli.lab import run_lab

    run_lab(options)


COMMANDS = {
    "batch": Command(batch, (BatchOptions, MachineOptions)),
    "pull": Command(pull, (ModelOption,)),
    "models": Command(models, ()),
    "generate": Command(generate, (ModelOption, GenerateOptions, SamplingOptions, MachineOptions)),
    "chat": Command(chat, (ModelOption, SamplingOptions, MachineOptions)),
    "profile": Command(profile, (ModelOption, ProfileOptions, MachineOptions)),
    "calibrate": Command(calibrate, (ModelOption, MachineOptions)),
    "bench": Command(bench, (BenchOptions, LoadOptions, SchedulingOptions, MachineOptions)),
    "serve": Command(serve, (ModelOption, ServeOptions, SchedulingOptions, MachineOptions)),
    "ablate": Command(ablate, (AblateOptions,)),
    "advise": Command(advise, (AdviseOptions,)),
    "explain": Command(explain, (ExplainOptions, MachineOptions)),
    "key": Command(key, (KeyOptions,)),
    "lab": Command(lab, (LabOptions,)),
    "plan": Command(plan, (PlanOptions,)),
    "roofline": Command(roofline, (RooflineOptions,)),
    "simulate": Command(
        simulate, (SimulatedMachineOptions, LoadOptions, SchedulingOptions, SimulationOutput)
    ),
}


def run_with_code(run: Callable[[], None]) -> int:
    """Run a command; returns its exit code. Errors are told on standard error."""
    try:
        run()
        sys.stdout.flush()
    except TwostrokeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidRequest | UnknownModel) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes standard output once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
