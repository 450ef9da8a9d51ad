"""`accelerate`: PEFT's outputs and gradients, PEFT's features untouched, and a way back."""

import copy
import io
import warnings

import pytest
import torch
from against_peft import IDS, compare, pair, run
from conftest import DEVICE, make_lora, make_tiny_model
from peft import PeftModel
from peft.tuners import lora as peft_lora
from torch import nn

from lorapar.calls import why_not
from lorapar.config import PartitionSettings
from lorapar.errors import UserError
from lorapar.partitioning import adapter_parameters, everything, make_partition
from lorapar.patch import accelerate, lora_layers, restore
from lorapar.served import Served
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import assert_close


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"r": 3, "lora_alpha": -5}, {"alpha_pattern": {"q_proj": 64}},
     {"lora_dropout": 0.3}],
    ids=str,
)  # fmt: skip
def test_outputs_and_gradients_are_pefts(changes):
    plain, patched = pair(**changes)
    report = accelerate(patched)
    assert len(report.served) == 12 and not report.skipped
    assert all(why_not(m) is None for m in lora_layers(patched).values())
    compare(patched.eval(), plain.eval())


def test_dropout_applies_in_training_only():
    _, model = pair(lora_dropout=0.5)
    accelerate(model)
    still = [model.eval()(input_ids=IDS).logits for _ in "12"]
    moving = [model.train()(input_ids=IDS).logits for _ in "12"]
    assert torch.equal(*still) and not torch.equal(*moving)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_dropout(reentrant):
    grads = []
    for use in (False, True):
        _, model = pair(lora_dropout=0.5)
        accelerate(model)
        model.train()
        model.enable_input_require_grads()
        if use:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(4)
        grads.append(run(model)[1])
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_restore_undoes_everything():
    plain, model = pair()
    keys, attributes = set(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    accelerate(model, everything(model), stage="sft")
    assert set(model.state_dict()) == keys
    assert not set(dict(model.named_buffers())) - set(dict(plain.named_buffers()))
    restore(model)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(type(m) is peft_lora.Linear for m in lora_layers(model).values())
    restore(model)  # nothing to do
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_twice_is_once():
    _, model = pair()
    first, second = accelerate(model), accelerate(model)
    assert first.served == second.served and first.groups == second.groups
    assert str(first) == "served 12 of 12 LoRA layers, 10 of them in 4 groups"
    assert str(second) == f"{first}\n  12 of them were patched before"


def test_state_follows_peft_at_every_call():
    plain, model = pair()
    accelerate(model)
    base = make_tiny_model(attn_implementation="eager").to(DEVICE)(input_ids=IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base)
    model.add_adapter("other", model.peft_config["default"])
    plain.add_adapter("other", plain.peft_config["default"])
    for (n, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        if "lora_B.other" in n:
            nn.init.normal_(p)
        q.data.copy_(p.data)
    for both in (model, plain):
        both.set_adapter("other")
    layer = next(iter(lora_layers(model).values()))
    assert isinstance(layer, Served) and why_not(layer) is None
    compare(model, plain)
    for both in (model, plain):
        both.base_model.set_adapter(["default", "other"])
    assert why_not(layer) == "2 active adapters here; one is needed"
    compare(model, plain)
    for both in (model, plain):
        both.set_adapter("default")
        both.merge_adapter()
    assert "merged" in why_not(layer)
    assert_close("merged", model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    for both in (model, plain):
        both.unmerge_adapter()
        for m in lora_layers(both).values():
            m.set_scale("default", 0.25)
    compare(model, plain)


def test_mixed_batches_go_to_peft():
    plain, model = (m.eval() for m in pair())
    accelerate(model)
    names = ["default", "__base__"]
    with torch.no_grad():
        got = model(input_ids=IDS, adapter_names=names).logits
        assert torch.equal(got, plain(input_ids=IDS, adapter_names=names).logits)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_work_and_stand_alone(how):
    plain, model = pair()
    accelerate(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    restore(model)
    served = [isinstance(m, Served) for m in lora_layers(other).values()]
    assert all(served) if how == "deepcopy" else not any(served)
    compare(other, plain)


def test_saved_adapter_has_no_trace(tmp_path):
    plain, model = pair()
    accelerate(model, everything(model), stage="sft")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_model(attn_implementation="eager"), tmp_path)
    loaded = loaded.to(DEVICE)
    assert torch.equal(loaded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    merged = model.merge_and_unload()
    assert_close("merged", merged(input_ids=IDS).logits, plain(input_ids=IDS).logits)


class Doubling(nn.Linear):
    """A base layer whose output is not that of its weight, as quantised layers are."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_base_that_makes_its_own_output_is_served_by_lora_add():
    base = make_tiny_model()
    for layer in base.model.layers:
        layer.self_attn.q_proj.__class__ = Doubling
    plain = make_lora(base).to(DEVICE)
    patched = copy.deepcopy(plain)
    assert len(accelerate(patched).served) == 12
    compare(patched, plain)


def test_hooks_on_the_base_still_fire():
    plain, patched = pair()
    accelerate(patched)
    calls = []
    for model in (plain, patched):
        q = model.base_model.model.model.layers[0].self_attn.q_proj
        q.base_layer.register_forward_hook(lambda m, i, o: calls.append(1) or o * 3)
    compare(patched, plain)
    assert len(calls) >= 2


def test_a_base_weight_that_trains_gets_its_gradient():
    plain, patched = pair()
    accelerate(patched)
    for model in (plain, patched):
        q = model.base_model.model.model.layers[0].self_attn.q_proj
        q.base_layer.weight.requires_grad_(True)
    compare(patched, plain)


def test_ranks_above_the_ops_limit_go_to_peft():
    plain, model = pair(r=513, target_modules=["q_proj"])
    report = accelerate(model)
    assert set(report.skipped.values()) == {"its rank is above 512"} and not report.served
    compare(model.eval(), plain.eval())


def test_what_cannot_be_served_is_left_and_named():
    def break_forward(m):
        m.forward = m.forward

    def hook(m):
        m.lora_A["default"].register_forward_hook(lambda *a: None)

    cases = ((break_forward, "its forward was replaced"), (hook, "lora_A has hooks"))
    for breakage, reason in cases:
        plain, model = pair()
        for both in (plain, model):
            breakage(both.base_model.model.model.layers[1].self_attn.q_proj)
        report = accelerate(model)
        ((name, why),) = report.skipped.items()
        assert name.endswith("layers.1.self_attn.q_proj") and why.startswith(reason)
        assert f"left to PEFT {name}: {why}" in str(report) and len(report.served) == 11

    plain, model = pair(lora_dropout=1.0)
    assert not accelerate(model).served
    compare(model.eval(), plain.eval())

    plain, model = pair(use_dora=True)
    report = accelerate(model)
    assert not report.served and all("plain LoRA" in why for why in report.skipped.values())
    compare(model, plain)


def test_embeddings_are_left():
    model = make_lora(make_tiny_model(), target_modules=["q_proj", "embed_tokens"])
    (why,) = accelerate(model).skipped.values()
    assert "layer.Embedding, no LoRA layer over one linear" in why


def masks_for(model, share=0.5):
    torch.manual_seed(1)
    return {
        name: LoraMask(
            torch.rand(m.lora_A["default"].weight.shape, device=DEVICE) < share,
            torch.rand(m.lora_B["default"].weight.shape, device=DEVICE) < share,
        )
        for name, m in lora_layers(model).items()
    }


def test_masks_by_module_name():
    plain, model = pair()
    masks = masks_for(model)
    accelerate(model, masks)
    (y, g), (y0, g0) = run(model), run(plain)
    assert_close("y", y, y0)
    for name, mask in masks.items():
        for side, m in (("lora_A", mask.a), ("lora_B", mask.b)):
            key = f"{name}.{side}.default.weight"
            assert not g[key][~m].any()
            assert_close(key, g[key][m], g0[key][m])


def test_partition_masks_belong_to_the_adapter_they_were_made_for():
    _, model = pair()
    scores = [{n: torch.rand(p.shape) for n, p in adapter_parameters(model).items()} for _ in "12"]
    partition = make_partition(*scores, PartitionSettings(theta=0.5))
    accelerate(model, partition, stage="rl")
    _, g = run(model)
    for name, mask in partition.rl.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.default.weight"
        mask = mask.to(DEVICE)
        assert not g[key][~mask].any() and g[key][mask].any()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    _, g = run(model)
    assert g["base_model.model.model.layers.0.self_attn.q_proj.lora_B.other.weight"].all()


def test_accelerate_without_a_mask_takes_the_mask_off():
    _, model = pair()
    accelerate(model, masks_for(model))
    accelerate(model)
    assert all(g.all() for g in run(model)[1].values())


def test_masks_that_do_not_fit_are_all_named():
    _, model = pair()
    masks = masks_for(model)
    first, second = list(masks)[:2]
    masks["nowhere"] = masks.pop(first)
    masks[second] = LoraMask(torch.ones(2, 2).bool(), None)
    with pytest.raises(UserError, match=r"(?s)a is \[2, 2\], the adapter needs.*nowhere: no such"):
        accelerate(model, masks)
    with pytest.raises(UserError, match="stage must be sft or rl, got None"):
        accelerate(model, everything(model))


def test_a_model_without_lora_is_refused():
    with pytest.raises(UserError, match="LlamaForCausalLM has no LoRA layers"):
        accelerate(make_tiny_model())


def test_compiles():
    plain, model = pair()
    accelerate(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32, device=DEVICE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_generate_with_a_cache():
    plain, model = pair()
    accelerate(model)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))
