"""`twostroke pull` and `twostroke models`: fetching models, and what there is."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn
from rich.table import Table

from twostroke.cli.settings import format_bytes
from twostroke.weights.catalog import (
    CATALOG,
    ListedModel,
    NotPulled,
    Unreadable,
    get_cache_dir,
    get_catalog_path,
    list_models,
)
from twostroke.weights.pull import pull


def run_pull(name: str) -> None:
    """Fetch a model, naming its licence first. Raises UnknownModel, DownloadFailed."""
    if name not in CATALOG and Path(name).exists():
        print(f"{name} is a path: it is used where it lies", file=sys.stderr)
        return
    if name in CATALOG and not get_catalog_path(CATALOG[name]).is_file():
        licence = CATALOG[name].licence
        print(f"{name} comes under the {licence.name}: {licence.url}", file=sys.stderr)
    with PullProgress(Console(stderr=True)) as progress:
        path = pull(name, progress.report)
    print(f"{name}: {path}")


def run_models() -> None:
    """Print the table of models."""
    # Piped on, the table takes the room it needs: there is no terminal whose width would count.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    listed = list_models()
    console.print(build_models_table(listed))
    for model in listed:
        if isinstance(model.state, Unreadable):
            console.print(f"{model.name} cannot be served: {model.state.problem}", markup=False)
    console.print(f"in {get_cache_dir()}", markup=False, highlight=False)


def build_models_table(listed: list[ListedModel]) -> Table:
    """One row for each model: what it takes on disk and in memory."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for column in ("file", "weights", "KV of 1,000 tokens", "weights + KV of full context"):
        table.add_column(column, justify="right")
    table.add_column("formats")
    table.add_column("licence")
    for model in listed:
        table.add_row(model.name, *_describe_state(model), model.licence)
    return table


def _describe_state(model: ListedModel) -> tuple[str, str, str, str, str]:
    state = model.state
    if isinstance(state, NotPulled):
        return "", "", "", "", f"not here: {format_bytes(state.download_bytes)} to fetch"
    if isinstance(state, Unreadable):
        return "", "", "", "", "cannot be served, see below"
    return (
        format_bytes(state.file_bytes),
        format_bytes(state.weight_bytes),
        format_bytes(1000 * state.kv_bytes_per_token),
        f"{format_bytes(state.full_context_bytes)} at {state.context_tokens:,}",
        state.formats,
    )


class PullProgress:
    """A bar for each stage of a pull; where there is no terminal, one line for each stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console
        )
        self._stages: dict[str, TaskID] = {}
        self._guard = threading.Lock()

    def report(self, what: str, done: int, total: int) -> None:
        """How far a stage has come, in bytes; total is 0 where nobody knows. From any thread."""
        with self._guard:
            if what not in self._stages:
                self._stages[what] = self._bars.add_task(what, total=total or None)
                if not self._console.is_terminal:
                    self._console.print(what, markup=False, highlight=False)
            self._bars.update(self._stages[what], completed=done)

    def __enter__(self) -> PullProgress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()
