"""Siblings that share x are computed together, and only then. Nothing else differs from PEFT."""

import contextlib

import pytest
import torch
from against_peft import IDS, compare, layer_of, pair, run
from conftest import DEVICE
from peft import LoraConfig, get_peft_model
from siblings import QKV, Attention, CrossAttention, attention, close, inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorapar.calls import SUMS
from lorapar.groups import GROUP
from lorapar.importance import Example, accumulate
from lorapar.patch import accelerate, lora_layers
from lorapar_kernels import ImportanceSums, few_rows
from lorapar_kernels.testing import assert_close


def test_one_call_for_q_k_v_and_one_for_gate_and_up(sizes):
    plain, patched = pair()
    report = accelerate(patched)
    assert [len(g) for g in report.groups] == [3, 2, 3, 2]
    compare(patched, plain)
    assert sizes == [3, 2] * 2
    assert all(m.__dict__[GROUP][0].pending is None for m in lora_layers(patched).values()
               if GROUP in m.__dict__)  # fmt: skip


def test_few_rows_on_a_gpu_are_grouped_for_scoring_only(sizes, monkeypatch):
    monkeypatch.setattr(few_rows, "serves", lambda x: True)
    plain, patched = pair()
    accelerate(patched)
    compare(patched, plain)
    assert not sizes
    accumulate(patched, [Example([1, 5], [9, 2])])
    assert sizes == [3, 2] * 2


def test_outputs_that_few_rows_did_not_take_are_not_made_again(sizes, monkeypatch):
    monkeypatch.setattr(few_rows, "serves", lambda x: x.shape[0] <= 3)
    plain, patched = attention()
    x, y = torch.randn(5, 16, device=DEVICE), torch.randn(1, 16, device=DEVICE)
    for _ in range(3):
        close(patched, plain, x, y)
    assert sizes == [3]


