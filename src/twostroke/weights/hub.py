"""The Hugging Face hub, through its own client, imported only when a model is fetched from it.

Only what serving needs is fetched: safetensors, configuration and tokenizer files, or one GGUF
file. Every way the client can fail becomes DownloadFailed that says what to do.
"""

from __future__ import annotations

from pathlib import Path

from twostroke.errors import DownloadFailed
from twostroke.weights.catalog import HubModel

_WANTED = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE*",
]


def download(model: HubModel, folder: Path) -> None:
    """Fetch a repository's files, or its one GGUF file, into `folder`.

    Raises: DownloadFailed. Files that were fetched whole stay, so a second call goes on.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub import errors as hub_errors
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # progress is reported by whoever watches `folder`
    name = model.repository
    # The errors of the HTTP library beneath, whichever one this version of the client stands on.
    transport_error: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]
    try:
        if model.file:
            hf_hub_download(name, model.file, local_dir=folder)
        else:
            snapshot_download(name, local_dir=folder, allow_patterns=_WANTED)
    except hub_errors.GatedRepoError as error:
        hint = f"accept its terms at {constants.ENDPOINT}/{name} and set HF_TOKEN"
        raise DownloadFailed(f"{name}: its owner asks for consent first; {hint}") from error
    except hub_errors.RepositoryNotFoundError as error:
        hint = "check the spelling, or set HF_TOKEN if it is private"
        raise DownloadFailed(f"{name}: there is no such repository; {hint}") from error
    except hub_errors.RemoteEntryNotFoundError as error:
        raise DownloadFailed(f"{name}: the repository has no file {model.file}") from error
    except (transport_error, OSError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadFailed(f"{name}: could not be fetched: {said}") from error
    if not model.file and not any(folder.glob("*.safetensors")):
        hint = "for one GGUF file of it, say org/name:file.gguf"
        raise DownloadFailed(f"{name}: the repository holds no safetensors model; {hint}")
