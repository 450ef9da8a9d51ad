"""Compiled layers under TRL's trainers and `LoraParCallback`."""

from types import SimpleNamespace

import pytest
import torch
from against_peft import run
from compiled_net import breaks, graphs, llama, shapes_of
from conftest import DEVICE, beyond, make_lora, make_tiny_model
from masked_ranks import partition_for

from lorapar.callback import LoraParCallback
from lorapar.compiling import compilation_of
from lorapar.patch import accelerate
from lorapar_kernels.testing import assert_close

pytest_plugins = "compiled_net"
pytestmark = pytest.mark.usefixtures("fresh")


def train(make, compile, buckets=None):
    from lorapar.buckets import BucketCollator

    torch.manual_seed(0)
    trainer = make()
    if buckets:
        trainer.data_collator = BucketCollator(trainer.data_collator, buckets)
    report = accelerate(trainer.model, compile=compile)
    trainer.train()
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    clock = ("runtime", "per_second", "time", "memory", "flos")
    logs = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if not any(word in key for word in clock):
                logs.setdefault(key, []).append(float(value))
    return report, weights, {key: torch.tensor(values) for key, values in logs.items()}


def assert_same_training(one, other):
    (_, weights, logs), (_, weights0, logs0) = one, other
    assert logs.keys() == logs0.keys() and "loss" in logs
    for key, values in logs0.items():
        assert_close(key, logs[key], values)
    assert weights.keys() == weights0.keys()
    for name, values in weights0.items():
        assert_close(name, weights[name], values)


COMMON = {"use_cpu": DEVICE == "cpu", "bf16": False, "report_to": "none", "save_strategy": "no",
          "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.2, "max_steps": 3,
          "lr_scheduler_type": "constant", "logging_steps": 1}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", beyond([False], [False, True]))
def test_sft(checkpointing, traced, tokenizer, tmp_path):
    import datasets
    import trl

    rows = [{"text": f"Question: {i}\nAnswer:" + f" {i} +" * (6 * i % 11)} for i in range(6)]

    def make():
        return trl.SFTTrainer(
            make_lora(make_tiny_model()),
            trl.SFTConfig(str(tmp_path), **COMMON, per_device_train_batch_size=2,
                          gradient_checkpointing=checkpointing),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip

    compiled, plain = train(make, "default", [12, 24]), train(make, None, [12, 24])
    assert_same_training(compiled, plain)
    compilation = compiled[0].compilation
    assert len(compilation.shapes) == 2 and {s[:2] for s in compilation.shapes} == {
        (2, 12),
        (2, 24),
    }
    assert sum(compilation.shapes.values()) >= 2 * 3
    assert not compilation.eager and breaks() == 0 and 0 < graphs() <= 4


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", beyond([True], [False, True]))
def test_grpo(checkpointing, traced, tokenizer, tmp_path):
    """Scoring and updates are compiled, rollouts are not."""
    import datasets
    import trl

    seen = []

    def reward(completion_ids, **columns):
        seen.append(completion_ids)
        return [float(sum(ids) % 7) for ids in completion_ids]

    def make():
        seen.append("begin")
        rows = [{"prompt": f"Question: {i}\nAnswer:" + " 1 +" * i} for i in range(4)]
        return trl.GRPOTrainer(
            make_lora(make_tiny_model()),
            reward,
            args=trl.GRPOConfig(
                str(tmp_path), **(COMMON | {"learning_rate": 0.3, "max_steps": 4}),
                per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
                num_iterations=2, gradient_checkpointing=checkpointing, pad_to_multiple_of=32,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip

    compiled, plain = train(make, "default"), train(make, None)
    assert_same_training(compiled, plain)
    second = seen.index("begin", 1)
    assert seen[:second] == seen[second:]
    compilation = compiled[0].compilation
    assert 1 <= len(compilation.shapes) <= 2 and all(s[1] % 32 == 0 for s in compilation.shapes)
    # Two layers: four updates, and two batches that are scored.
    assert sum(compilation.shapes.values()) >= 2 * (4 + 2)
    assert all(r.startswith("a key-value cache") for r in compilation.eager)
    assert breaks() == 0 and graphs() > 0


def test_the_callback_leaves_layers_compiled(called):
    _, model = llama()
    report = accelerate(model, compile="default")
    partition = partition_for(model)
    callback = LoraParCallback(partition, stage="sft")
    state = SimpleNamespace(is_world_process_zero=True, log_history=[])
    callback.on_train_begin(None, state, None, model=model)
    assert compilation_of(model) is report.compilation
    _, g = run(model)
    for name, mask in partition.sft.items():
        got = g[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]
        assert not got[~mask.to(DEVICE)].any() and got[mask.to(DEVICE)].any(), name
    callback.on_train_end(None, state, None, model=model)
    assert compilation_of(model) is report.compilation
    assert all(g.any() for g in run(model)[1].values())
    assert shapes_of(report) == {(2, 5, 32): 4}
