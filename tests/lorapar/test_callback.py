"""Frozen means bit-identical, through both TRL trainers, whichever optimiser runs."""

import copy

import datasets
import pytest
import torch
from conftest import DEVICE, make_lora, make_tiny_model
from safetensors.torch import load_file, save_file

from lorapar.callback import LoraParCallback
from lorapar.config import PartitionSettings
from lorapar.errors import UserError
from lorapar.partitioning import adapter_parameters, make_partition
from lorapar.patch import accelerate
from lorapar_kernels import MaskedAdamW
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate

trl = pytest.importorskip("trl")

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "weight_decay": 0.1,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "logging_steps": 1,
}


def partition_for(model, theta=0.6):
    torch.manual_seed(2)
    scores = [{n: torch.rand(p.shape) for n, p in adapter_parameters(model).items()} for _ in "12"]
    return make_partition(*scores, PartitionSettings(theta, 0.5, 0.5))


def sft_trainer(model, tokenizer, folder, **changes):
    rows = [{"input_ids": [1, 5 + i, 9, 2], "labels": [-100, 5 + i, 9, 2]} for i in range(8)]
    settings = {"per_device_train_batch_size": 2, "max_steps": 5, **COMMON, **changes}
    args = trl.SFTConfig(output_dir=str(folder), **settings)
    return trl.SFTTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )


def grpo_trainer(model, tokenizer, folder, **changes):
    def reward(completion_ids, **columns):
        return [float(sum(ids) % 7) for ids in completion_ids]

    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 3,
        "beta": 0.04,  # with a reference adapter, whose toggling resets requires_grad
        **COMMON,
        **changes,
    }
    args = trl.GRPOConfig(output_dir=str(folder), **settings)
    rows = datasets.Dataset.from_list([{"prompt": "Question: 2\nAnswer:"}] * 8)
    return trl.GRPOTrainer(model, reward, args=args, train_dataset=rows, processing_class=tokenizer)


TRAINERS = {"sft": sft_trainer, "rl": grpo_trainer}


def train(stage, tokenizer, folder, attach, resume=None, **changes):
    """Values before and after, the masks, and the trainer."""
    model = make_lora(make_tiny_model())
    partition = partition_for(model)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    trainer = TRAINERS[stage](model, tokenizer, folder, **changes)
    callback = LoraParCallback(partition, stage=stage)
    if attach:
        callback.attach(trainer)
    else:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    after = {n: p.detach() for n, p in adapter_parameters(model).items()}
    return before, after, partition.masks(stage), trainer


