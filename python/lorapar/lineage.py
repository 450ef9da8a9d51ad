"""Whether the files that a stage builds on still fit the configuration, all the way up."""

from collections.abc import Callable

from lorapar import importance, labels, partitioning, stages
from lorapar.config import Config
from lorapar.runs import Run

DEPENDS: dict[str, Callable[[Config], tuple[dict, dict[str, str]]]] = {
    "label": labels.settings_and_inputs,
    "score": importance.settings_and_inputs,
    "partition": partitioning.settings_and_inputs,
}


def depends(config: Config, stage: str, start: str | None = None) -> tuple[dict, dict[str, str]]:
    """Settings and inputs of a stage, as its record has them; `start` for sft and rl."""
    if stage in DEPENDS:
        return DEPENDS[stage](config)
    return stages.settings_and_inputs(config, stage, start or _start(config, stage))


def check(config: Config, stage: str, start: str | None = None) -> None:
    """Raises UserError for the first stage above `stage` whose files do not fit.

    A labels.jsonl without a record is the user's own and is taken as it is.
    """
    run = Run(config)
    above = {"label": [], "score": ["label"], "partition": ["score"]}.get(stage)
    if above is None:
        above = ["label", "partition" if config.partition is not None else None, start]
    for name in above:
        if name in (None, "init") or run.record(name) is None:
            continue
        check(config, name, None if name in DEPENDS else _start(config, name))
        run.check(name, *depends(config, name))


def _start(config: Config, stage: str) -> str:
    record = Run(config).record(stage) or {"settings": {}}
    return record["settings"].get("start", stages.START[stage])
