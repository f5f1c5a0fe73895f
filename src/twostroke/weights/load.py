"""Opens a model: a GGUF file or a Hugging Face folder, behind one face.

Opening reads headers only and maps the weights; it never loads half a model. The vocabulary is
built on first use. Nothing is copied: tensors are views on the mapped file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from twostroke.errors import ModelError, UnknownModel, UnsupportedModel
from twostroke.spec.vocabulary import Vocabulary
from twostroke.weights.tensor import HostTensor

if TYPE_CHECKING:
    from twostroke.weights.gguf_model import GGUFModel
    from twostroke.weights.safetensors_model import SafetensorsModel

    ModelSource = GGUFModel | SafetensorsModel

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class OpenModel:
    """A model whose facts are known and whose weights are mapped.

    path: what was opened. spec: its facts. identities: the weight files. file_bytes: their size.
    unused_bytes: tensor bytes in them the model does not need (a tied head's copy, a vision tower),
    so that spec.weight_bytes + unused_bytes is every tensor byte stored.
    """

    def __init__(self, path: Path, source: ModelSource) -> None:
        self.path = path
        self.spec = source.spec
        self.identities = source.identities
        self.file_bytes = source.file_bytes
        self.unused_bytes = source.unused_bytes
        self._source: ModelSource | None = source
        self._vocabulary: Vocabulary | None = None

    @property
    def tensors(self) -> Mapping[str, HostTensor]:
        """Every tensor of `spec.tensors()` by canonical name, in forward order."""
        return MappingProxyType(self._get_source().tensors)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's data, built on first use. Raises: CorruptModel, UnsupportedModel."""
        if self._vocabulary is None:
            self._vocabulary = self._get_source().read_vocabulary()
        return self._vocabulary

    def close(self) -> None:
        """Let go of the file. It stays mapped while an array that views it is alive."""
        self._source = None

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _get_source(self) -> ModelSource:
        if self._source is None:
            raise ModelError(f"{self.path}: the model has been closed")
        return self._source


def open_model(path: Path) -> OpenModel:
    """Open a .gguf file or a Hugging Face folder.

    Raises: UnknownModel if there is nothing there, CorruptModel for a truncated or lying file,
    UnsupportedModel for anything this engine does not implement; the message names what.
    """
    path = Path(path)
    try:
        return OpenModel(path, _read_source(path))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnknownModel(f"{path}: cannot be read: {reason}") from error


def _read_source(path: Path) -> ModelSource:
    """Let the reader of the path's format read it; only that reader is imported."""
    if path.is_dir():
        from twostroke.weights.safetensors_model import read_safetensors_model

        return read_safetensors_model(path)
    if not path.exists():
        raise UnknownModel(f"{path}: there is no such file or folder")
    if path.suffix in _PICKLED:
        hint = "pickled weights can run code when read; convert them to safetensors or GGUF"
        raise UnsupportedModel(f"{path}: {hint}")
    if path.suffix == ".safetensors":
        hint = "give the folder that holds it, with its config.json"
        raise UnsupportedModel(f"{path}: weights alone do not describe a model; {hint}")
    if not path.is_file():
        raise UnsupportedModel(f"{path}: neither a regular file nor a folder")
    from twostroke.weights.gguf_model import read_gguf_model

    return read_gguf_model(path)
