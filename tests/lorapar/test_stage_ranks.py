"""Stages on two processes are those of one: the same adapter, whoever stops and goes on."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import launched
import pytest
import stage_ranks
import torch
from conftest import ARITHMETIC, beyond
from safetensors.torch import load_file
from several import ended, finish, torchrun
from test_pipeline import write_config

from lorapar import config as configuration
from lorapar import importance, labels, models, partitioning, stages
from lorapar.errors import UserError
from lorapar.partitioning import Partition, base_name
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

pytestmark = pytest.mark.slow
if 0 < torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs, or none", allow_module_level=True)

STARTS = 60  # seconds in which two processes start on a busy machine
COMMON = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.1,
    "bf16": False,
}


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory):
    """A run of one process: partition, SFT and RL."""
    folder = tmp_path_factory.mktemp("launch")
    changes = {
        "adapter": {"r": 2, "lora_dropout": 0.0},
        "sft": {**COMMON, "max_steps": 5, "save_steps": 2},
        "rl": {**COMMON, "per_device_train_batch_size": 8, "max_steps": 2, "num_generations": 4,
               "max_completion_length": 12},
        "rewards": ["stage_ranks.reward"],
    }  # fmt: skip
    config = configuration.load(write_config(folder, tiny_folder, **changes))
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "device_count", lambda: 1)  # else transformers would use all of them
    for owner, name in (
        (stage_ranks.trl.GRPOTrainer, "_generate_single_turn"),
        (models, "base_dtype"),
    ):
        patch.setattr(owner, name, getattr(owner, name))  # the cases change them
    stage_ranks.in_fp32()
    labels.label(config)
    importance.score(config)
    partitioning.partition(config)
    shutil.copytree(config.run_dir, folder / "scored")
    stage_ranks.both(config)
    yield config
    patch.undo()


def case(base, name: str, run: str | None = None):
    """The configuration of a case, beside `base`, with a scored run of its own."""
    folder = Path(base.run_dir).parent
    config = dataclasses.replace(base, run_dir=str(folder / (run or name) / "run"))
    (folder / f"{name}.yaml").write_text(config.to_yaml())
    if run is None:
        shutil.copytree(folder / "scored", config.run_dir)
    return config


def adapter(config, stage: str) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run_dir) / stage / "adapter_model.safetensors")


def check(base, config, *done: str) -> None:
    """The stages' adapters and losses are those of one process; what is frozen kept its bits."""
    partition = Partition.load(Path(config.run_dir) / "partition.safetensors")
    for stage, start in zip(done, ("init", "sft")):
        got, expected = adapter(config, stage), adapter(base, stage)
        before, masks = adapter(config, start), partition.masks(stage)
        assert got.keys() == expected.keys()
        for name, t in got.items():
            frozen = ~masks[base_name(name)]
            assert torch.equal(t[frozen], before[name][frozen]), f"{stage}: frozen {name}"
            moved = expected[name] - adapter(base, start)[name]
            assert bool(moved.any()) == (not frozen.all())
            assert_close(f"{stage}: {name}", t - before[name], moved)
        (said, losses), (known, expected) = (recorded(c, stage) for c in (config, base))
        assert said == known
        assert_close(f"{stage}: norms", losses["grad_norm"], expected["grad_norm"])
        assert_close(f"{stage}: losses", 1 + losses["loss"], 1 + expected["loss"])  # some are 0
    assert not (Path(config.run_dir) / ".work").exists()


