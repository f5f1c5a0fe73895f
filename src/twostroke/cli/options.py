"""The options of the commands, as frozen groups that commands share.

A command is a function of such groups. An option is written once, as a field with its help and its
names, and read by two: `arguments.py` reads ordinary command lines without any library, `app.py`
shows the fields to typer, which helps with and complains about all others.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Shown:
    """How a field is presented. names: of an option, else `--` and the field's; `a/--b` sets a flag
    or clears it. default: in words, where the value does not say it."""

    help: str
    names: tuple[str, ...] = ()
    is_argument: bool = False
    metavar: str | None = None
    default: str | None = None
    least: int | None = None
    most: int | None = None


def show(help: str, *names: str, **shown: Any) -> dict[str, Shown]:
    """The metadata of a field that is an option or an argument; see Shown."""
    return {"shown": Shown(help, names, **shown)}


# Options that stand in groups of several commands, each written once.
THREADS = show("Threads that compute.", default="physical cores", least=1)
CLIENT_KEY = show("Key of a server that asks for one.", default="none")
JSON_LINE = show("Print one JSON object as the last line.", "--json")
JSON_FOR_TABLES = show("Print one JSON object instead of tables.", "--json")


def get_shown(which: Field[Any]) -> Shown:
    """How a field of a group is presented."""
    shown: Shown = which.metadata["shown"]
    return shown


def get_names(which: Field[Any]) -> tuple[str, ...]:
    """The names of an option as it is presented."""
    return get_shown(which).names or ("--" + which.name.replace("_", "-"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOption:
    """Which model."""

    model: str = field(
        metadata=show(
            "A known name (see `twostroke models`), org/name from the Hugging Face hub, a "
            ".gguf file or a Hugging Face folder.",
            is_argument=True,
            metavar="MODEL",
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """On what it runs."""

    device: str = field(
        default="auto",
        metadata=show(
            '"cpu", "cuda", or "cuda:1" for the second GPU; "auto" takes a GPU where one can be '
            "used and nothing of the CPU is asked for.",
            metavar="DEVICE",
        ),
    )
    exact: bool = field(
        default=False,
        metadata=show(
            "On a GPU too, let a request's tokens not depend on who shares its steps; slower.",
            "--exact",
        ),
    )
    threads: int | None = field(
        default=None, metadata=show("Threads that compute on the CPU.", default="physical cores")
    )
    backend: str | None = field(
        default=None,
        metadata=show(
            'On the CPU: "cpu" (native kernels) or "reference" (NumPy, slow, reads like paper).',
            default="cpu",
        ),
    )
    kv: str | None = field(
        default=None,
        metadata=show(
            'How keys and values are stored: "f16", "int8" (half of it, less exact) or "f32"; on a '
            'GPU also "bf16" and "fp8".',
            default="f16; of the reference f32; on a GPU that of the activations",
        ),
    )
    weights: str | None = field(
        default=None,
        metadata=show(
            'On a GPU, make weights stored as floats "int8" or "int4": less memory, less exact.',
            default="as they are stored",
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is drawn, and when to stop."""

    max_tokens: int = field(default=512, metadata=show("Most new tokens.", "--max-tokens", "-n"))
    temperature: float = field(
        default=0.0,
        metadata=show("0 is greedy: the same answer every time.", "--temperature", "-t"),
    )
    top_k: int = field(default=0, metadata=show("Draw from the k most likely tokens; 0 is off."))
    top_p: float = field(
        default=1.0, metadata=show("Draw from the likeliest tokens that sum to p; 1 is off.")
    )
    min_p: float = field(
        default=0.0, metadata=show("Drop tokens below this share of the likeliest; 0 is off.")
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=show("Above 1 makes tokens that were used less likely; 1 is off."),
    )
    seed: int | None = field(default=None, metadata=show("Of the draws.", default="a fresh one"))
    stop: list[str] | None = field(
        default=None,
        metadata=show("End before this text; may be given several times.", metavar="TEXT"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """What to generate from, and how to show it."""

    prompt: str | None = field(
        default=None, metadata=show("The prompt; else standard input is read.", "--prompt", "-p")
    )
    chat: bool | None = field(
        default=None,
        metadata=show(
            "Put the prompt through the model's chat template, or take it as it is.",
            "--chat/--raw",
            default="--chat where the model has a template",
        ),
    )
    json: bool = field(
        default=False,
        metadata=show("Print one JSON object instead of streaming text.", "--json"),
    )
    verbose: bool = field(
        default=False,
        metadata=show("Show the settings and why they were chosen.", "--verbose", "-v"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """What to take apart."""

    prompt_tokens: int = field(
        default=512,
        metadata=show("Length of the prompt, and so the depth of the decode.", least=1),
    )
    new_tokens: int = field(
        default=64,
        metadata=show("Decode steps to take the mean of.", "--new-tokens", "--steps", least=4),
    )
    requests: int = field(
        default=1,
        metadata=show("Equal requests at once.", "--requests", "--batch", least=1, most=64),
    )
    json: bool = field(default=False, metadata=JSON_FOR_TABLES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where to listen, and how much to take on."""

    host: str = field(default="127.0.0.1", metadata=show("Address to listen on."))
    port: int = field(default=8000, metadata=show("Port; 0 takes any.", least=0, most=65535))
    durable: bool = field(
        default=True,
        metadata=show(
            "Keep streams and responses on disk, so that after any end of the server the next one "
            "goes on with them.",
            "--durable/--no-durable",
        ),
    )
    max_rows: int | None = field(
        default=None,
        metadata=show("Most sequences computed in one step.", default="64; on a GPU 256"),
    )
    kv_memory: str | None = field(
        default=None,
        metadata=show(
            "Size of the KV pool, such as 512MiB.",
            default="what the rows can fill, at most a quarter of available memory; on a GPU what "
            "weights and buffers leave",
        ),
    )
    step_tokens: int | None = field(
        default=None, metadata=show("Token budget of one step.", default="512; on a GPU 2048")
    )
    api_key: str | None = field(
        default=None,
        metadata=show(
            "A key that every request but those to /health must present.",
            metavar="KEY",
            default="none: everybody is let in",
        ),
    )
    key_file: str | None = field(
        default=None,
        metadata=show(
            "Keys of several tenants, hashed, one a line; `twostroke key` makes them.",
            metavar="FILE",
        ),
    )
    drafts: bool = field(
        default=False,
        metadata=show(
            "Guess tokens from the text so far and verify them: the same answers.", "--drafts"
        ),
    )
    host_memory: str | None = field(
        default=None,
        metadata=show(
            "Memory beside the KV pool for preempted sequences, such as 1GiB.",
            default="none: they are computed again",
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyOptions:
    """Whose key to make."""

    name: str = field(
        metadata=show(
            "The tenant that the key names: 1 to 64 of A-Z a-z 0-9 . _ -",
            is_argument=True,
            metavar="NAME",
        )
    )
    rate: int | None = field(
        default=None,
        metadata=show("Most requests a minute.", least=1, most=999_999_999, default="no limit"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingOptions:
    """How the scheduler chooses, and what it is asked to keep."""

    policy: str = field(
        default="first-come",
        metadata=show(
            'Who goes first: "first-come", "priority", "shortest", "fair" or "deadline".'
        ),
    )
    pace: str | None = field(
        default=None,
        metadata=show(
            'How much of the prompts a step takes: "fixed", "load", "target" or "static".',
            default="target where there is a target between tokens, else fixed",
        ),
    )
    ttft_target_ms: float | None = field(
        default=None, metadata=show("Longest time to the first token.", default="none")
    )
    itl_target_ms: float | None = field(
        default=None,
        metadata=show(
            "Longest time between tokens.", "--itl-target-ms", "--tpot-target-ms", default="none"
        ),
    )
