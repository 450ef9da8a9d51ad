"""Progress bars: one style for everything longer than a second."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def bars(console: Console) -> Progress:
    """A rich progress display; on a console that is no terminal it prints its last state only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def counter(progress: Progress | None, description: str, total: int) -> Callable[[int], None]:
    """A function that moves a new bar on by so many; does nothing without `progress`."""
    if progress is None:
        return lambda n: None
    task = progress.add_task(description, total=total, note="")
    return lambda n: progress.advance(task, n)
