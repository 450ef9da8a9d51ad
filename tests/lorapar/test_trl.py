"""TRL's trainers run patched as they run unpatched: logs, weights and completions are the same.

Every pair below is one trainer built twice from one seed, the second with `accelerate` between
building and training, as a user's script has it. A run counts which LoRA layers the kernels served
and which went to PEFT, else equality would prove nothing. SGD trains, unless a test says otherwise:
AdamW divides each element by its own size, so that rounding alone moves the smallest ones.
"""

import copy
from functools import partial

import datasets
import pytest
import torch
from conftest import beyond, make_lora, make_tiny_model
from masked_ranks import partition_for
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from lorapar import groups, served
from lorapar.callback import LoraParCallback
from lorapar.partitioning import adapter_parameters
from lorapar.patch import accelerate
from lorapar.served import Served
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

trl = pytest.importorskip("trl")
from trl.models.activation_offloading import OffloadActivations  # noqa: E402

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "optim": "sgd",
    "learning_rate": 0.2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "max_steps": 3,
}
# In the log, but of the clock or of the machine.
CLOCK = ("runtime", "per_second", "time", "memory", "flos")
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


class Count:
    """How many LoRA layers were called: served, left to PEFT, and left with adapters disabled."""

    def __init__(self):
        self.served = self.left = self.disabled = 0

    def take(self):
        taken = (self.served, self.left, self.disabled)
        self.served = self.left = self.disabled = 0
        return taken


@pytest.fixture
def count(monkeypatch) -> Count:
    counted = Count()

    def served_by(op, layers):
        def call(*args, **options):
            counted.served += layers(args)
            return op(*args, **options)

        return call

    def left_to(self, x, *args, forward=Linear.forward, **kwargs):
        if self.disable_adapters:
            counted.disabled += 1
        else:
            counted.left += 1
        return forward(self, x, *args, **kwargs)

    for name in ("lora_linear", "lora_add"):
        monkeypatch.setattr(served, name, served_by(getattr(served, name), lambda args: 1))
    group = served_by(groups.lora_linear_group, lambda args: len(args[1]))
    monkeypatch.setattr(groups, "lora_linear_group", group)
    monkeypatch.setattr(Linear, "forward", left_to)
    return counted


class Ran:
    """What a trainer leaves behind."""

    def __init__(self, trainer, calls, before):
        self.trainer = trainer
        self.served, self.left, self.disabled = calls
        self.before, self.weights = before, trained(trainer.model)
        self.history = trainer.state.log_history

    def series(self):
        """key → its values through the run."""
        found = {}
        for entry in self.history:
            for key, value in entry.items():
                if not any(word in key for word in CLOCK):
                    found.setdefault(key, []).append(float(value))
        return {key: torch.tensor(values) for key, values in found.items()}


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def run(make, count, patched, resume=None):
    torch.manual_seed(0)
    trainer = make()
    if patched:
        report = accelerate(trainer.model)
        assert len(report.served) == 12 and not report.skipped
    before = trained(trainer.model)
    count.take()
    trainer.train(resume_from_checkpoint=resume)
    return Ran(trainer, count.take(), before)


def run_both(make, count):
    """The plain run and the patched one."""
    plain, patched = run(make, count, False), run(make, count, True)
    assert plain.served == 0 and plain.left
    assert patched.left == 0 and patched.disabled == plain.disabled
    assert patched.served == plain.left
    assert not any(isinstance(m, Served) for m in plain.trainer.model.modules())
    return plain, patched


def assert_same(plain, patched, skip=None):
    series, expected = patched.series(), plain.series()
    assert series.keys() == expected.keys() and "loss" in series and "grad_norm" in series
    for key, values in expected.items():
        if not (skip and key.startswith(skip)):
            assert_close(key, series[key], values)
    assert patched.weights.keys() == plain.weights.keys()
    for name, values in plain.weights.items():
        assert_close(name, patched.weights[name], values)
        assert not torch.equal(patched.weights[name], patched.before[name]), name


# SFT ---------------------------------------------------------------------------------------------

STRINGS = [{"text": f"Question: {i} + {i}?\nAnswer:" + f" {i} +" * (i % 3) + f" {2 * i}"}
           for i in range(12)]  # fmt: skip
PAIRS = [{"prompt": f"Question: {i} + 1?\nAnswer:", "completion": f" {i} +" * (i % 3) + " 7"}
         for i in range(12)]  # fmt: skip
