"""All stages of a run in order, each skipped if its files are there and still fit."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorapar import ranks
from lorapar.config import Config
from lorapar.errors import UserError
from lorapar.runs import Run, whole_file

log = logging.getLogger("lorapar")

ORDERS = (("sft", "rl"), ("rl", "sft"))


def without_masks(config: Config) -> Config:
    """The same run as plain LoRA + RL: nothing frozen, a folder of its own, the votes reused."""
    run_dir = f"{config.run_dir.rstrip('/')}-no-masks"
    votes, own = Path(config.run_dir) / "votes.jsonl", Path(run_dir) / "votes.jsonl"

    def copy() -> None:
        if votes.exists() and not own.exists():
            with whole_file(own) as temporary:
                shutil.copyfile(votes, temporary)

    ranks.first(copy)
    return dataclasses.replace(config, partition=None, run_dir=run_dir)


def validate(config: Config) -> None:
    """Finds the mistakes of every stage before the first one starts."""
    from lorapar import evaluation, labels, models, stages
    from lorapar.data import load_rows
    from lorapar.rewards import trl_rewards
    from lorapar.template import make_template

    make_template(config.template)
    trl_rewards(config.rewards, "####")
    models.lora_config(config)
    evaluation.check_settings(config)
    for stage in ("sft", "rl"):
        stages.training_arguments(config, stage)(Run(config).path(".work") / stage)
    for teacher in config.labels.teachers:
        labels.check_teacher(teacher)
    if config.data.test:
        load_rows(config.data, "test")


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
    with ranks.group():
        with ranks.together():
            if tuple(order) not in ORDERS:
                raise UserError(f"order must be sft,rl or rl,sft, got {','.join(order)}")
        return _run(config, order, progress if ranks.rank() == 0 else None, done)


def _run(
    config: Config,
    order: Sequence[str],
    progress: Any,
    done: Callable[[str, bool, dict[str, Any] | None], None],
) -> dict[str, Any]:
    from lorapar import evaluation, importance, labels, lineage, partitioning, reporting, stages

    with ranks.together():
        validate(config)
    first, second = order
    start = {first: "init", second: first}
    alone: dict[str, Callable[[], Any]] = {  # what one process does while the others wait
        "label": lambda: labels.label(config, progress=progress),
        "partition": lambda: partitioning.partition(config),
        "report": lambda: {"file": str(reporting.report(config))},
    }
    acts = {"label": lambda: ranks.first(alone["label"])}
    if config.partition is not None:
        acts["score"] = lambda: importance.score(config, progress=progress)
        acts["partition"] = lambda: ranks.first(alone["partition"])
    for name in order:
        acts[name] = lambda n=name: getattr(stages, n)(config, start=start[n], progress=progress)
    here = Run(config)

    def kept(name: str) -> bool:
        """Whether the stage's files are there and fit, or are labels of the user's own."""
        if here.record(name) is not None:
            here.check(name, *lineage.depends(config, name, start.get(name)))
            return True
        return name == "label" and any(
            here.path(f"labels.{kind}").exists() for kind in ("jsonl", "parquet")
        )

    for name, act in acts.items():
        if ranks.first(lambda n=name: kept(n)):
            done(name, True, None)
        else:
            done(name, False, act())
    results = evaluation.evaluate(config, progress=progress) if config.data.test else {}
    done("eval", False, results)
    done("report", False, ranks.first(alone["report"]))
    return results