def assert_frozen_and_trained(before, after, masks):
    for name, mask in masks.items():
        assert 0 < mask.sum() < mask.numel()
        same = before[name].view(torch.int32) == after[name].view(torch.int32)
        assert same[~mask].all(), name
    moved = sum(int((before[n] != after[n])[m].sum()) for n, m in masks.items())
    assert moved > 0.9 * sum(int(m.sum()) for m in masks.values())


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_frozen_elements_keep_their_bits_under_weight_decay(stage, attach, tokenizer, tmp_path):
    before, after, masks, trainer = train(stage, tokenizer, tmp_path, attach)
    assert_frozen_and_trained(before, after, masks)
    assert isinstance(trainer.optimizer.optimizer, MaskedAdamW) == attach
    share = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    logged = [e["active_share"] for e in trainer.state.log_history if "loss" in e]
    assert logged and logged[0] == pytest.approx(share, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_two_hundred_steps(stage, attach, tokenizer, tmp_path):
    before, after, masks, trainer = train(stage, tokenizer, tmp_path, attach, max_steps=200)
    assert trainer.state.global_step == 200
    assert_frozen_and_trained(before, after, masks)


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_other_optimisers_leave_them_too(optim, tokenizer, tmp_path):
    before, after, masks, trainer = train("sft", tokenizer, tmp_path, True, optim=optim)
    assert_frozen_and_trained(before, after, masks)
    assert not isinstance(trainer.optimizer.optimizer, MaskedAdamW)


@pytest.mark.parametrize("served", [True, False])
def test_clipping_sees_the_trainable_part_only(served, tokenizer, tmp_path):
    """Whether our backward masks the gradient, or a layer is left to PEFT."""
    model = make_lora(make_tiny_model())
    if not served:
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda *a: None)
        assert not accelerate(model).served
    partition, twin = partition_for(model), copy.deepcopy(model)
    trainer = sft_trainer(model, tokenizer, tmp_path, max_steps=1)
    LoraParCallback(partition, "sft").attach(trainer)
    seen, compute_loss = [], trainer.compute_loss
    trainer.compute_loss = lambda m, inputs, **k: (
        seen.append(dict(inputs)) or compute_loss(m, inputs, **k)
    )
    trainer.train()
    (batch,) = seen
    twin(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    grads = {n: p.grad for n, p in adapter_parameters(twin).items()}
    norm = sum(g[partition.sft[n]].square().sum() for n, g in grads.items()).sqrt()
    whole = sum(g.square().sum() for g in grads.values()).sqrt()
    logged = next(e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e)
    assert logged == pytest.approx(norm.item(), rel=1e-4) != pytest.approx(whole.item(), rel=1e-2)


def test_the_check_notices_a_frozen_element_that_moved(tokenizer, tmp_path):
    model = make_lora(make_tiny_model())
    partition = partition_for(model)
    trainer = sft_trainer(model, tokenizer, tmp_path, max_steps=1)
    callback = LoraParCallback(partition, "sft").attach(trainer)
    trainer.train()
    total = sum(int((~m).sum()) for m in partition.sft.values())
    assert callback.check_frozen(model) == total
    name, p = next(iter(adapter_parameters(model).items()))
    with torch.no_grad():
        p[~partition.sft[name]] += 1e-7
    with pytest.raises(UserError, match=rf"frozen elements moved, in {name}"):
        callback.check_frozen(model)


def test_masks_end_with_their_stage(tokenizer, tmp_path):
    model = make_lora(make_tiny_model())
    trainer = sft_trainer(model, tokenizer, tmp_path, max_steps=1)
    partition = partition_for(model)
    LoraParCallback(partition, "sft").attach(trainer)
    trainer.train()
    model.zero_grad()
    ids = torch.tensor([[1, 5, 9, 2]])
    model(input_ids=ids, labels=ids).loss.backward()
    for name, p in adapter_parameters(model).items():
        assert p.grad[~partition.sft[name]].all(), name


def test_the_check_spans_a_resumed_run(tokenizer, tmp_path):
    """A checkpoint in which a frozen element differs from the stage's start is noticed."""
    save = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train("sft", tokenizer, tmp_path / "one", True, **save)
    checkpoint = tmp_path / "one" / "checkpoint-2"
    weights = load_file(checkpoint / "adapter_model.safetensors")
    for t in weights.values():
        t += 1e-3
    save_file(weights, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="frozen elements moved"):
        train("sft", tokenizer, tmp_path / "two", True, resume=str(checkpoint), **save)


def test_an_optimiser_of_the_users_choice_stays(tokenizer, tmp_path):
    model = make_lora(make_tiny_model())
    trainer = sft_trainer(model, tokenizer, tmp_path, max_steps=1)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    LoraParCallback(partition_for(model), "sft").attach(trainer)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


def test_norms_do_not_decay(tokenizer, tmp_path):
    """modules_to_save keeps the weight decay groups that the trainer would make."""
    model = make_lora(make_tiny_model(), modules_to_save=["norm"])
    trainer = sft_trainer(model, tokenizer, tmp_path, max_steps=1)
    LoraParCallback(partition_for(model), "sft").attach(trainer)
    trainer.train()
    groups = trainer.optimizer.optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all("norm" in name for name in groups[1]["param_names"]) and groups[1]["param_names"]


def test_a_partition_of_another_model_is_refused_at_the_start(tokenizer, tmp_path):
    partition = partition_for(make_lora(make_tiny_model(), r=2))
    trainer = sft_trainer(make_lora(make_tiny_model()), tokenizer, tmp_path)
    with pytest.raises(UserError, match="the partition is of another model or adapter"):
        LoraParCallback(partition, "sft").attach(trainer)
    trainer.add_callback(LoraParCallback(partition, "sft"))
    with pytest.raises(UserError, match="the partition is of another model or adapter"):
        trainer.train()


def test_a_partition_that_trains_nothing_is_refused(tokenizer, tmp_path):
    model = make_lora(make_tiny_model())
    trainer = sft_trainer(model, tokenizer, tmp_path)
    LoraParCallback(partition_for(model, theta=0.0), "sft").attach(trainer)
    with pytest.raises(UserError, match="leaves nothing to train"):
        trainer.train()


def test_a_resumed_run_equals_an_uninterrupted_one(tokenizer, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    _, straight, *_ = train("sft", tokenizer, tmp_path / "one", True, **save)
    checkpoint = str(tmp_path / "one" / "checkpoint-2")
    _, resumed, *_ = train("sft", tokenizer, tmp_path / "two", True, resume=checkpoint, **save)
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)


DEFAULTS = {"use_cpu": DEVICE == "cpu", "bf16": True, "gradient_checkpointing": True}


def test_two_sft_steps_with_trls_defaults(tokenizer, tmp_path):
    """fp32 base under bf16 autocast, checkpointed: losses as near to those in fp32 as PEFT's."""
    losses = []
    for number, changes in enumerate((DEFAULTS, DEFAULTS, {**DEFAULTS, "bf16": False})):
        model = make_lora(make_tiny_model(), init_std=0.2)
        if number == 0:
            assert len(accelerate(model).groups) == 4
        trainer = sft_trainer(model, tokenizer, tmp_path / str(number), max_steps=2, **changes)
        assert trainer.args.gradient_checkpointing and trainer.args.bf16 == changes["bf16"]
        seen, step = [], trainer.training_step
        trainer.training_step = lambda *a, seen=seen, step=step, **k: (
            seen.append(step(*a, **k)) or seen[-1]
        )
        trainer.train()
        losses.append(torch.stack(seen).float())
    patched, plain, exact = losses
    assert len(patched) == 2 and not torch.equal(plain, exact)
    assert_as_accurate("losses", patched, exact.double(), plain, NETWORK_FACTOR)


def test_grpo_steps_with_trls_defaults(tokenizer, tmp_path):
    """Rollouts outside autocast, a reference adapter, checkpointed steps under bf16 autocast."""
    model = make_lora(make_tiny_model(), lora_dropout=0.05)
    assert len(accelerate(model).groups) == 4
    before = {n: p.detach().cpu().clone() for n, p in adapter_parameters(model).items()}
    trainer = grpo_trainer(model, tokenizer, tmp_path, max_steps=2, **DEFAULTS)
    trainer.train()
    after = {n: p.detach().cpu() for n, p in adapter_parameters(model).items()}
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(after[n], before[n]) for n in before)
