"""`accelerate`: PEFT's outputs and gradients, PEFT's features untouched, and a way back."""

import json
import time

import pytest
import torch
from against_peft import IDS, compare, layer_of, pair, run
from conftest import DEVICE, make_lora, make_tiny_model
from peft.tuners import lora as peft_lora
from torch import nn

from lorapar.config import PartitionSettings
from lorapar.errors import UserError
from lorapar.partitioning import adapter_parameters, everything, make_partition
from lorapar.patch import accelerate, lora_layers, restore
from lorapar.served import Served
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import assert_close


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


def test_the_report_as_a_dict_and_folded():
    base = make_tiny_model(num_hidden_layers=3, attn_implementation="eager")
    for layer in base.model.layers[1:]:
        layer.mlp.down_proj.__class__ = type("Other", (nn.Linear,), {})
    model = make_lora(base).to(DEVICE)
    for i in (0, 2):
        hooked = layer_of(model, f"{i}.mlp.up_proj").lora_B["default"]
        hooked.register_forward_hook(lambda *a: None)
    report = accelerate(model)
    rows, at = report.as_dict(), "base_model.model.model.layers."
    assert json.loads(json.dumps(rows)) == rows and rows.keys() == lora_layers(model).keys()
    assert rows[f"{at}1.self_attn.q_proj"] == {"plan": "lora_linear_group", "reason": None}
    assert rows[f"{at}0.mlp.down_proj"] == {"plan": "lora_linear", "reason": None}
    assert rows[f"{at}1.mlp.down_proj"] == {"plan": "lora_add", "reason": None}
    assert rows[f"{at}0.mlp.up_proj"] == {"plan": "peft", "reason": "lora_B has hooks"}
    assert rows[f"{at}0.mlp.gate_proj"]["plan"] == "lora_linear"
    assert str(report).splitlines() == [
        "served 16 of 18 LoRA layers, 11 of them in 4 groups",
        f"  added to the output of its base layer {at}*.mlp.down_proj (2 layers)",
        f"  left to PEFT {at}*.mlp.up_proj (2 layers): lora_B has hooks",
    ]


def test_a_7b_shape_is_patched_in_a_fifth_of_a_second():
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.device("meta"):
        model = make_lora(make_tiny_model(**shape), init_std=0.0, target_modules=targets)
    seconds = []
    for _ in range(5):  # the best: other processes only add
        start = time.perf_counter()
        report = accelerate(model)
        seconds.append(time.perf_counter() - start)
        assert len(report.served) == 224 and len(report.groups) == 64
        restore(model)
    assert min(seconds) < 0.2, seconds


def test_one_model_of_two_is_patched():
    plain, model = pair()
    accelerate(model)
    assert not any(isinstance(m, Served) for m in plain.modules())
    assert peft_lora.Linear.forward is not Served.forward
    other = make_lora(make_tiny_model())
    assert not any(isinstance(m, Served) for m in other.modules())


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_what_passes_by_itself_is_no_reason_and_what_does_not_is(state):
    _, dora = pair(use_dora=True)
    _, model = pair()
    for m in (dora, model):
        if state == "merged":
            m.merge_adapter()
        else:
            m.base_model.disable_adapter_layers()
    assert len(accelerate(model).served) == 12
    assert len(accelerate(dora).skipped) == 12


def test_masks_of_the_wrong_kind_adapter_or_columns_are_refused():
    _, model = pair()
    name, layer = next(iter(lora_layers(model).items()))
    with pytest.raises(UserError, match="must be a Partition or a dict .*, got list"):
        accelerate(model, [1])
    with pytest.raises(UserError, match="q_proj: got a Tensor, not a LoraMask"):
        accelerate(model, {name: torch.ones(2)})
    live = torch.tensor([True, True, False, False], device=DEVICE)
    a = live[:, None].expand_as(layer.lora_A["default"].weight).contiguous()
    b = live.expand_as(layer.lora_B["default"].weight).contiguous()
    with pytest.raises(UserError, match=r"columns \[2, 3\] are marked dead but contribute"):
        accelerate(model, {name: LoraMask(a, b, live=live)})
    partition = everything(model)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    with pytest.raises(UserError, match="(?s)of the adapter default; other is active.*up_proj"):
        accelerate(model, partition, stage="sft")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UserError, match="no active adapter with a lora_A, or several"):
        accelerate(model, partition, stage="sft")


def test_masks_of_layers_left_to_peft_are_refused():
    _, model = pair()
    masks = masks_for(model)
    left = list(masks)[1:3]
    for name in left:
        model.get_submodule(name).lora_A["default"].register_forward_hook(lambda *a: None)
    with pytest.raises(UserError, match="(?s)LoraParCallback.*k_proj: lora_A has.*v_proj: lora_A"):
        accelerate(model, masks)
    assert not any(isinstance(m, Served) for m in model.modules())  # nothing was done
    assert len(accelerate(model, {n: m for n, m in masks.items() if n not in left}).served) == 10
    model = make_lora(make_tiny_model(), target_modules=["q_proj", "embed_tokens"])
    name = next(n for n in lora_layers(model) if "embed" in n)
    with pytest.raises(UserError, match="embed_tokens: it has no active adapter with a lora_A"):
        accelerate(model, {name: LoraMask(None, None)})


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
