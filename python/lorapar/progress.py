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
from transformers import TrainerCallback


def bars(console: Console) -> Progress:
    """A rich progress display; on a console that is no terminal it prints its last state only."""
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=28),
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


class TrainerProgress(TrainerCallback):
    """A trainer's steps as one bar, with the last loss and reward beside it."""

    def __init__(self, progress: Progress, description: str):
        self.progress, self.description, self.task = progress, description, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.progress.add_task(
            self.description, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {k: logs[k] for k in ("loss", "reward") if k in (logs or {})}
        if self.task is not None and shown:
            note = "  ".join(f"{k} {float(v):.3f}" for k, v in shown.items())
            self.progress.update(self.task, note=note)
