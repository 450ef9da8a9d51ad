"""All stages of a run in order, each skipped if its files are there and still fit."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorapar.config import Config
from lorapar.errors import UserError
from lorapar.runs import Run

log = logging.getLogger("lorapar")

ORDERS = (("sft", "rl"), ("rl", "sft"))


def without_masks(config: Config) -> Config:
    """The same run as plain LoRA + RL: nothing frozen, a folder of its own, the votes reused."""
    run_dir = f"{config.run_dir.rstrip('/')}-no-masks"
    votes, own = Path(config.run_dir) / "votes.jsonl", Path(run_dir) / "votes.jsonl"
    if votes.exists() and not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(votes, own)
    return dataclasses.replace(config, partition=None, run_dir=run_dir)


def run(
    config: Config,
    *,
    order: Sequence[str] = ("sft", "rl"),
    progress: Any = None,
    done: Callable[[str, bool, dict[str, Any] | None], None] = lambda *a: None,
) -> dict[str, Any]:
    """label, score, partition, the two training stages, eval, report.

    A stage whose outputs exist and fit its inputs and settings is skipped, so a killed run goes on
    where it stopped. One whose outputs do not fit is not overwritten: the error says why.

    Args:
        config: the run; `partition=None` skips scoring and partition.
        order: ("sft", "rl"), or ("rl", "sft") for that baseline.
        progress: a rich `Progress`, or None.
        done: called after each stage with its name, whether it was skipped, and its summary.

    Returns:
        eval.json's content.
    """
    from lorapar import evaluation, importance, labels, partitioning, reporting, stages

    if tuple(order) not in ORDERS:
        raise UserError(f"order must be sft,rl or rl,sft, got {','.join(order)}")
    first, second = order
    start = {first: "init", second: first}
    steps: list[tuple[str, Callable[[], tuple], Callable[[], dict]]] = [
        ("label", lambda: labels.settings_and_inputs(config),
         lambda: labels.label(config, progress=progress)),
    ]  # fmt: skip
    if config.partition is not None:
        steps += [
            ("score", lambda: importance.settings_and_inputs(config),
             lambda: importance.score(config, progress=progress)),
            ("partition", lambda: partitioning.settings_and_inputs(config),
             lambda: partitioning.partition(config)),
        ]  # fmt: skip
    for name in order:
        steps.append(
            (name, lambda n=name: stages.settings_and_inputs(config, n, start[n]),
             lambda n=name: getattr(stages, n)(config, start=start[n], progress=progress))
        )  # fmt: skip
    here = Run(config)
    for name, depends, act in steps:
        if here.record(name) is not None:
            here.check(name, *depends())
            done(name, True, None)
        else:
            done(name, False, act())
    results = evaluation.evaluate(config, progress=progress) if config.data.test else {}
    done("eval", False, results)
    done("report", False, {"file": str(reporting.report(config))})
    return results