CHATS = [{"messages": [{"role": "user", "content": f"{i} + 1?"},
                       {"role": "assistant", "content": f"{i} +" * (i % 3) + " 7"}]}
         for i in range(12)]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def config(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS,
                          "init_lora_weights": False} | changes))  # fmt: skip


def sft(
    folder, tokenizer, rows=STRINGS, model=make_tiny_model, adapter=None, eval_rows=None, **changes
):
    def make():
        return trl.SFTTrainer(
            model(),
            trl.SFTConfig(str(folder), **(COMMON | changes)),
            train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=eval_rows and datasets.Dataset.from_list(eval_rows),
            processing_class=tokenizer,
            peft_config=adapter or config(),
        )

    return make


SFT = {
    "strings": (STRINGS, {}),
    "completion only": (PAIRS, {}),
    "whole rows": (PAIRS, {"completion_only_loss": False}),
    "conversational": (CHATS, {}),
    "assistant only": (CHATS, {"assistant_only_loss": True}),
    "packed": (STRINGS, {"packing": True, "max_length": 48}),
    "packed, wrapped": (STRINGS, {"packing": True, "packing_strategy": "wrapped",
                                  "max_length": 24}),
    "padding-free": (STRINGS, {"padding_free": True, "max_length": None}),
    "dft": (STRINGS, {"loss_type": "dft"}),
    "label smoothing": (STRINGS, {"label_smoothing_factor": 0.1}),
    "accumulation": (STRINGS, {"gradient_accumulation_steps": 2}),
    "neftune": (STRINGS, {"neftune_noise_alpha": 5.0}),
    "checkpointing": (STRINGS, {"gradient_checkpointing": True}),
    "reentrant": (STRINGS, {"gradient_checkpointing": True,
                            "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
}  # fmt: skip


OFTEN = ["completion only", "assistant only", "packed", "padding-free", "label smoothing",
         "accumulation", "checkpointing", "reentrant"]  # fmt: skip


@pytest.mark.parametrize("name", beyond(OFTEN, list(SFT)))
def test_sft(name, chat_tokenizer, tmp_path, count):
    rows, changes = SFT[name]
    plain, patched = run_both(sft(tmp_path, chat_tokenizer, rows, **changes), count)
    assert_same(plain, patched)


def test_what_the_sft_cases_claim(chat_tokenizer, tmp_path):
    """Else a case could silently test what the first one tests."""
    batches = {}
    for name in ("whole rows", "completion only", "assistant only", "conversational", "packed",
                 "padding-free", "strings"):  # fmt: skip
        rows, changes = SFT[name]
        trainer = sft(tmp_path, chat_tokenizer, rows, **changes)()
        batches[name] = next(iter(trainer.get_train_dataloader()))
    ignored = {name: int((b["labels"] == -100).sum()) for name, b in batches.items()}
    assert ignored["completion only"] > ignored["whole rows"]
    assert ignored["assistant only"] > ignored["conversational"]
    for name in ("packed", "padding-free"):  # one row, in which positions start anew
        positions = batches[name]["position_ids"]
        assert positions.shape[0] == 1 and int((positions == 0).sum()) > 1
        assert "attention_mask" not in batches[name]
    assert batches["strings"]["attention_mask"].shape[0] == 2


def test_selective_checkpointing(tokenizer, tmp_path, count):
    """TRL's `selective`, by hand: with PEFT and transformers from 5.24 on, TRL fails on its own."""
    saved = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]
    kwargs = {"use_reentrant": False,
              "context_fn": partial(create_selective_checkpoint_contexts, saved)}  # fmt: skip
    make = sft(tmp_path, tokenizer)

    def selective():
        trainer = make()
        trainer.args.gradient_checkpointing = True
        trainer.model.enable_input_require_grads()
        trainer.model.gradient_checkpointing_enable(kwargs)
        return trainer

    assert_same(*run_both(selective, count))


def test_activation_offloading(tokenizer, tmp_path, count, monkeypatch):
    """TRL's own class; on a CPU it has no streams and no pinned memory."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *a, **k: cpu)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    make, moved = sft(tmp_path, tokenizer), []

    def offloading():
        trainer = make()
        context = OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=64)
        context.update_model_params(trainer.model)
        pack = context.pack_hook
        context.pack_hook = lambda t: moved.append(pack(t)) or moved[-1]
        trainer.maybe_activation_offload_context = context
        return trainer

    assert_same(*run_both(offloading, count))
    assert moved


def test_the_fused_lm_head(tokenizer, tmp_path, count):
    """The forward that TRL binds to the base model, and the ordinary one, in one graph."""
    runs = []
    ids = torch.tensor([[1, 5, 9, 30, 7], [1, 8, 3, 2, 4]])
    for patched, dtype in ((True, torch.float32), (False, torch.float64), (False, torch.float32)):
        torch.manual_seed(0)
        model = sft(tmp_path, tokenizer)().model.to(dtype)
        if patched:
            accelerate(model)
        count.take()
        fused = model(input_ids=ids, labels=ids, fused_lm_head=True)
        assert fused.log_probs.shape == (2, 4) and "logits" not in fused
        (fused.loss + model(input_ids=ids).logits.square().mean()).backward()
        assert count.take() == ((24, 0, 0) if patched else (0, 24, 0))
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        runs.append(found | {"log-probs": fused.log_probs.detach(), "loss": fused.loss.detach()})
    assert len(runs[0]) == 24 + 2
    for name in runs[0]:
        assert_as_accurate(name, *(found[name] for found in runs), NETWORK_FACTOR)


def test_trls_defaults_are_as_accurate(tiny_folder, tmp_path, count):
    """bf16 autocast over an fp32 base, AdamW, checkpointing, B = 0: against fp32."""
    runs = []
    for patched, bf16 in ((False, False), (False, True), (True, True)):
        changes = {"bf16": bf16, "optim": "adamw_torch", "learning_rate": 1e-2,
                   "gradient_checkpointing": True, "adam_epsilon": 1e-3}  # fmt: skip

        def make(changes=changes):
            return trl.SFTTrainer(
                str(tiny_folder),
                trl.SFTConfig(str(tmp_path), **(COMMON | changes)),
                train_dataset=datasets.Dataset.from_list(STRINGS),
                peft_config=config(init_lora_weights=True),
            )

        runs.append(run(make, count, patched))
    exact, plain, patched = runs
    assert plain.served == 0 and patched.left == 0 and patched.served >= plain.left > 0
    for key in ("loss", "grad_norm", "entropy"):
        series = [r.series()[key] for r in (patched, exact, plain)]
        assert_as_accurate(key, *series, NETWORK_FACTOR)
    for name in exact.weights:
        moved = [r.weights[name] - r.before[name] for r in (patched, exact, plain)]
        assert moved[0].any()
        assert_as_accurate(name, *moved, NETWORK_FACTOR)


def test_adamw(tokenizer, tmp_path, count):
    """Against float64: AdamW divides each element by its own size, rounding and all."""
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}
    plain, patched = run_both(sft(tmp_path, tokenizer, **changes), count)
    double = sft(tmp_path, tokenizer, model=lambda: make_tiny_model().double(), **changes)
    exact = run(double, count, False)
    for name, values in exact.weights.items():
        assert values.dtype == torch.float64
        assert torch.equal(exact.before[name].float(), patched.before[name])
        assert_as_accurate(name, patched.weights[name], values, plain.weights[name], NETWORK_FACTOR)


def test_dropout_is_the_same_when_recomputed(tokenizer, tmp_path, count):
    """Patched and plain train; with checkpointing the patched run is the one without, so that the
    elements dropped were the same again."""
    runs = []
    for patched, checkpointing in ((True, False), (True, True), (False, True)):
        changes = {"gradient_checkpointing": checkpointing, "max_steps": 8}
        adapter = config(lora_dropout=0.05)
        make = sft(tmp_path, tokenizer, STRINGS[2:3] * 12, adapter=adapter, **changes)
        runs.append(run(make, count, patched))
        losses = runs[-1].series()["loss"]
        assert losses[-1] < losses[0]
        assert (runs[-1].left == 0) == patched and (runs[-1].served > 0) == patched
    assert runs[0].served < runs[1].served
    assert_same(*runs[:2])


def test_resuming_is_not_interrupting(tokenizer, tmp_path, count):
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "gradient_checkpointing": True,
               "save_strategy": "steps", "save_steps": 2, "max_steps": 4}  # fmt: skip
    make = sft(tmp_path, tokenizer, adapter=config(lora_dropout=0.05), **changes)
    whole = run(make, count, True)
    resumed = run(make, count, True, resume=str(tmp_path / "checkpoint-2"))
    assert resumed.left == 0 and 2 * resumed.served == whole.served
    for name, values in whole.weights.items():
        assert torch.equal(resumed.weights[name], values), name
    assert torch.equal(resumed.series()["grad_norm"], whole.series()["grad_norm"])


def test_the_best_model_is_loaded_at_the_end(tokenizer, tmp_path, count):
    """Of the highest loss, so that it is not the last."""
    changes = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps",
               "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True,
               "metric_for_best_model": "eval_loss"}  # fmt: skip
    make = sft(tmp_path, tokenizer, eval_rows=STRINGS[:4], **changes)
    plain, patched = run_both(make, count)
    assert_same(plain, patched)
    best = patched.trainer.state.best_model_checkpoint
    assert not best.endswith("checkpoint-3")
    saved = load_file(f"{best}/adapter_model.safetensors")
    for name, values in patched.weights.items():
        assert torch.equal(saved[name.replace(".default", "")], values)
    count.take()
    losses = [r.trainer.evaluate()["eval_loss"] for r in (plain, patched)]
    assert_close("eval_loss", *torch.tensor(losses).flip(0))
    assert count.take() == (12, 12, 0)


# GRPO --------------------------------------------------------------------------------------------


def grpo(folder, tokenizer, ready, seen, **changes):
    def reward(completion_ids, **columns):
        seen.append(completion_ids)
        return [float(sum(ids) % 7) for ids in completion_ids]

    settings = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6,
                "num_iterations": 2, "max_steps": 4, "learning_rate": 0.3}  # fmt: skip

    def make():
        seen.append("begin")
        rows = [{"prompt": f"Question: {i}\nAnswer:" + " 1 +" * i} for i in range(4)]
        model = make_tiny_model()
        return trl.GRPOTrainer(
            make_lora(model) if ready else model,
            reward,
            args=trl.GRPOConfig(str(folder), **(COMMON | settings | changes)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=None if ready else config(),
        )

    return make


@pytest.mark.parametrize("beta", beyond([0.04], [0.0, 0.04]))
@pytest.mark.parametrize("ready", [False, True])
def test_grpo(ready, beta, tokenizer, tmp_path, count):
    """`ready`: a PeftModel, of which TRL keeps a copy as adapter "ref"; else the reference is the
    model with its adapter disabled."""
    seen = []
    changes = {"beta": beta, "gradient_checkpointing": True}
    plain, patched = run_both(grpo(tmp_path, tokenizer, ready, seen, **changes), count)
    # Of a policy near its reference rounding alone moves the KL; the loss has it too.
    assert_same(plain, patched, skip="kl")
    second = seen.index("begin", 1)
    assert seen[:second] == seen[second:] and second == 3  # completions of two batches
    assert len({tuple(ids) for batch in seen[1:second] for ids in batch}) == 8
    assert (patched.disabled > 0) == (beta > 0 and not ready)
    assert ("ref" in patched.trainer.model.peft_config) == (beta > 0 and ready)
    assert ("kl" in patched.series()) == (beta > 0)


# The others --------------------------------------------------------------------------------------

PREFERENCES = [{"prompt": f"Question: {i} + 1?\nAnswer:", "chosen": f" {i + 1}",
                "rejected": f" {i} +" * (1 + i % 3) + " 7"} for i in range(12)]  # fmt: skip


@pytest.mark.parametrize("ready", [False, True])
def test_dpo(ready, tokenizer, tmp_path, count):
    """The references are those of `test_grpo`."""

    def make():
        model = make_tiny_model()
        return trl.DPOTrainer(
            make_lora(model) if ready else model,
            args=trl.DPOConfig(str(tmp_path), **COMMON),
            train_dataset=datasets.Dataset.from_list(PREFERENCES),
            processing_class=tokenizer,
            peft_config=None if ready else config(),
        )

    plain, patched = run_both(make, count)
    # Its rewards are what little remains of two log-probabilities, which are compared themselves.
    assert_same(plain, patched, skip="rewards/")
    assert "logps/chosen" in patched.series() and (patched.disabled > 0) == (not ready)
    assert ("ref" in patched.trainer.model.peft_config) == ready


def test_reward(tokenizer, tmp_path, count):
    """The score head trains whole, by modules_to_save."""

    def make():
        model = LlamaForSequenceClassification(
            LlamaConfig(**{**make_tiny_model().config.to_dict(), "num_labels": 1})
        )
        return trl.RewardTrainer(
            model,
            args=trl.RewardConfig(str(tmp_path), **COMMON),
            train_dataset=datasets.Dataset.from_list(PREFERENCES),
            processing_class=tokenizer,
            peft_config=config(task_type="SEQ_CLS"),
        )

    plain, patched = run_both(make, count)
    assert any("modules_to_save" in name for name in patched.weights)
    assert_same(plain, patched, skip="margin")  # a small difference of scores; the loss has it


def test_the_trainer_of_transformers(tmp_path, count):
    rows = [{"input_ids": [1, 5 + i, 9, 2], "labels": [-100, 5 + i, 9, 2]} for i in range(8)]

    def make():
        return Trainer(
            make_lora(make_tiny_model()),
            TrainingArguments(str(tmp_path), **COMMON),
            train_dataset=datasets.Dataset.from_list(rows),
        )

    assert_same(*run_both(make, count))


# vLLM --------------------------------------------------------------------------------------------


def sent(model):
    """What TRL hands vLLM, under vLLM's names, between merging and unmerging."""
    model.merge_adapter()
    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix not in name and "original_module" not in name:
            found[name.replace("modules_to_save.default.", "")] = p.detach().clone()
    model.unmerge_adapter()
    return found


def test_the_weights_that_vllm_is_sent(count):
    """The same bits under the same names, every time; then training goes on, served."""
    untied = {"tie_word_embeddings": False}
    plain = make_lora(make_tiny_model(**untied), modules_to_save=["lm_head"])
    patched = copy.deepcopy(plain)
    accelerate(patched)
    base = dict(make_tiny_model(**untied).named_parameters())
    for i in range(1, 4):
        mine, theirs = sent(patched), sent(plain)
        assert mine.keys() == theirs.keys() == base.keys()
        for name, values in theirs.items():
            assert torch.equal(mine[name], values), name
            merged = any(target in name for target in TARGETS)
            assert merged != torch.equal(values, base[name]) or "lm_head" in name
        left = dict(plain.named_parameters())
        for name, p in patched.named_parameters():
            assert torch.equal(p, left[name]), name
        ids, grads = torch.tensor([[1, 5, 9, 30, 7]]), []
        count.take()
        for model in (patched, plain):
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert count.take() == (12, 12, 0) and len(grads[0]) == 24 + 1
        for name, values in grads[1].items():
            assert_close(name, grads[0][name], values)
        with torch.no_grad():  # to the next step's weights, the same in both
            for n, p in patched.named_parameters():
                if n in grads[1]:
                    p.sub_(grads[1][n], alpha=i)
                    left[n].copy_(p)


# A user's own script ------------------------------------------------------------------------------


def own_sft(model, tokenizer, **settings):
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(**settings),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


def own_grpo(model, tokenizer, **settings):
    return trl.GRPOTrainer(
        model,
        lambda completion_ids, **columns: [float(sum(ids) % 7) for ids in completion_ids],
        args=trl.GRPOConfig(
            beta=0.04, num_generations=2, max_completion_length=4, steps_per_generation=1,
            **settings,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "Question: 2\nAnswer:"}] * 8),
        processing_class=tokenizer,
    )  # fmt: skip


