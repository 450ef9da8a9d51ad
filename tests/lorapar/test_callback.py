"""Frozen means bit-identical, through both TRL trainers, whichever optimiser runs."""

import copy
from collections import OrderedDict

import datasets
import masked_ranks
import pytest
import several
import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from conftest import DEVICE, make_lora, make_tiny_model
from masked_ranks import partition_for
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lorapar.callback import LoraParCallback
from lorapar.calls import call_of
from lorapar.errors import UserError
from lorapar.partitioning import adapter_parameters, base_name
from lorapar.patch import accelerate, lora_layers, route
from lorapar_kernels import MaskedAdamW
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

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


def train(
    stage, tokenizer, folder, attach, resume=None, optimiser=None, frozen="restore", **changes
):
    """Values before and after, the masks, and the trainer."""
    model = make_lora(make_tiny_model())
    partition = partition_for(model)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    trainer = TRAINERS[stage](model, tokenizer, folder, **changes)
    trainer.optimizer_cls_and_kwargs = optimiser
    callback = LoraParCallback(partition, stage=stage, frozen=frozen)
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
@pytest.mark.parametrize(
    "stage,attach",
    [
        ("sft", False),
        pytest.param("rl", True, marks=pytest.mark.more),
        pytest.param("sft", True, marks=pytest.mark.more),
        pytest.param("rl", False, marks=pytest.mark.more),
    ],
)
def test_two_hundred_steps(stage, attach, tokenizer, tmp_path):
    before, after, masks, trainer = train(stage, tokenizer, tmp_path, attach, max_steps=200)
    assert trainer.state.global_step == 200
    assert_frozen_and_trained(before, after, masks)


SGD = (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9})
MUON = (torch.optim.Muon, {"lr": 1e-3, "weight_decay": 0.0})
# optimiser or the trainer's name for one, weight decay, and why frozen elements would move
OTHERS = {
    "AdamW": ("adamw_torch", 0.1, "weight decay"),
    "AdamW, no decay": ("adamw_torch", 0.0, None),
    "Adafactor": ("adafactor", 0.1, "weight decay"),
    "Adafactor, no decay": ("adafactor", 0.0, None),
    "SGD": (SGD, 0.1, "weight decay"),
    "SGD, no decay": (SGD, 0.0, None),
    "Muon": (MUON, 0.1, "weight decay and the method itself"),
    "Muon, no decay": (MUON, 0.0, "the method itself"),
}


def other(name):
    """Arguments of `train` for one of OTHERS, warmed up from a rate of zero."""
    kind, decay, _ = OTHERS[name]
    chosen = {"optim": kind} if isinstance(kind, str) else {"optimiser": kind}
    return {**chosen, "weight_decay": decay, "lr_scheduler_type": "linear", "warmup_steps": 1}


def warnings_of(caplog):
    records = [r for r in caplog.records if r.name == "lorapar" and r.levelname == "WARNING"]
    return [r.getMessage() for r in records]


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimisers_leave_them_too(name, tokenizer, tmp_path, caplog):
    before, after, masks, trainer = train("sft", tokenizer, tmp_path, False, **other(name))
    assert_frozen_and_trained(before, after, masks)
    assert type(trainer.optimizer.optimizer).__name__ == name.split(",")[0]
    why, told = OTHERS[name][2], warnings_of(caplog)
    if why is None:
        assert not told
        return
    (told,) = told
    frozen = sum(int((~m).sum()) for m in masks.values())
    assert f"{name.split(',')[0]} would move {frozen} frozen elements: {why}" in told
    assert "they are put back after each step" in told and "attach(trainer)" in told
    assert ("may see the whole matrix" in told) == ("method" in why)


@pytest.mark.parametrize("name", OTHERS)
def test_the_check_alone_tells_whether_they_moved(name, tokenizer, tmp_path, caplog):
    why = OTHERS[name][2]
    if why is None:
        before, after, masks, _ = train(
            "sft", tokenizer, tmp_path, False, frozen="check", **other(name)
        )
        assert_frozen_and_trained(before, after, masks)
        assert not warnings_of(caplog)
        return
    with pytest.raises(UserError, match='frozen elements moved, in .*frozen="restore"'):
        train("sft", tokenizer, tmp_path, False, frozen="check", **other(name))
    (told,) = warnings_of(caplog)
    assert f": {why}" in told and 'will fail; LoraParCallback(..., frozen="restore")' in told