def recorded(config, stage: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a stage's summary counts, and its losses and norms by step."""
    folder = Path(config.run_dir) / stage
    summary = json.loads((folder / "summary.json").read_text())
    history = json.loads((folder / "log_history.json").read_text())
    values = {k: torch.tensor([e[k] for e in history if k in e]) for k in ("loss", "grad_norm")}
    return {k: v for k, v in summary.items() if k not in ("loss", "reward")}, values


def losses(config, dtype: torch.dtype) -> torch.Tensor:
    """Of the SFT stage in one process, by step."""
    models.base_dtype = lambda: dtype
    stages.sft(config)
    stage_ranks.in_fp32()
    return recorded(config, "sft")[1]["loss"].to(dtype)


@pytest.fixture(scope="module")
def long(base):
    """The arithmetic example's model: SFT in one process, and configurations for two."""
    folder = Path(base.run_dir).parent / "long"
    folder.mkdir()
    changes = {
        "data": {"train": str(ARITHMETIC / "train.jsonl"), "train_rows": 400},
        "adapter": {"lora_dropout": 0.0},
        "sft": {**COMMON, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 50},
    }
    config = configuration.load(write_config(folder, ARITHMETIC / "base", **changes))
    labels.label(config)
    importance.score(config)
    partitioning.partition(config)
    shutil.copytree(config.run_dir, folder / "scored")
    found = {torch.float32: losses(config, torch.float32)}
    shutil.rmtree(Path(config.run_dir) / "sft")
    found[torch.float64] = losses(config, torch.float64)
    more = dataclasses.replace(config, sft={**config.sft, "max_steps": 200})
    configs = {name: case(more, name) for name in stage_ranks.LONG}
    finish([torchrun(2, stage_ranks.__file__, folder, *configs)], 600)
    return configs, found


@pytest.mark.more
@pytest.mark.parametrize("name", stage_ranks.LONG)
def test_two_hundred_steps_with_weight_decay(name, long):
    """50 losses by the tolerance rule; each rank compared all frozen elements at the end."""
    configs, found = long
    said, values = recorded(configs[name], "sft")
    assert said["steps"] == 200 and said["frozen_elements_checked"] > 50_000
    exact, one = found[torch.float64], found[torch.float32]
    assert_as_accurate(f"{name}: loss", values["loss"][:50], exact, one, NETWORK_FACTOR)
    folder = Path(configs[name].run_dir).parent.parent
    assert all(torch.load(folder / f"{name}.{r}")["sft"] == torch.load(folder / f"{name}.0")["sft"]
               for r in range(2))  # fmt: skip
    partition = Partition.load(Path(configs[name].run_dir) / "partition.safetensors")
    after, before = adapter(configs[name], "sft"), adapter(configs[name], "init")
    for n, t in after.items():
        frozen = ~partition.sft[base_name(n)]
        assert torch.equal(t[frozen], before[n][frozen])
        assert not torch.equal(t, before[n])


@pytest.fixture(scope="module")
def two(base):
    """All cases of two processes in one start, then those that go on with one."""
    own = ("fsdp, alone", "fsdp, generated", "fsdp, dropped")
    configs = {name: case(base, name) for name in stage_ranks.CASES if name not in own}
    ends = {"eos_token_id": list(range(0, 1024, 6))}  # completions of 1 to 12 tokens
    rl = {**base.rl, "generation_kwargs": ends, "max_steps": 3}
    configs["fsdp, generated"] = case(dataclasses.replace(base, rl=rl), "fsdp, generated")
    columns = dataclasses.replace(
        base.partition, theta=0.4, granularity="column", drop_unselected=True
    )
    for name in ("dropped", "fsdp, dropped"):
        configs[name] = case(dataclasses.replace(base, partition=columns), name)
        (Path(configs[name].run_dir) / "partition.safetensors").unlink()
        partitioning.partition(configs[name])
    stages.sft(configs["dropped"])
    configs["fsdp, alone"] = case(base, "fsdp, alone", "fsdp, to go on alone")
    folder = Path(base.run_dir).parent
    stage_ranks.stopped(configs["ddp, resumed"])  # by one process
    shutil.copytree(Path(base.run_dir) / "sft", folder / "sft")
    both = [name for name in stage_ranks.CASES if name != "fsdp, alone"]
    finish([torchrun(2, stage_ranks.__file__, folder, *both)], 300)
    with pytest.raises(UserError, match="was written by a start with FSDP .* without; start with"):
        stages.sft(configs["fsdp, alone"])
    finish([torchrun(1, stage_ranks.__file__, folder, "fsdp, alone")], 300)
    stages.sft(configs["ddp, stopped"])
    return configs


@pytest.mark.parametrize(
    "name", [n for n in stage_ranks.CASES if "generated" not in n and "dropped" not in n]
)
def test_stages_on_two_processes(name, base, two):
    """DDP and FSDP 2, stopped and resumed, from one process to two, from two to one."""
    check(base, two[name], *(("sft", "rl") if name in ("ddp", "fsdp") else ("sft",)))
    folder = Path(base.run_dir).parent
    if not name.endswith(("alone", "stopped")) or name == "fsdp, stopped":
        one, other = (torch.load(folder / f"{name}.{rank}") for rank in range(2))
        assert one == other


def test_dropped_columns_under_fsdp(two):
    """The loss before and after is measured on a model of its own, sharded."""
    one, other = (recorded(two[name], "sft")[0] for name in ("dropped", "fsdp, dropped"))
    assert one["dropped_columns"] > 0
    for key in ("loss_before_drop", "loss_after_drop"):
        assert_close(key, *(torch.tensor(said.pop(key)) for said in (one, other)))
    assert one == other
    start = adapter(two["dropped"], "init")
    for name, t in adapter(two["fsdp, dropped"], "sft").items():
        assert_close(name, t - start[name], adapter(two["dropped"], "sft")[name] - start[name])


def test_completions_that_end_at_different_lengths_on_the_ranks(base, two):
    """A rank whose completions are done goes on until the others' are: all gather the weights."""
    folder = Path(base.run_dir).parent
    one, other = (torch.load(folder / f"fsdp, generated.{rank}")["longest"] for rank in range(2))
    assert len(one) == 3 and one != other


@pytest.mark.parametrize("name", beyond(["fsdp"], ["ddp", "fsdp"]))
def test_a_killed_process_ends_the_run_and_it_resumes(name, base):
    """Soon, with a line that says what to do; the same command goes on from the checkpoint."""
    spread = {"ddp": {}, "fsdp": stage_ranks.FSDP}[name]
    config = case(base, f"killed, {name}")
    command = (launched.__file__, "sft", Path(base.run_dir).parent / f"killed, {name}.yaml")
    start = time.monotonic()
    process = torchrun(2, *command, FP32="1", DIE=f"1:{stage_ranks.STOP}", **spread)
    (said,) = ended([process], 300)
    assert process.returncode == 1 and time.monotonic() - start < 60 + STARTS, said
    assert said.count("another process of this run ended; the same command goes on") == 1, said
    assert "lorapar sft" not in said
    (said,) = finish([torchrun(2, *command, FP32="1", **spread)], 300)
    assert said.count("lorapar sft") == 1, said
    check(base, config, "sft")
