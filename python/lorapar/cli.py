"""The command line: one command a stage, and `run` for all of them."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from lorapar import config as configuration
from lorapar.errors import UserError

app = typer.Typer(
    help="LoRA-PAR: label data, score an adapter, partition it, train SFT then GRPO, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

Source = Annotated[Path, typer.Argument(help="A YAML configuration, or a run folder.")]
RunDir = Annotated[Path | None, typer.Option(help="Run folder, instead of the configuration's.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over the file's, repeatable.")
]
NoMasks = Annotated[bool, typer.Option("--no-masks", help="Plain LoRA + RL: nothing is frozen.")]
From = Annotated[str | None, typer.Option("--from", help="Stage whose adapter to start from.")]


def main() -> None:
    """Runs the command line; a user's mistake ends in one line on stderr and exit code 2.

    Started by torchrun or accelerate launch, the first process speaks for all.
    """
    from lorapar import ranks

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console.quiet = ranks.launched_rank() > 0
    try:
        app(standalone_mode=True)
    except UserError as e:
        if console.quiet and e.told:
            time.sleep(1)  # a launcher ends all when one ends: the first has to have said it
        else:
            errors = Console(stderr=True, soft_wrap=True)
            errors.print(f"lorapar: {e}", markup=False, highlight=False)
        raise SystemExit(2) from None


@app.command()
def label(
    source: Source,
    run_dir: RunDir = None,
    set_: Set = None,
    no_masks: NoMasks = False,
    serve: Annotated[
        list[str] | None,
        typer.Option(help="Model of a local teacher to ask by `transformers serve`; repeatable."),
    ] = None,
) -> None:
    """Teachers vote on every row: votes.jsonl, labels.jsonl."""
    from lorapar import labels, ranks

    with _stage(source, run_dir, set_, no_masks) as (config, progress):
        summary = ranks.first(lambda: labels.label(config, progress=progress, serve=serve or ()))
    _votes(summary)


@app.command()
def votes(
    source: Source,
    run_dir: RunDir = None,
    limit: Annotated[int, typer.Option(help="How many rows.", min=0)] = 10,
    row: Annotated[
        list[str] | None, typer.Option(help="Id of a row to show in full; repeatable.")
    ] = None,
) -> None:
    """How far teachers agree, and the rows on which they do not, with what each said."""
    from lorapar.agreement import agreement_of, disagreements
    from lorapar.data import labels_file
    from lorapar.runs import Run

    config = configuration.load(source, _overrides(run_dir, None))
    here, ids = Run(config), tuple(row or ())
    path = labels_file(here)
    shown = disagreements(config, path, here.path("votes.jsonl"), limit=limit, ids=ids)
    if missing := set(ids) - {d.row.id for d in shown}:
        raise UserError(f"{path}: no row has the id {', '.join(sorted(missing))}")
    if not ids:
        _agreement(agreement_of(path))
    for found in shown:
        _disagreement(found, whole=bool(ids))


@app.command()
def export(
    source: Source,
    to: Annotated[
        Path | None, typer.Option(help="A .parquet or .jsonl file; labels.parquet of the run.")
    ] = None,
    run_dir: RunDir = None,
) -> None:
    """The labels as a file that `datasets` reads: id, question, answer, votes, system."""
    from lorapar import exporting

    path, count = exporting.export(configuration.load(source, _overrides(run_dir, None)), to)
    console.print(f"wrote {count:,} rows to {path}", soft_wrap=True, highlight=False)


@app.command()
def score(source: Source, run_dir: RunDir = None, set_: Set = None) -> None:
    """Importance of every adapter element for both systems: importance.safetensors."""
    from lorapar import importance

    with _stage(source, run_dir, set_) as (config, progress):
        summary = importance.score(config, progress=progress)
    _show("score", summary)


@app.command()
def partition(source: Source, run_dir: RunDir = None, set_: Set = None) -> None:
    """What each stage may train: partition.safetensors."""
    from lorapar import partitioning, ranks

    with _stage(source, run_dir, set_) as (config, _):
        summary = ranks.first(lambda: partitioning.partition(config))
    _show("partition", summary)


@app.command()
def sft(
    source: Source,
    run_dir: RunDir = None,
    set_: Set = None,
    no_masks: NoMasks = False,
    start: From = None,
) -> None:
    """Supervised fine-tuning on System 1: sft/."""
    from lorapar import stages

    with _stage(source, run_dir, set_, no_masks) as (config, progress):
        summary = stages.sft(config, start=start, progress=progress)
    _show("sft", summary)


@app.command()
def rl(
    source: Source,
    run_dir: RunDir = None,
    set_: Set = None,
    no_masks: NoMasks = False,
    start: From = None,
) -> None:
    """GRPO on System 2, from the SFT result: rl/."""
    from lorapar import stages

    with _stage(source, run_dir, set_, no_masks) as (config, progress):
        summary = stages.rl(config, start=start, progress=progress)
    _show("rl", summary)


@app.command("eval")
def eval_(
    source: Source,
    run_dir: RunDir = None,
    set_: Set = None,
    no_masks: NoMasks = False,
    stage: Annotated[list[str] | None, typer.Option(help="base, sft or rl; repeatable.")] = None,
) -> None:
    """Accuracy on the test rows, base and finished stages: eval.json."""
    from lorapar import evaluation

    with _stage(source, run_dir, set_, no_masks) as (config, progress):
        results = evaluation.evaluate(config, stages=stage or evaluation.STAGES, progress=progress)
    _accuracy(results)


@app.command()
def report(
    source: Source, run_dir: RunDir = None, set_: Set = None, no_masks: NoMasks = False
) -> None:
    """One self-contained page with pictures: report.html."""
    from lorapar import ranks, reporting

    with _stage(source, run_dir, set_, no_masks) as (config, _):
        path = ranks.first(lambda: reporting.report(config))
    console.print(f"wrote {path}")


@app.command()
def run(
    source: Source,
    run_dir: RunDir = None,
    set_: Set = None,
    no_masks: NoMasks = False,
    order: Annotated[str, typer.Option(help="sft,rl or rl,sft.")] = "sft,rl",
) -> None:
    """All stages; those that are done and still fit are skipped."""
    from lorapar import pipeline

    def done(name: str, skipped: bool, summary: dict[str, Any] | None) -> None:
        progress.console.print(f"[bold]{name}[/]: {'done before, kept' if skipped else 'done'}")
        if summary and name in ("label", "score", "partition", "sft", "rl"):
            summaries.append((name, summary))

    summaries: list[tuple[str, dict[str, Any]]] = []
    with _stage(source, run_dir, set_, no_masks) as (config, progress):
        results = pipeline.run(config, order=order.split(","), progress=progress, done=done)
    for name, summary in summaries:
        _votes(summary) if name == "label" else _show(name, summary)
    _accuracy(results)
    console.print(f"report: {Path(config.run_dir) / 'report.html'}")


@app.command()
def doctor() -> None:
    """What is installed, what is used, and why not."""
    from lorapar.doctor import doctor as rows

    table = Table("what", "found", "remark")
    for row in rows():
        table.add_row(*row)
    console.print(table)


@contextmanager
def _stage(
    source: Path, run_dir: Path | None, overrides: list[str] | None, no_masks: bool = False
) -> Iterator[tuple[configuration.Config, Any]]:
    """The configuration, and progress bars for as long as the stage runs."""
    from lorapar import ranks

    with ranks.group():
        with ranks.together():
            config = configuration.load(source, _overrides(run_dir, overrides))
        _quiet()
        from lorapar.pipeline import without_masks
        from lorapar.progress import bars

        if no_masks:
            config = without_masks(config)
        with bars(console) as progress:
            yield config, progress


def _overrides(run_dir: Path | None, given: list[str] | None) -> dict[str, Any]:
    overrides = dict(configuration.parse_override(o) for o in given or [])
    return overrides | ({} if run_dir is None else {"run_dir": str(run_dir)})


def _quiet() -> None:
    """Our log lines through rich, the libraries' warnings only where they matter."""
    import datasets
    import transformers

    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
    )
    logging.getLogger("lorapar").setLevel(logging.ERROR if console.quiet else logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    datasets.disable_progress_bars()


def _show(name: str, summary: dict[str, Any]) -> None:
    table = Table("", "", title=f"lorapar {name}", show_header=False, title_justify="left")
    for key, value in _flat(summary):
        table.add_row(key, value)
    console.print(table)


def _votes(summary: dict[str, Any]) -> None:
    """Labels by system, and votes by teacher."""
    counts = "system1 {system1:,}, system2 {system2:,}, none {none:,}".format(**summary)
    columns = ("asked", "retries", "tokens", "valid", "abstained", "failed")
    table = Table("teacher", *columns, title=f"lorapar label: {counts}", title_justify="left")
    for name, cast in summary["teachers"].items():
        table.add_row(escape(name), *(f"{cast[column]:,}" for column in columns))
    console.print(table)
    if len(summary["teachers"]) > 1:
        _agreement(summary["agreement"])


def _agreement(found: Any) -> None:
    """Each teacher against the result, every two of them, and Fleiss' kappa."""
    share: Callable[[int, int], str] = lambda n, of: f"{n / of:.1%}" if of else "–"  # noqa: E731
    number: Callable[[float | None], str] = lambda k: "–" if k is None else f"{k:.3f}"  # noqa: E731
    alike, several = found.unanimous()
    title = (
        f"agreement: Fleiss' kappa {number(found.fleiss_kappa())}, unanimous on "
        f"{share(alike, several)} of {several:,} rows"
    )
    table = Table("teachers", "alike", "of rows", "kappa", title=title, title_justify="left")
    for name in found.teachers:
        same, of = found.with_result(name)
        table.add_row(f"{escape(name)} – the result", share(same, of), f"{of:,}", "")
    table.add_section()
    for (a, b), (same, of, kappa) in found.pairs().items():
        table.add_row(f"{escape(a)} – {escape(b)}", share(same, of), f"{of:,}", number(kappa))
    console.print(table)


def _disagreement(found: Any, *, whole: bool) -> None:
    """One row with its votes; shortened unless `whole`."""

    def cut(text: str, n: int) -> str:  # control characters could move the cursor
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        return text if whole or len(text) <= n else f"{text[:n]} …"

    row, plain = found.row, {"markup": False, "highlight": False, "emoji": False}
    console.print(f"\n{row.id} → {row.system or 'none'}", style="bold", **plain)
    console.print(cut(row.question, 400), **plain)
    console.print(cut(row.answer, 200), style="dim", **plain)
    for teacher, vote, said in found.votes:
        text = cut(said if whole else " ".join(said.split()), 120)
        console.print(f"  {teacher}: {vote or 'no valid vote'}  {text}", **plain)


def _flat(summary: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in summary.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        else:
            yield (
                name,
                "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value),
            )


def _accuracy(results: dict[str, Any]) -> None:
    """Accuracy of every stage with its 95 % interval, and the gain over the base."""
    from lorapar.evaluation import gain

    if not results:
        return
    groups = [g for g in ("system1", "system2", "all") if any(g in r for r in results.values())]
    table = Table(
        "stage", *groups, title="accuracy on the test rows, 95 % interval", title_justify="left"
    )
    percent: Callable[[dict], str] = lambda r: (  # noqa: E731
        f"{r['accuracy']:.1%} ({r['low']:.1%}–{r['high']:.1%}), {r['correct']}/{r['total']}"
    )
    for stage, result in results.items():
        table.add_row(stage, *(percent(result[g]) if g in result else "" for g in groups))
    last = next((s for s in ("rl", "sft") if s in results), None)
    if last and "base" in results:
        cells = []
        for g in groups:
            mean, low, high = gain(results["base"][g], results[last][g])
            cells.append(f"{100 * mean:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")
        table.add_section()
        table.add_row(f"{last} − base", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
