"""The Hugging Face hub, through its own client, imported only when a model is fetched from it.

Only what serving needs is fetched: safetensors, configuration and tokenizer files, or one GGUF
file. The list of files and sizes comes first and is checked last, because the client may take
what a broken download left for the whole when the hub cannot be reached. Every way the client
can fail becomes DownloadFailed that says what to do.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twostroke.errors import DownloadFailed
from twostroke.weights.catalog import HubModel

_WANTED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE*",
)


@dataclass(frozen=True, slots=True)
class HubFiles:
    """What to fetch of a repository at one revision: (path, bytes) of each file."""

    revision: str
    files: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size in self.files)


def list_files(model: HubModel) -> HubFiles:
    """Ask the hub which files make up a model. Raises: DownloadFailed."""
    from huggingface_hub import HfApi

    name = model.repository
    with _translated(name):
        info = HfApi().model_info(name, files_metadata=True)
    found = [
        (each.rfilename, each.size or 0)
        for each in info.siblings or []
        if _is_wanted(each.rfilename, model)
    ]
    if model.file and not found:
        raise DownloadFailed(f"{name}: the repository has no file {model.file}")
    if not model.file and not any(path.endswith(".safetensors") for path, _ in found):
        hint = "for one GGUF file of it, say org/name:file.gguf"
        raise DownloadFailed(f"{name}: the repository holds no safetensors model; {hint}")
    return HubFiles(info.sha or "main", tuple(found))


def _is_wanted(path: str, model: HubModel) -> bool:
    """True for the one file asked for, else for the top folder's files that serving needs.

    A path with folders in it is never taken on the hub's word: it could lead out of ours.
    """
    if model.file:
        return path == model.file
    return "/" not in path and any(fnmatch.fnmatchcase(path, pattern) for pattern in _WANTED)


def download(model: HubModel, listed: HubFiles, folder: Path) -> None:
    """Fetch the listed files into `folder`; those already there whole are not fetched again.

    Raises: DownloadFailed; what was fetched so far stays, so a second call goes on.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # progress is reported by whoever watches `folder`
    name = model.repository
    for path, size in listed.files:
        with _translated(name):
            hf_hub_download(name, path, revision=listed.revision, local_dir=folder)
            stored = (folder / path).stat().st_size
        if stored != size:
            raise DownloadFailed(f"{name}: {path} has {stored} bytes, the hub says {size}")


@contextlib.contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn whatever the client raises into DownloadFailed."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    # The errors of the HTTP library beneath, whichever one this version of the client stands on.
    transport_error: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except hub_errors.GatedRepoError as error:
        hint = f"accept its terms at {constants.ENDPOINT}/{name} and set HF_TOKEN"
        raise DownloadFailed(f"{name}: its owner asks for consent first; {hint}") from error
    except hub_errors.RepositoryNotFoundError as error:
        hint = "check the spelling, or set HF_TOKEN if it is private"
        raise DownloadFailed(f"{name}: there is no such repository; {hint}") from error
    except (transport_error, OSError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadFailed(f"{name}: could not be fetched: {said}") from error