def test_generation_and_scoring_are_grouped(sizes):
    _, model = pair()
    accelerate(model)
    model.generate(IDS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert sizes == [3, 2] * 6
    sizes.clear()
    accumulate(model, [Example([1, 5], [9, 2])])
    assert sizes == [3, 2] * 2


class Called(nn.ModuleDict):
    def forward(self, x):
        return x


def test_only_siblings_with_one_width_that_are_served_are_grouped():
    plain, _ = pair(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    report = accelerate(plain)
    assert [[n.rpartition(".")[2] for n in g] for g in report.groups] == [["q_proj", "v_proj"]] * 2
    assert str(report) == "served 8 of 8 LoRA layers, 4 of them in 2 groups"
    model, _ = pair()
    layer_of(model, "0.self_attn.k_proj").lora_A["default"].register_forward_hook(lambda *a: None)
    assert "11 of 12 LoRA layers, 9 of them in 4 groups" in str(accelerate(model))
    widths = {"q": 16, "k": 8, "v": 8}
    for kind, groups in ((Called, [["k", "v"]]), (nn.ModuleDict, [])):  # that is never called
        model = kind({name: nn.Linear(n, 4) for name, n in widths.items()})
        report = accelerate(get_peft_model(model, LoraConfig(target_modules=["q", "k", "v"])))
        assert [[n[-1] for n in g] for g in report.groups] == groups
    assert "group" not in str(accelerate(pair(target_modules=["o_proj"])[0]))


def test_attention_with_two_inputs_leaves_q_alone(sizes):
    plain, patched = attention(CrossAttention)
    for y in (None, *inputs(2)):
        x = inputs(1)[0]
        close(patched, plain, x, x if y is None else y)
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize("how", ["plain", "reentrant", "non-reentrant"])
def test_outputs_that_nobody_took_are_not_computed_again(how, sizes):
    """Cross attention in a class whose forward does not say so, with a checkpoint or without."""
    steps = []
    for checkpointed in (False, how != "plain"):
        _, patched = attention(lora_dropout=0.5)
        patched.train()
        torch.manual_seed(3)
        grads, counts = [], []
        for _ in range(3):
            patched.zero_grad()
            x, y = inputs(requires_grad=True)
            sizes.clear()
            if checkpointed:
                checkpoint(patched, x, y, use_reentrant=how == "reentrant").sum().backward()
            else:
                patched(x, y).sum().backward()
            counts.append(sizes.copy())
            grads.append(
                [x.grad, y.grad, *(p.grad for p in patched.parameters() if p.grad is not None)]
            )
        steps.append(grads)
        twice = 2 if checkpointed else 1
        # q computed k and v, then k computed q and v; afterwards q is alone, k computes v.
        assert counts == [[3, 3] * twice, [2] * twice, [2] * twice]
    assert all(
        torch.equal(a, b) for one, two in zip(*steps) for a, b in zip(one, two, strict=True)
    )  # fmt: skip


def test_another_x_is_noticed(sizes):
    plain, patched = attention()
    x, y = inputs()
    close(patched, plain, x, y)
    close(patched, plain, x, x.clone())  # equal, but not the same
    accelerate(patched)
    layer = patched.base_model.model.k_proj
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    plain.base_model.model.k_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    close(patched, plain, x, x)


@torch.no_grad()
def test_a_write_to_x_is_noticed():
    plain, patched = attention()

    def double(module, args):
        args[0].mul_(-2)

    for model in (plain, patched):
        for name in QKV:
            getattr(model.base_model.model, name).register_forward_pre_hook(double)
    (x,) = inputs(1)
    other = x.clone()
    assert_close("y", patched(x, x), plain(other, other))


def change_scale(layer):
    layer.set_scale("default", 3.0)


@torch.no_grad()
def write_to_b(layer):
    layer.lora_B["default"].weight.mul_(3)


def disable(layer):
    layer.enable_adapters(False)


def merge(layer):
    layer.merge()


def train_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def drop(layer):
    layer.eval()


@pytest.mark.parametrize("change", [change_scale, write_to_b, disable, merge, train_base, drop])
@pytest.mark.parametrize("when", ["before q", "between q and k"])
def test_the_state_of_each_member_counts_when_it_is_called(change, when):
    plain, patched = attention()
    for model in (plain, patched):
        inner = model.base_model.model
        at = inner.q_proj if when == "before q" else inner.k_proj
        at.register_forward_pre_hook(lambda module, args, inner=inner: change(inner.k_proj))
    (x,) = inputs(1)
    close(patched, plain, x, x)


def test_a_member_with_two_adapters_is_left_out(sizes):
    plain, patched = attention()
    for model in (plain, patched):
        model.add_adapter("other", model.peft_config["default"])
        torch.manual_seed(5)
        for n, p in model.named_parameters():
            if ".other." in n:
                nn.init.normal_(p)
        model.base_model.model.k_proj.set_adapter(["default", "other"])
    (x,) = inputs(1)
    close(patched, plain, x, x)
    assert sizes == [2]
    for model in (plain, patched):
        model.base_model.model.k_proj.set_adapter("other")
    close(patched, plain, x, x)
    assert sizes == [2, 3]


def other_dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout(0.25)


def half(layer):
    layer.base_layer.to(torch.bfloat16)


def scored(layer):
    layer.__dict__[SUMS] = ImportanceSums(
        *(m["default"].weight for m in (layer.lora_A, layer.lora_B))
    )
    layer.__dict__[SUMS].examples(torch.tensor([0, 3], dtype=torch.int32))


def hooked_base(layer):
    layer.base_layer.register_forward_hook(lambda *a: None)


@pytest.mark.parametrize("change", [other_dropout, half, scored, hooked_base, drop, disable])
def test_a_member_that_differs_is_computed_apart(change, sizes):
    _, patched = attention()
    inner = patched.base_model.model
    change(inner.k_proj)
    (x,) = inputs(1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = [getattr(inner, n)(x) for n in QKV]
    assert sizes == [2] and [y.shape[-1] for y in outputs] == [8, 12, 20]
    assert inner.q_proj.__dict__[GROUP][0].pending is None


def test_modes_count_when_a_member_is_called():
    _, patched = attention()
    inner = patched.base_model.model
    (x,) = inputs(1)

    def q_then_k(during_q, during_k):
        accelerate(patched)  # nothing is remembered of the case before
        with during_q:
            inner.q_proj(x)
        with during_k:
            return inner.k_proj(x)

    nothing = contextlib.nullcontext()
    assert q_then_k(torch.no_grad(), nothing).requires_grad
    assert not q_then_k(nothing, torch.no_grad()).requires_grad
    bf16 = torch.autocast(DEVICE, dtype=torch.bfloat16)
    assert q_then_k(bf16, nothing).dtype == torch.float32
    assert q_then_k(nothing, bf16).dtype == torch.bfloat16
    assert not q_then_k(torch.inference_mode(), torch.no_grad()).is_inference()
    accelerate(patched)
    inner.q_proj(x)
    x.requires_grad_(True)
    inner.k_proj(x).sum().backward()
    assert x.grad.any()
    accelerate(patched)
    with torch.inference_mode():  # nothing tells of writes there, so nobody is grouped
        z = torch.randn(3, 16, device=DEVICE)
        inner.q_proj(z)
        z.mul_(0)
        assert_close("k", inner.k_proj(z), inner.k_proj.base_layer.bias.expand(3, -1).clone())


def test_an_output_may_be_written_to():
    plain, patched = attention()
    (x,) = inputs(1)
    for model in (plain, patched):
        model.base_model.model.q_proj.register_forward_hook(lambda m, a, y: y.mul_(2))
    compare_grads(patched, plain, x)


def compare_grads(patched, plain, x):
    for model in (plain, patched):
        model.zero_grad()
        y = model(x, x)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
    for (name, p), (_, q) in zip(patched.named_parameters(), plain.named_parameters()):
        if q.grad is not None:
            assert_close(name, p.grad, q.grad)


def test_backward_twice_with_a_retained_graph():
    compare_grads(*reversed(attention()), inputs(1)[0])


def test_hooks_of_every_member_run():
    _, patched = attention()
    calls = []
    for name in QKV:
        getattr(patched.base_model.model, name).register_forward_hook(
            lambda m, a, y, name=name: calls.append(name)
        )
    (x,) = inputs(1)
    patched(x, x)
    assert calls == QKV


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_is_grouped_as_the_first_was(reentrant, sizes):
    _, model = pair(lora_dropout=0.1)
    accelerate(model)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(3):
        sizes.clear()
        run(model)
        assert sizes == [3, 2] * 4
    report = accelerate(model)
    assert len(report.groups) == 4


def test_a_stack_of_layers_compiles_without_a_break():
    _, model = pair()
    accelerate(model)
    layer = model.base_model.model.model.layers[0]

    def stack(x):
        a = layer.self_attn
        q, k, v = a.q_proj(x), a.k_proj(x), a.v_proj(x)
        return layer.mlp(torch.cat([q[..., :16], k, v], -1)[..., :32])

    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    results = []
    for f in (compiled, stack, compiled):
        x = torch.linspace(-1, 1, 96, device=DEVICE).view(3, 32).requires_grad_()
        model.zero_grad()
        y = f(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )


class Part(Attention):
    """Checkpoints around a part of it, or compiles one projection alone."""

    names: tuple[str, ...] = ()

    def forward(self, x, y):
        def part(x):
            return torch.cat([getattr(self, name)(x).tanh() for name in self.names], -1)

        rest = [getattr(self, n)(x).sin() for n in QKV if n not in self.names]
        made = checkpoint(part, x, use_reentrant=self.reentrant, early_stop=self.early)
        return torch.cat([*rest, made], -1)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("names", [("k_proj",), ("k_proj", "v_proj"), ("q_proj",)])
def test_a_checkpoint_around_a_part_of_the_parent(names, reentrant, early):
    plain, patched = attention(Part)
    results = []
    for model in (plain, patched):
        inner = model.base_model.model
        inner.names, inner.reentrant, inner.early = names, reentrant, early
        (x,) = inputs(1, requires_grad=True)
        torch.manual_seed(3)
        x.data.normal_()
        y = model(x, x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*reversed(results), strict=True):
        assert_close("result", got.detach(), want.detach())


def test_a_frozen_sibling_stays_without_a_graph(sizes):
    _, patched = attention()
    inner = patched.base_model.model
    inner.k_proj.requires_grad_(False)
    (x,) = inputs(1)
    assert inner.q_proj(x).requires_grad and not inner.k_proj(x).requires_grad
    assert sizes == [2]


def test_a_projection_compiled_alone_notices_a_write_to_x():
    """No version tells a compiled graph of it, so such a layer is never grouped."""
    plain, patched = attention()
    (x,) = inputs(1)
    results = []
    for model in (plain, patched):
        inner, z = model.base_model.model, x.clone()
        for name in ("q_proj", "k_proj"):
            getattr(inner, name).compile(backend="eager")
        with torch.no_grad():
            inner.q_proj(z)
            z.mul_(2)
            results.append([inner.k_proj(z), inner.v_proj(z)])
    for got, want in zip(*results):
        assert_close("y", got, want)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_outputs_made_on_another_stream_are_not_taken(sizes):
    plain, patched = attention()
    (x,) = inputs(1)
    want, inner, side = (
        plain.base_model.model.k_proj(x),
        patched.base_model.model,
        torch.cuda.Stream(),
    )
    torch.cuda.synchronize()
    inner.q_proj(x)
    with torch.cuda.stream(side):
        y = inner.k_proj(x)
    assert sizes == [3, 3]
    torch.cuda.synchronize()
    assert_close("k", y, want)