@pytest.mark.parametrize("frozen", ["restore", "check"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_eight_bit_adam(decay, frozen, tokenizer, tmp_path, caplog):
    """bitsandbytes through the trainer's own switch: whatever moves is told and put back."""
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 512, "num_hidden_layers": 1}  # 8 bits from 4096 elements on
    model = make_lora(make_tiny_model(**wide), r=8)
    partition = partition_for(model)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    trainer = sft_trainer(model, tokenizer, tmp_path, optim="adamw_bnb_8bit", weight_decay=decay)
    trainer.add_callback(LoraParCallback(partition, "sft", frozen=frozen))
    raised = None
    try:
        trainer.train()
    except UserError as e:
        raised = str(e)
    assert any(s["state1"].dtype == torch.uint8 for s in trainer.optimizer.optimizer.state.values())
    told = warnings_of(caplog)
    assert len(told) == 1 or (decay == 0.0 and not told)
    if frozen == "check" and told:
        assert "frozen elements moved" in raised
    else:
        assert raised is None
        after = {n: p.detach() for n, p in adapter_parameters(model).items()}
        assert_frozen_and_trained(before, after, partition.sft)


def test_masked_adamw_needs_no_warning_no_hook_and_no_copy(tokenizer, tmp_path, caplog):
    callbacks = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            callbacks.append((list(callback._kept), optimizer.optimizer._optimizer_step_post_hooks))

    model = make_lora(make_tiny_model())
    trainer = sft_trainer(model, tokenizer, tmp_path, max_steps=1)
    callback = LoraParCallback(partition_for(model), "sft").attach(trainer)
    trainer.add_callback(Look())
    trainer.train()
    assert callbacks == [([], {})] and not warnings_of(caplog)


def test_a_mode_nobody_knows_is_refused():
    partition = partition_for(make_lora(make_tiny_model()))
    with pytest.raises(UserError, match="frozen must be restore or check, got 'thaw'"):
        LoraParCallback(partition, "sft", frozen="thaw")


class Plain:
    """An optimiser that is none of torch's, and has no hooks."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params), "lr": 0.1, "weight_decay": 0.1}]

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.99).sub_(0.1 * p.grad)


class Silent(torch.optim.SGD):
    """Hooks never run, as for LOMO, whose `step` accelerate does not call."""

    def register_step_post_hook(self, hook):
        return torch.utils.hooks.RemovableHandle(OrderedDict())


@pytest.mark.parametrize("of_torch", [True, False])
def test_an_optimiser_without_step_hooks(of_torch, tokenizer, tmp_path, caplog):
    model = make_lora(make_tiny_model())
    partition = partition_for(model)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    trainer = sft_trainer(model, tokenizer, tmp_path)
    callback = LoraParCallback(partition, "sft")
    trainer.add_callback(callback)
    if of_torch:
        trainer.optimizer_cls_and_kwargs = (Silent, {"lr": 1.0, "weight_decay": 0.1})
        trainer.train()
    else:  # the trainer itself wants torch's class: its events by hand
        optimiser = Plain(p for p in model.parameters() if p.requires_grad)
        event = (trainer.args, trainer.state, trainer.control)
        callback.on_train_begin(*event, model=model, optimizer=optimiser)
        ids = torch.tensor([[1, 5, 9, 2]])
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            callback.on_optimizer_step(*event)
            model.zero_grad()
        callback.on_train_end(*event, model=model)
        (told,) = warnings_of(caplog)
        assert "could not be tried (AttributeError" in told
        assert told.endswith("weight decay is on; they are put back after each step")
    after = {n: p.detach() for n, p in adapter_parameters(model).items()}
    assert_frozen_and_trained(before, after, partition.sft)


def test_each_mask_lies_once_beside_its_parameter():
    """The served layer's own tensor, and its bits."""
    model = make_lora(make_tiny_model())
    partition = partition_for(model)
    left = model.base_model.model.model.layers[0].self_attn.q_proj
    left.lora_A["default"].register_forward_hook(lambda *a: None)  # this layer is left to PEFT
    callback = LoraParCallback(partition, "sft")
    route(model, partition, stage="sft", zeroed=True)
    masks = callback._masks_beside(model, adapter_parameters(model))
    assert all(torch.equal(masks[n], partition.sft[n]) for n in partition.sft)
    for name, layer in lora_layers(model).items():
        call = call_of(layer, torch.device("cpu"))
        assert (call is None) == (layer is left)
        if call is not None:
            assert call.mask.a is masks[f"{base_name(name)}.lora_A.weight"]
            assert call.mask.b is masks[f"{base_name(name)}.lora_B.weight"]


def test_what_no_partition_covers_is_named(tokenizer, tmp_path, caplog):
    """`lora_bias` is no element of A or B: it trains in every stage, and a warning says so."""
    model = make_lora(make_tiny_model(), lora_bias=True)
    LoraParCallback(partition_for(model), "sft").attach(trainer := sft_trainer(
        model, tokenizer, tmp_path, max_steps=1))  # fmt: skip
    trainer.train()
    assert "12 parameters that no partition covers train as well, the first of" in caplog.text
    assert "q_proj.lora_B.default.bias" in caplog.text


@pytest.mark.parametrize("attach", [True, False])
def test_deepspeed_is_refused(attach, tokenizer, tmp_path):
    model = make_lora(make_tiny_model())
    trainer = sft_trainer(model, tokenizer, tmp_path)
    callback = LoraParCallback(partition_for(model), "sft")
    with pytest.raises(UserError, match="DeepSpeed .*; use DDP or FSDP2"):
        if attach:
            trainer.is_deepspeed_enabled = True
            callback.attach(trainer)
        else:
            optimiser = object.__new__(DeepSpeedOptimizerWrapper)
            callback.on_train_begin(trainer.args, trainer.state, None, model, optimizer=optimiser)


def test_accumulated_steps_equal_one_large_batch(tokenizer, tmp_path):
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        before, after, masks, _ = train(
            "sft", tokenizer, tmp_path, True, max_steps=3, max_grad_norm=1e-2, **sizes
        )
        assert_frozen_and_trained(before, after, masks)
        results.append({n: after[n] - before[n] for n in after})
    for name, whole in results[0].items():
        assert_close(name, results[1][name], whole)


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


def test_a_step_that_the_grad_scaler_skips_leaves_no_trace():
    """Scaled, unscaled and clipped steps, one with an infinite gradient among them or not."""
    results = []
    for overflows in ((False, False), (False, True, False)):
        model = make_lora(make_tiny_model())
        accelerate(model)
        masks = partition_for(model).sft
        named = {n.replace(".default", ""): p for n, p in model.named_parameters()}
        parameters = {n: next(p for k, p in named.items() if k.endswith(n)) for n in masks}
        optimiser = MaskedAdamW(parameters.items(), masks, lr=1e-2, weight_decay=0.1)
        scaler, ids, good = torch.amp.GradScaler("cpu", init_scale=2.0**8), [[1, 5, 9, 2]], 0
        for overflow in overflows:
            batch = torch.tensor(ids) + good
            scaler.scale(model(input_ids=batch, labels=batch).loss).backward()
            if overflow:
                name, p = next(iter(parameters.items()))
                p.grad[masks[name]] = torch.inf
            before = copy.deepcopy([optimiser.state_dict(), list(parameters.values())])
            scaler.unscale_(optimiser)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.05, foreach=True)
            assert norm.isfinite() != overflow and not norm < 0.05
            scaler.step(optimiser)
            scaler.update()
            if overflow:
                now = [optimiser.state_dict(), list(parameters.values())]
                assert all(map(torch.equal, now[1], before[1]))
                for index, state in before[0]["state"].items():
                    for key, value in state.items():
                        kept = torch.as_tensor(now[0]["state"][index][key])
                        assert torch.equal(kept, torch.as_tensor(value))
            optimiser.zero_grad()
            good += not overflow
        assert scaler.get_scale() == (2.0**7 if len(overflows) == 3 else 2.0**8)
        results.append(parameters)
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What masked_ranks wrote: one process, then each of two."""
    out = tmp_path_factory.mktemp("ranks")
    masked_ranks.main(f"{out}/one")
    several.finish(several.start(masked_ranks.__file__, f"{out}/two"))
    return torch.load(f"{out}/one.0"), [torch.load(f"{out}/two.{rank}") for rank in "01"]


@pytest.mark.more
@pytest.mark.parametrize("case", masked_ranks.CASES)
def test_two_ranks_train_as_one_process_does(case, ranks):
    """Under DDP and FSDP2, with MaskedAdamW or with frozen elements put back."""
    (one, two), attached = (ranks[0][case], [rank[case] for rank in ranks[1]]), ranks[0]["attached"]
    assert_frozen_and_trained(one["before"], one["after"], one["masks"])
    total = sum(int((~m).sum()) for m in one["masks"].values())
    for rank in two:
        assert rank["wrapper"] != one["wrapper"] and rank["optimiser"] == one["optimiser"]
        assert rank["checked"] == one["checked"] == total
        assert_frozen_and_trained(rank["before"], rank["after"], one["masks"])
        norms = attached["norms"] if case == "left to PEFT" else one["norms"]
        assert_close("gradient norms", torch.tensor(rank["norms"]), torch.tensor(norms))
        for name, start in one["before"].items():
            assert torch.equal(rank["before"][name], start)
            assert torch.equal(rank["after"][name], two[0]["after"][name])
            assert_close(name, rank["after"][name] - start, one["after"][name] - start)


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


def test_a_callback_can_be_used_again(tokenizer, tmp_path):
    """Each training starts from the values that it finds."""
    model = make_lora(make_tiny_model())
    partition = partition_for(model)
    callback = LoraParCallback(partition, "sft")
    for number in range(2):
        trainer = sft_trainer(model, tokenizer, tmp_path / str(number), max_steps=2)
        trainer.add_callback(callback)
        before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
        trainer.train()
        after = {n: p.detach() for n, p in adapter_parameters(model).items()}
        assert_frozen_and_trained(before, after, partition.sft)
        with torch.no_grad():
            for p in adapter_parameters(model).values():
                p += 1.0


@pytest.mark.parametrize("optimiser", [None, (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1})])
def test_frozen_elements_are_put_back_once_a_step(optimiser, tokenizer, tmp_path, monkeypatch):
    calls, put_back = [], LoraParCallback._put_back
    monkeypatch.setattr(
        LoraParCallback, "_put_back", lambda self, *a: calls.append(0) or put_back(self, *a)
    )
    train("sft", tokenizer, tmp_path, False, optimiser=optimiser, max_steps=3)
    assert len(calls) == 3


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