def own_dpo(model, tokenizer, **settings):
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**settings),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("build", [own_sft, own_grpo, own_dpo])
def test_a_mask_in_a_users_own_script(build, tiny_folder, tokenizer, tmp_path, count):
    """An adapter from disk, TRL's defaults (bf16, checkpointing, AdamW), weight decay, one layer
    left to PEFT: frozen elements keep their bits, the others train."""
    scored = make_lora(AutoModelForCausalLM.from_pretrained(tiny_folder))
    scored.save_pretrained(tmp_path / "init")
    partition = partition_for(scored)
    partition.save(tmp_path / "partition.safetensors")

    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "init", is_trainable=True)
    left = model.base_model.model.model.layers[0].mlp.up_proj
    left.lora_A["default"].register_forward_hook(lambda *unused: None)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    trainer = build(
        model, tokenizer, output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=3,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2, weight_decay=0.1,
        per_device_train_batch_size=2, lr_scheduler_type="constant",
    )  # fmt: skip
    report = accelerate(trainer.model)
    LoraParCallback(tmp_path / "partition.safetensors", stage="sft").attach(trainer)
    assert len(report.served) == 11 and list(report.skipped.values()) == ["lora_A has hooks"]
    count.take()
    trainer.train()
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    assert count.left and count.served > 10 * count.left
    assert ("ref" in trainer.model.peft_config) == (build is not own_sft)
    after = {n: p.detach() for n, p in adapter_parameters(trainer.model).items()}
    moved = trainable = 0
    for name, mask in partition.sft.items():
        kept = after[name].view(torch.int32) == before[name].view(torch.int32)
        assert kept[~mask].all() and 0 < mask.sum() < mask.numel(), name
        moved, trainable = moved + int((~kept)[mask].sum()), trainable + int(mask.sum())
    assert moved > 0.9 * trainable
