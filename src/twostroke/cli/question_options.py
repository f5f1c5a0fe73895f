"""The options of commands that plan, simulate, measure and work through files, in groups.

As in options.py: a field is an option, with its help. What is asked of a machine that need not be
there is told apart from how the engine that runs here is set.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from twostroke.cli.options import JSON_LINE, THREADS, show


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedMachineOptions:
    """What is simulated: a model, on which devices, how many times."""

    model: str | None = field(
        default=None,
        metadata=show(
            "A built-in description such as llama-2-70b, in another format as llama-2-70b:q8_0; a "
            "wrong name lists them.",
            metavar="NAME",
        ),
    )
    device: str | None = field(
        default=None,
        metadata=show(
            "A known device such as a100-80gb or a .toml file of your own. "
            "a100-80gb:captured is one whose engine replays captured kernels.",
            metavar="NAME",
        ),
    )
    tp: int = field(
        default=1, metadata=show("Devices that share one model (tensor parallelism).", least=1)
    )
    replicas: int = field(default=1, metadata=show("Engines behind the router.", least=1))
    router: str = field(
        default="least-tokens",
        metadata=show('"round-robin", "least-requests", "least-tokens" or "prefix-aware".'),
    )
    kv: str | None = field(
        default=None,
        metadata=show(
            'How keys and values are stored: "f16", "bf16", "int8", "fp8" or "f32".', default="f16"
        ),
    )
    kv_memory: str | None = field(
        default=None,
        metadata=show(
            "Size of each replica's KV pool, such as 40GiB.", default="what weights leave"
        ),
    )
    block_tokens: int = field(
        default=16, metadata=show("Tokens in a block of the KV pool.", least=1, most=1024)
    )
    step_tokens: int | None = field(
        default=None, metadata=show("Token budget of one step.", default="2048")
    )
    max_rows: int | None = field(
        default=None, metadata=show("Most sequences computed in one step.", default="256")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What comes in: a trace, a drawn workload, or one with the other's lengths."""

    trace: str | None = field(
        default=None,
        metadata=show(
            "Recorded requests: Azure CSV or Mooncake JSON lines. With --workload only its lengths "
            "are used.",
            metavar="FILE",
        ),
    )
    workload: str | None = field(
        default=None,
        metadata=show(
            "poisson, gamma (bursty) or constant arrivals; with more after a colon, as in "
            "gamma:cv=4,tenants=10,prefix=0.5.",
        ),
    )
    rate: str | None = field(
        default=None,
        metadata=show(
            'Requests a second, or "2x" for a trace twice as fast.', default="the trace's"
        ),
    )
    prompt_tokens: str | None = field(
        default=None,
        metadata=show(
            'Prompt lengths: 512, "uniform:100-900", "lognormal:512:1.5", or "0.5x" of a trace\'s.',
            default="the trace's, else 512",
        ),
    )
    new_tokens: str | None = field(
        default=None,
        metadata=show("Answer lengths, as those of prompts.", default="the trace's, else 128"),
    )
    requests: str | None = field(
        default=None,
        metadata=show(
            'How many: 1000, "600s" for those of the first 600 seconds, "3x" for a trace three '
            "times over.",
            default="the whole trace, else 1000",
        ),
    )
    faults: str | None = field(
        default=None,
        metadata=show(
            "What goes wrong, as in deaths=1,slowdowns=2,cancels=0.05; a wrong key lists them.",
            default="nothing",
        ),
    )
    seed: int = field(default=0, metadata=show("Of the drawn workload and faults.", least=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOutput:
    """What is left of a simulation."""

    output: list[str] | None = field(
        default=None,
        metadata=show(
            "Write every request (.csv, .parquet) or a picture (.png, .svg); may be given several "
            "times.",
            metavar="FILE",
        ),
    )
    json: bool = field(default=False, metadata=JSON_LINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineOptions:
    """Which steps of a model to put under which device's roof."""

    model: str | None = field(
        default=None,
        metadata=show(
            "A built-in description such as llama-2-70b, in another format as llama-2-70b:q8_0; "
            "for this machine any model that `generate` takes.",
            metavar="NAME",
        ),
    )
    device: str | None = field(
        default=None,
        metadata=show(
            'A known device such as a100-80gb, a .toml file of your own, or "this" machine.',
            metavar="NAME",
        ),
    )
    kv: str | None = field(
        default=None,
        metadata=show("How keys and values are stored, as in `simulate`.", default="f16"),
    )
    prompt_tokens: str = field(
        default="16,64,256,512,1024,4096,16384",
        metadata=show("Lengths of prompts to prefill, with commas between."),
    )
    batch: str = field(
        default="1,4,16,64,256", metadata=show("Rows of decode steps, with commas between.")
    )
    context: str = field(
        default="512,4096", metadata=show("Contexts of decode steps, with commas between.")
    )
    output: list[str] | None = field(
        default=None,
        metadata=show("Write a picture (.png, .svg); may be given several times.", metavar="FILE"),
    )
    json: bool = field(default=False, metadata=JSON_LINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is run on the real engine, for how long, and what is kept of it."""

    model: str | None = field(
        default=None,
        metadata=show(
            "As in `twostroke generate`; not needed with --replay.",
            is_argument=True,
            metavar="MODEL",
        ),
    )
    seconds: float = field(
        default=60.0,
        metadata=show("About how long the run takes where the load does not say."),
    )
    record: str | None = field(
        default=None,
        metadata=show("Write the run, input by input, to replay it later.", metavar="FILE"),
    )
    replay: str | None = field(
        default=None,
        metadata=show(
            "Run nothing: give a recording to a fresh scheduler and compare its plans.",
            metavar="FILE",
        ),
    )
    json: bool = field(default=False, metadata=JSON_LINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What is to be served, how well, and on what."""

    model: str | None = field(
        default=None,
        metadata=show(
            "A built-in description such as llama-2-70b; llama-2-70b:q4_0 plans for that format "
            "alone. For this machine any model that `generate` takes.",
            metavar="NAME",
        ),
    )
    device: list[str] | None = field(
        default=None,
        metadata=show(
            'Devices to compare, as in `simulate`, several times or with commas between; "this" '
            "plans for this machine.",
            metavar="NAME",
        ),
    )
    rate: str | None = field(
        default=None,
        metadata=show(
            'Requests a second, or "2x" for a trace twice as fast.',
            default="the trace's; of this machine what it keeps",
        ),
    )
    prompt_tokens: str | None = field(
        default=None,
        metadata=show("Prompt lengths, as in `simulate`.", default="the trace's, else 512"),
    )
    new_tokens: str | None = field(
        default=None,
        metadata=show(
            "Answer lengths, as those of prompts.",
            "--new-tokens",
            "--output-tokens",
            default="the trace's, else 128",
        ),
    )
    trace: str | None = field(
        default=None,
        metadata=show("Recorded requests, as in `simulate`.", metavar="FILE"),
    )
    ttft_target_ms: float | None = field(
        default=None,
        metadata=show(
            "Longest time to the first token, kept for 9 of 10 requests.",
            "--ttft-target-ms",
            "--ttft",
            default="none",
        ),
    )
    itl_target_ms: float | None = field(
        default=None,
        metadata=show(
            "Longest mean time between a request's tokens, kept for 9 of 10.",
            "--itl-target-ms",
            "--tpot-target-ms",
            "--tpot",
            default="none",
        ),
    )
    kv: str | None = field(
        default=None,
        metadata=show("How keys and values are stored.", default="f16 and int8 are compared"),
    )
    max_rows: int | None = field(
        default=None,
        metadata=show("Most sequences computed in one step.", default="256", least=1, most=1024),
    )
    price: float | None = field(
        default=None,
        metadata=show(
            "Dollars an hour for one device.", default="the list price in its file, if there is one"
        ),
    )
    kv_link_gbits: float = field(
        default=200.0,
        metadata=show("Link of each prefill replica to the decode pool, Gbit/s one way."),
    )
    failures: float = field(
        default=1.0, metadata=show("Failures of a replica a month, for --explain.")
    )
    check: bool = field(
        default=True,
        metadata=show(
            "Simulate the best few, or answer in closed form only.", "--check/--no-check"
        ),
    )
    explain: bool = field(
        default=False,
        metadata=show("Show each formula with its numbers, and recovery.", "--explain"),
    )
    output: list[str] | None = field(
        default=None,
        metadata=show(
            "Write cost against speed as a picture (.png, .svg); may be given several times.",
            metavar="FILE",
        ),
    )
    json: bool = field(default=False, metadata=JSON_LINE)
    seed: int = field(default=0, metadata=show("Of the drawn requests.", least=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What to answer, and where to."""

    input: str = field(
        metadata=show(
            "Requests in OpenAI's batch format, one JSON object a line.",
            is_argument=True,
            metavar="IN.JSONL",
        )
    )
    output: str = field(
        metadata=show(
            "Where answers are appended; lines that it answers already are left alone.",
            is_argument=True,
            metavar="OUT.JSONL",
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabOptions:
    """Which unit, and whether it is run or asks."""

    what: str | None = field(
        default=None,
        metadata=show(
            'A unit\'s number to run it, or "exercise" before one; without, units are listed.',
            is_argument=True,
            metavar="[N | exercise]",
        ),
    )
    unit: str | None = field(
        default=None,
        metadata=show("The unit that asks.", is_argument=True, metavar="[N]"),
    )
    answer: str | None = field(
        default=None,
        metadata=show('What you answer, with its unit, as in "3.36 GB"; needs --seed.'),
    )
    seed: int | None = field(
        default=None,
        metadata=show("Which question is drawn.", default="another each time", least=0),
    )
    model: str = field(
        default="smollm2-135m",
        metadata=show("What units on the real engine run.", metavar="NAME"),
    )
    threads: int | None = field(default=None, metadata=THREADS)
    output: list[str] | None = field(
        default=None,
        metadata=show(
            "Write the unit's picture (.png, .svg); may be given several times.", metavar="FILE"
        ),
    )
