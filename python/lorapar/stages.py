"""The two training stages, through TRL's own trainers: adapter folder in, adapter folder out."""

import json
import logging
import shutil
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import utils as accelerate_utils
from rich.progress import Progress
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lorapar import ranks
from lorapar.callback import LoraParCallback
from lorapar.config import Config
from lorapar.data import Row, labels_file, load_labels, rows_of
from lorapar.defaults import RL_DEFAULTS, SFT_DEFAULTS
from lorapar.errors import UserError, check_keys
from lorapar.initialization import (
    adapter_digest,
    ensure_initial,
    initial_digest,
    initial_settings,
    save_adapter,
    trainable_rank,
    whole_adapter,
)
from lorapar.models import load_adapter, load_tokenizer
from lorapar.partitioning import Partition, everything
from lorapar.patch import accelerate
from lorapar.rewards import trl_rewards
from lorapar.runs import Run, digest, file_digest, whole_folder
from lorapar.sharding import shard_base
from lorapar.template import Template, make_template

log = logging.getLogger("lorapar")

SYSTEM = {"sft": "system1", "rl": "system2"}
START = {"sft": "init", "rl": "sft"}
_NO_EFFECT = ("logging_steps", "save_steps", "save_total_limit", "report_to", "disable_tqdm")
_OURS = {"rl": {"max_prompt_length"}, "sft": set()}
_RESERVED = ("output_dir", "resume_from_checkpoint", "seed")


def sft(config: Config, *, start: str | None = None, progress: Any = None) -> dict[str, Any]:
    """Supervised fine-tuning on System 1 with the System 1 mask → `sft/`.

    Started by torchrun or accelerate launch, the processes train together: each step takes the rows
    that it takes in one process, `per_device_train_batch_size` × `gradient_accumulation_steps`.

    Args:
        config: the run.
        start: the stage whose adapter to start from, `init` (default) or `rl`.
        progress: a rich `Progress`, or None.

    Returns:
        A summary: rows used and dropped, steps, active share, final loss.

    Raises:
        UserError: a missing or stale input, no System 1 rows, an unknown key in `sft`, a step that
            the processes cannot share equally, another process that is gone.
    """
    return _train(config, "sft", start or START["sft"], progress)


def rl(config: Config, *, start: str | None = None, progress: Any = None) -> dict[str, Any]:
    """GRPO on System 2 with the System 2 mask, from the SFT result → `rl/`.

    As `sft`; start is `sft` (default) or `init`.
    """
    return _train(config, "rl", start or START["rl"], progress)


def settings_and_inputs(config: Config, stage: str, start: str) -> tuple[dict, dict[str, str]]:
    """What a stage depends on. UserError for an input that is missing."""
    run = Run(config)
    settings = {
        **initial_settings(config),
        stage: {k: v for k, v in getattr(config, stage).items() if k not in _NO_EFFECT},
        "template": config.template,
        "select": config.data.select,
        "masks": config.partition is not None,
        "start": start,
    }
    if stage == "rl":
        settings["rewards"] = config.rewards
    labels = labels_file(run)
    inputs = {labels.name: file_digest(labels)}
    if config.partition is not None:
        path = run.need("partition.safetensors", "partition")
        inputs["partition.safetensors"] = file_digest(path)
    if start == "init":
        inputs[start] = initial_digest(config)
    else:
        inputs[start] = adapter_digest(run.need(start, start))
    return settings, inputs


def _train(config: Config, stage: str, start: str, progress: Any) -> dict[str, Any]:
    with ranks.group():
        return _train_together(config, stage, start, progress if ranks.rank() == 0 else None)


def _train_together(config: Config, stage: str, start: str, progress: Any) -> dict[str, Any]:
    from lorapar import lineage

    with ranks.together():
        run, template = Run(config), make_template(config.template)
        arguments = training_arguments(config, stage)
        labels_file(run)
    if start == "init" and config.partition is None:
        ranks.first(partial(ensure_initial, config))
    with ranks.together():
        lineage.check(config, stage, start)
        settings, inputs = settings_and_inputs(config, stage, start)
        rows = _rows(config, stage)
    work = ranks.first(partial(_work_folder, run, stage, settings, inputs))
    checkpoint = ranks.first(partial(last_checkpoint, work))
    with ranks.together():
        tokenizer = load_tokenizer(config)
        dataset, dropped = _dataset(config, stage, rows, template, tokenizer)
        torch.manual_seed(config.seed)
        model = load_adapter(config, run.path(start), trainable=True)
        callback, dropping = None, {}
        masked = config.partition is not None or trainable_rank(config) is not None
        if masked or ranks.sharded():  # under FSDP it averages what is left out of the shards
            callback = LoraParCallback(_partition(config, model), stage)
    if callback is not None and start == "init" and "live" in callback.partition.meta:
        folder = run.path(start)
        dropping = _drop(config, folder, model, callback.partition, rows, template, tokenizer)
    with ranks.together():
        trainer = _trainer(config, stage, model, arguments(work), dataset, tokenizer, template)
        accelerate(trainer.model)
        if callback is not None:
            callback.attach(trainer)
    if progress is not None or ranks.rank() > 0:
        for default in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(default)
    if progress is not None:
        trainer.add_callback(TrainerProgress(progress, stage))
    if ranks.world() > 1:  # else rows of different ranks would have the same dropout
        accelerate_utils.set_seed(config.seed, device_specific=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    counts = {"rows": len(dataset), "dropped": dropped, **dropping}
    summary = _save(run, stage, trainer, callback, counts)

    def finish() -> None:
        run.finish(stage, settings, inputs, [stage])
        shutil.rmtree(work)
        if not any(work.parent.iterdir()):
            work.parent.rmdir()

    ranks.first(finish)
    return summary


def training_arguments(config: Config, stage: str):
    """A function from output folder to TRL's configuration; unknown keys are refused here."""
    cls, defaults = {"sft": (SFTConfig, SFT_DEFAULTS), "rl": (GRPOConfig, RL_DEFAULTS)}[stage]
    given = getattr(config, stage)
    check_keys(stage, given, {*cls.__dataclass_fields__, *_OURS[stage]})
    for key in _RESERVED:
        if key in given:
            raise UserError(f"{stage}.{key} is set by the run (run_dir, seed); remove it")
    values = {
        "logging_steps": 1,
        "report_to": "none",
        "save_total_limit": 1,
        "remove_unused_columns": False,
        "data_seed": config.seed,  # one order of rows, however many processes there are
    }
    values |= {k: v for k, v in {**defaults, **given}.items() if k not in _OURS[stage]}
    if not torch.cuda.is_available():
        values = {"use_cpu": True, "bf16": False} | values
    if stage == "rl":
        values = {"reward_weights": trl_rewards(config.rewards, "####")[1]} | values

    def make(folder: Path):
        shared = shared_step(stage, values, ranks.world())
        try:
            return cls(output_dir=str(folder), seed=config.seed, **(values | shared))
        except (ValueError, TypeError) as e:
            raise UserError(
                f"{stage}: {cls.__name__} refuses it: {str(e).splitlines()[0]}"
            ) from None

    return make


def shared_step(stage: str, values: dict[str, Any], world: int) -> dict[str, Any]:
    """The arguments with which `world` processes take together the rows of one process's step.

    Args:
        stage: `sft` or `rl`, for messages.
        values: arguments of TRL's configuration, for one process.
        world: how many processes there are.

    Raises:
        UserError: the rows of a step, or of a generation, cannot be shared equally.
    """
    if world == 1:
        return {}
    batch = values.get("per_device_train_batch_size", 8)
    steps = values.get("gradient_accumulation_steps", 1)
    share, left = divmod(batch * steps, world)
    if left:
        raise UserError(
            f"{stage}: a step takes per_device_train_batch_size {batch} × "
            f"gradient_accumulation_steps {steps} = {batch * steps} rows, which {world} processes "
            f"cannot share equally; make it a multiple of {world}, or start another number of them"
        )
    mine = max(n for n in range(1, min(batch, share) + 1) if share % n == 0)
    shared = {"per_device_train_batch_size": mine, "gradient_accumulation_steps": share // mine}
    if "ddp_find_unused_parameters" not in values:  # all have a gradient, if of zeros
        shared["ddp_find_unused_parameters"] = False
    if values.get("steps_per_generation") is not None:
        made = batch * values["steps_per_generation"]
        if made % (mine * world):
            raise UserError(
                f"{stage}: {made} completions are made at a time (steps_per_generation), which "
                f"{world} processes cannot share in batches of {mine}; make it a multiple of "
                f"{mine * world}"
            )
        shared["steps_per_generation"] = made // (mine * world)
    return shared


def _rows(config: Config, stage: str) -> list[Row]:
    path = labels_file(Run(config))
    rows = load_labels(path)
    return rows if config.data.select == "all" else rows_of(rows, SYSTEM[stage], path)


def _dataset(
    config: Config, stage: str, rows: Sequence[Row], template: Template, tokenizer: Any
) -> tuple[datasets.Dataset, int]:
    """Rows in the trainer's form, without those that are too long; and how many those were.

    SFT gets tokens, so that nothing is tokenised another way; GRPO gets prompts, and its own
    tokenisation is the template's (tests/lorapar/test_template.py compares them).
    """
    made = []
    limit = {**SFT_DEFAULTS, **config.sft}["max_length"]
    longest = {**RL_DEFAULTS, **config.rl}["max_prompt_length"]
    for row in rows:
        prompt = template.prompt_ids(tokenizer, row.question)
        if stage == "rl":
            if longest is None or len(prompt) <= longest:
                made.append({"prompt": template.prompt_of(row.question), "answer": row.answer})
            continue
        completion = template.completion_ids(tokenizer, row.answer)
        if limit is None or len(prompt) + len(completion) <= limit:
            labels = [-100] * len(prompt) + completion
            made.append({"input_ids": prompt + completion, "labels": labels})
    dropped = len(rows) - len(made)
    if not made:
        key = "rl.max_prompt_length" if stage == "rl" else "sft.max_length"
        raise UserError(f"{stage}: all {len(rows)} rows are longer than {key}; raise it")
    if dropped and ranks.rank() == 0:
        log.warning("%s: %d of %d rows are too long and were dropped", stage, dropped, len(rows))
    return datasets.Dataset.from_list(made), dropped


def _partition(config: Config, model: torch.nn.Module) -> Partition:
    if config.partition is None:
        return everything(model, trainable_rank(config))
    return Partition.load(Run(config).path("partition.safetensors"))


def _drop(
    config: Config,
    folder: Path,
    model: torch.nn.Module,
    partition: Partition,
    rows: Sequence[Row],
    template: Template,
    tokenizer: Any,
) -> dict[str, Any]:
    """Drops the unselected columns and says what that does to the loss on scoring rows."""
    from lorapar.dropping import drop_columns, mean_loss
    from lorapar.importance import encode

    examples = encode(list(rows)[: config.score.examples], template, tokenizer, model)
    measured = model
    if ranks.sharded():  # the model to train is not yet where it can run
        measured = load_adapter(config, folder)
        shard_base(measured)
    before = mean_loss(measured, examples, tokenizer, config.score.batch_size)
    dropped = drop_columns(measured, partition)
    after = mean_loss(measured, examples, tokenizer, config.score.batch_size)
    if measured is not model:
        drop_columns(model, partition)
    if ranks.rank() == 0:
        log.info("dropped %d rank columns: loss %.4f before, %.4f after", dropped, before, after)
    return {"dropped_columns": dropped, "loss_before_drop": before, "loss_after_drop": after}


def _trainer(
    config: Config,
    stage: str,
    model: torch.nn.Module,
    arguments: Any,
    dataset: datasets.Dataset,
    tokenizer: Any,
    template: Template,
) -> Trainer:
    options = {
        "model": model,
        "args": arguments,
        "train_dataset": dataset,
        "processing_class": tokenizer,
    }
    try:
        if stage == "sft":
            return SFTTrainer(**options)
        functions, _ = trl_rewards(config.rewards, template.marker)
        return GRPOTrainer(reward_funcs=functions, **options)
    except ValueError as e:
        raise UserError(f"{stage}: TRL refuses the configuration: {e}") from None


def _work_folder(run: Run, stage: str, settings: dict, inputs: dict[str, str]) -> Path:
    """Where checkpoints go; those of other settings or inputs are thrown away."""
    work = run.path(".work") / stage
    mark, key = work / "made_from", digest([settings, inputs])
    if work.exists() and (not mark.exists() or mark.read_text() != key):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(key)
    return work


def last_checkpoint(work: Path) -> str | None:
    """The newest whole checkpoint; those that a kill left half-written are removed.

    transformers writes trainer_state.json last.

    Raises:
        UserError: FSDP wrote it and this start has none, or the other way round.
    """
    for file in work.glob("checkpoint-*/rng_state*.pth"):
        if not zipfile.is_zipfile(file):  # another process was killed while it wrote this one
            file.unlink()
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            log.warning("%s is half-written and is removed", folder)
            shutil.rmtree(folder)
    newest = get_last_checkpoint(str(work))
    if newest is not None:
        by_fsdp = any(Path(newest).glob("pytorch_model_fsdp*"))
        if by_fsdp != ranks.sharded():
            how = ("with", "without") if by_fsdp else ("without", "with")
            raise UserError(
                f"{newest} was written by a start {how[0]} FSDP and cannot go on {how[1]}; start "
                f"{how[0]} FSDP, on any number of GPUs, or delete {work} to begin the stage anew"
            )
    return newest


def _save(
    run: Run,
    stage: str,
    trainer: Trainer,
    callback: LoraParCallback | None,
    counts: dict[str, Any],
) -> dict[str, Any]:
    """The adapter, the trainer's log and a summary, in the stage's folder; a copy in adapter/."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "reward" in entry]
    total = sum(p.numel() for n, p in model.named_parameters() if ".default." in n)
    summary = {
        **counts,
        "steps": trainer.state.global_step,
        "active_share": callback.active_share if callback else 1.0,
        "adapter_elements": total,
        "frozen_elements_checked": callback.check_frozen(model) if callback else 0,
        "loss": history[-1].get("loss") if history else None,
        "reward": history[-1].get("reward") if history else None,
    }
    whole = whole_adapter(model)

    def write() -> None:
        for name in (stage, "adapter"):
            with whole_folder(run.path(name)) as folder:
                save_adapter(model, folder, whole)
                if name == stage:
                    (folder / "log_history.json").write_text(json.dumps(history, indent=1))
                    (folder / "summary.json").write_text(json.dumps(summary, indent=1))

    ranks.first(write)
    return summary


class TrainerProgress(TrainerCallback):
    """A trainer's steps as one bar, with the last reward, or loss, beside it."""

    def __init__(self, progress: Progress, description: str):
        self.progress, self.description, self.task = progress, description, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.progress.add_task(
            self.description, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        name = "reward" if "reward" in (logs or {}) else "loss"
        if self.task is not None and name in (logs or {}):
            self.progress.update(self.task, note=f"{name} {float(logs[name]):.3f}")
