"""Bases that make their own output: quantised by every library, a subclass, Conv1D, hooked.

Whole models are judged against float64 with each base weight dequantised. Single layers are judged
closer: against the base layer's own output and input gradient plus the adapter in float64.
"""

import ast
import contextlib
import copy
import functools
import importlib
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from against_peft import IDS, compare, layer_of, run
from conftest import DEVICE, make_lora, make_tiny_model
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners import lora as peft_lora
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TorchAoConfig,
)

from lorapar import served
from lorapar.batches import batch_losses
from lorapar.calls import why_not
from lorapar.importance import Example, accumulate
from lorapar.partitioning import adapter_parameters
from lorapar.patch import accelerate, lora_layers, restore
from lorapar.served import SERVED, Served
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def four_bit(quant_type, **changes):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, **changes)


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao(name):
    return TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)())


CONFIGS = {
    "nf4": lambda: four_bit("nf4", bnb_4bit_compute_dtype=BF16, bnb_4bit_use_double_quant=True),
    "fp4": lambda: four_bit("fp4"),
    "int8": eight_bit,
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8 activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
}
KINDS = [*CONFIGS, "hqq"]
CLASSES = {
    "nf4": "bnb.Linear4bit",
    "fp4": "bnb.Linear4bit",
    "int8": "bnb.Linear8bitLt",
    "hqq": "hqq.HqqLoraLinear",
}


@pytest.fixture(autouse=True)
def on_the_device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model with biases, saved."""
    model = make_tiny_model(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.1)
    where = tmp_path_factory.mktemp("base")
    model.save_pretrained(where)
    return where


@functools.cache
def loaded(folder, kind, dtype):
    options = {"dtype": dtype, "attn_implementation": "eager"}
    if kind != "hqq":
        options |= {"quantization_config": CONFIGS[kind](), "device_map": DEVICE}
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                linear.requires_grad_(False)
                made = hqq.HQQLinear(linear, config, compute_dtype=dtype, device=DEVICE)
                setattr(parent, name, made)
    model.hqq_quantized = True
    return model


def made(folder, kind, dtype=BF16, *, adapters=FP32, reentrant=None, **changes):
    """PEFT's model, as people do QLoRA."""
    model = prepare_model_for_kbit_training(
        copy.deepcopy(loaded(folder, kind, dtype)),
        use_gradient_checkpointing=reentrant is not None,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    plain = make_lora(model, **changes)
    for name, p in plain.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapters)
    return plain


def masks_of(model, share):
    """A mask for every layer by its name, with that share of the elements trainable."""
    return {
        name: LoraMask(
            *(torch.rand(m["default"].weight.shape) < share for m in (layer.lora_A, layer.lora_B))
        )
        for name, layer in lora_layers(model).items()
    }


@pytest.fixture
def quantized(folder):
    """Makes PEFT's model and its patched copy, all of it served: 8 bits for the sake of a mask."""

    def make(kind, *args, masks=None, **options):
        plain = made(folder, kind, *args, **options)
        patched = copy.deepcopy(plain)
        if masks is None and kind == "int8":
            masks = masks_of(patched, 1.0)
        report = accelerate(patched, masks)
        assert set(report.served.values()) == {"lora_add"} and len(report.served) == 12
        return plain, patched

    return make


@pytest.fixture
def added(monkeypatch) -> list[torch.Tensor]:
    """The output of every call of `lora_add` by a served layer, in order."""
    outputs, op = [], served.lora_add

    def counted(*args, **options):
        outputs.append(op(*args, **options))
        return outputs[-1]

    monkeypatch.setattr(served, "lora_add", counted)
    return outputs


def autocast():
    return torch.autocast(DEVICE, dtype=BF16)


def dequantised(base):
    """The weight [N, K] of a quantised linear layer; None for other modules."""
    if isinstance(base, peft_lora.LoraLayer):
        return None
    if type(base).__name__ == "HQQLinear":
        return base.dequantize()
    if type(base).__name__ in ("Linear4bit", "Linear8bitLt"):
        from peft.utils.integrations import dequantize_bnb_weight

        return dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))
    if isinstance(base, nn.Linear) and type(base.weight.data) is not torch.Tensor:
        return base.weight.dequantize()
    return None


@torch.no_grad()
def in_float64(model):
    """A copy in float64 whose base layers are plain ones."""
    exact = copy.deepcopy(model)
    for parent in list(exact.modules()):
        for name, base in list(parent.named_children()):
            if (weight := dequantised(base)) is not None:
                linear = nn.Linear(*reversed(weight.shape), dtype=torch.float64)
                linear.weight.copy_(weight)
                if base.bias is None:  # PEFT's merging of HQQ loses it
                    linear.bias = None
                else:
                    linear.bias.copy_(base.bias)
                setattr(parent, name, linear.requires_grad_(False))
    return exact.double()


def judge(patched, plain, context=contextlib.nullcontext):
    """A training step's logits and gradients, no farther from float64 than PEFT's."""
    (y, g), (y0, g0) = run(patched, IDS, context), run(plain, IDS, context)
    ye, ge = run(in_float64(plain))
    assert_as_accurate("logits", y, ye, y0)
    assert g.keys() == g0.keys() == ge.keys() and len(g) == 24
    for name in g:
        assert_as_accurate(name, g[name], ge[name], g0[name], NETWORK_FACTOR)


def gradients(layer, tensors, x, dy, context):
    """y and the gradients of x and of `tensors`."""
    x = x.clone().requires_grad_()
    with context():
        y = layer(x)
    if not y.requires_grad:  # a base without a backward
        return y, torch.zeros_like(x)
    return y.detach(), *torch.autograd.grad(y, [x, *tensors], dy.to(y.dtype))


def judge_layer(patched, plain, x, context=contextlib.nullcontext):
    """One layer with its base taken as it is, and the adapter judged in float64."""
    dy = torch.randn(*x.shape[:-1], plain.out_features).to(x.dtype)
    a, b = (getattr(plain, f"lora_{side}")["default"].weight for side in "AB")
    mine = [getattr(patched, f"lora_{side}")["default"].weight for side in "AB"]
    got = gradients(patched, mine, x, dy, context)
    baseline = gradients(plain, [a, b], x, dy, context)
    y, dx = gradients(plain.base_layer, [], x, dy, context)
    x, dy, a, b = (t.detach().double() for t in (x, dy, a, b))
    scale = plain.scaling["default"]
    ds, s, rows = scale * dy @ b, x @ a.T, (-1, dy.shape[-1])
    exact = (
        y.double() + scale * s @ b.T,
        dx.double() + ds @ a,
        ds.flatten(0, -2).T @ x.flatten(0, -2),
        scale * dy.reshape(rows).T @ s.flatten(0, -2),
    )
    for name, *of in zip(("y", "dx", "dA", "dB"), got, exact, baseline):
        assert_as_accurate(name, *of)


def test_eight_bits_without_a_mask_are_left_to_peft(folder, added):
    plain = made(folder, "int8")
    patched = copy.deepcopy(plain)
    report = accelerate(patched)
    assert not report.served and len(report.skipped) == 12
    (why,) = set(report.skipped.values())
    assert "8-bit layer waits for the GPU in every call" in why
    (y, g), (y0, g0) = run(patched), run(plain)
    assert torch.equal(y, y0) and len(g) == 24 and all(torch.equal(g[n], g0[n]) for n in g0)
    assert not added


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_class_and_is_served(kind, quantized, added):
    plain, patched = quantized(kind)
    name = CLASSES.get(kind, "torchao.TorchaoLoraLinear")
    kinds = {type(m) for m in lora_layers(plain).values()}
    assert {f"{k.__module__}.{k.__qualname__}" for k in kinds} == {f"peft.tuners.lora.{name}"}
    assert all(isinstance(m, Served) and why_not(m) is None for m in lora_layers(patched).values())
    y, _ = run(patched)
    assert len(added) == 12
    with patched.disable_adapter():
        assert not torch.equal(patched(input_ids=IDS).logits, y)
    assert len(added) == 12


# Of the model, of the adapters; whether under autocast.
REGIMES = [(BF16, FP32, False), (BF16, FP32, True), (BF16, BF16, False), (BF16, BF16, True),
           (FP32, FP32, False), (FP32, FP32, True)]  # fmt: skip
NEXT_OF_KIN = ("fp4", "torchao float8")  # of nf4 and torchao int8: half of the regimes will do
# torchao gives no gradient through quantised activations, and HQQ multiplies two dtypes.
STEPS = [
    (kind, *regime)
    for kind in KINDS
    for regime in REGIMES[1::2] + REGIMES[::2] * (kind not in NEXT_OF_KIN)
    if kind != "torchao int8 activations" and (kind, *regime) != ("hqq", FP32, FP32, True)
]


@pytest.mark.parametrize(("kind", "dtype", "adapters", "cast"), STEPS)
def test_a_training_step(kind, dtype, adapters, cast, quantized, added):
    plain, patched = quantized(kind, dtype, adapters=adapters)
    judge(patched, plain, autocast if cast else contextlib.nullcontext)
    assert len(added) == 12


@pytest.mark.parametrize(("dtype", "adapters", "cast"), REGIMES)
def test_a_forward_with_quantised_activations(dtype, adapters, cast, quantized, added):
    plain, patched = quantized("torchao int8 activations", dtype, adapters=adapters)
    with torch.no_grad(), autocast() if cast else contextlib.nullcontext():
        y, y0 = (m(input_ids=IDS).logits for m in (patched, plain))
    exact = in_float64(plain)(input_ids=IDS).logits
    assert_as_accurate("logits", y, exact, y0)
    assert len(added) == 12


# PEFT multiplies in fp32 where only the adapters are, the kernels in x's 16 bits.
LAYERS = [step for step in STEPS if step[1:] != (BF16, FP32, False)]


@pytest.mark.parametrize(("kind", "dtype", "adapters", "cast"), LAYERS)
def test_a_layer(kind, dtype, adapters, cast, quantized, added):
    plain, patched = quantized(kind, dtype, adapters=adapters)
    for name, width in (("0.self_attn.k_proj", 32), ("1.mlp.down_proj", 48)):
        x = torch.randn(2, 5, width).to(dtype)
        layers = layer_of(patched, name), layer_of(plain, name)
        judge_layer(*layers, x, autocast if cast else contextlib.nullcontext)
    assert len(added) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_keeps_its_share_and_the_backward_drops_the_same(kind, quantized):
    """With A and B the identity, y shows which elements of x were kept."""
    p, rows = 0.25, 512
    _, patched = quantized(kind, FP32, r=32, lora_alpha=32, lora_dropout=p)
    layer = layer_of(patched, "0.self_attn.q_proj").train()
    with torch.no_grad():
        for side in (layer.lora_A, layer.lora_B):
            side["default"].weight.copy_(torch.eye(32))
    x, dy = 1 + torch.rand(rows, 32), torch.randn(rows, 32)
    base, base_dx = gradients(layer.base_layer, [], x, dy, contextlib.nullcontext)
    y, dx = gradients(layer, [], x, dy, contextlib.nullcontext)
    kept = y - base > 0.5
    assert_close("y", y, base + kept * x / (1 - p))
    assert_close("dx", dx, base_dx + kept * dy / (1 - p))
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 5 * sigma
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_gradient_checkpointing(kind, reentrant, quantized, added):
    plain, patched = quantized(kind, reentrant=reentrant)
    judge(patched.train(), plain.train())
    once = len(added)
    assert 12 < once <= 24  # most layers again in the backward
    _, patched = quantized(kind, reentrant=reentrant, lora_dropout=0.5)
    steps = []
    for _ in range(2):
        torch.manual_seed(4)
        steps.append(run(patched.train()))
        patched.gradient_checkpointing_disable()
    assert len(added) == 2 * once + 12
    (y, g), (y0, g0) = steps
    assert torch.equal(y, y0) and all(torch.equal(g[n], g0[n]) for n in g0)
    patched.eval()
    assert not torch.equal(y, patched(input_ids=IDS).logits)


@pytest.mark.filterwarnings("ignore:Merge lora module to")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao int8", "torchao float8", "hqq"])
def test_merged_and_unmerged(kind, quantized, added):
    plain, patched = quantized(kind)
    q, q0 = (layer_of(m, "0.self_attn.q_proj") for m in (patched, plain))
    before = dequantised(q.base_layer).clone()
    for m in (patched, plain):
        with torch.no_grad():  # else HQQ's new weights are part of a graph
            m.merge_adapter()
    assert "merged" in why_not(q) and not torch.equal(dequantised(q.base_layer), before)
    assert torch.equal(patched(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert not added
    for m in (patched, plain):
        with torch.no_grad():
            m.unmerge_adapter()
    assert torch.equal(dequantised(q.base_layer), dequantised(q0.base_layer))
    judge(patched, plain)
    assert len(added) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapters(kind, quantized, folder, added):
    _, patched = quantized(kind, FP32)
    base = prepare_model_for_kbit_training(
        copy.deepcopy(loaded(folder, kind, FP32)), use_gradient_checkpointing=False
    )
    with patched.disable_adapter():
        assert torch.equal(patched(input_ids=IDS).logits, base(input_ids=IDS).logits)
    assert not added
    assert not torch.equal(patched(input_ids=IDS).logits, base(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation(kind, quantized, added):
    plain, patched = quantized(kind, FP32, init_std=0.3)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(*(m.generate(IDS, **options) for m in (patched, plain)))
    assert len(added) == 12 * 6


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_load_where_nothing_is_patched(kind, quantized, folder, tmp_path):
    plain, patched = quantized(kind)
    patched.save_pretrained(tmp_path)
    base = prepare_model_for_kbit_training(
        copy.deepcopy(loaded(folder, kind, BF16)), use_gradient_checkpointing=False
    )
    model = PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(m, Served) for m in model.modules())
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopies_stay_patched_and_stand_alone(kind, quantized, added):
    plain, patched = quantized(kind, FP32)
    other = copy.deepcopy(patched)
    restore(patched)
    assert torch.equal(patched(input_ids=IDS).logits, plain(input_ids=IDS).logits) and not added
    y, y0 = other(input_ids=IDS).logits, plain(input_ids=IDS).logits
    assert_as_accurate("logits", y, in_float64(plain)(input_ids=IDS).logits, y0)
    assert len(added) == 12


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])  # no model of the others can be pickled
def test_pickles_hold_pefts_layers(kind, folder):
    plain = made(folder, kind)
    patched = copy.deepcopy(plain)
    accelerate(patched)
    patched(input_ids=IDS)
    model = pickle.loads(pickle.dumps(patched))
    assert not any(isinstance(m, Served) for m in model.modules())
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8", "hqq"])
def test_masks(kind, quantized, folder, added):
    masks = masks_of(made(folder, kind), 0.5)
    plain, patched = quantized(kind, masks=masks)
    (y, g), (y0, g0), (ye, ge) = run(patched), run(plain), run(in_float64(plain))
    assert_as_accurate("logits", y, ye, y0)
    for name, mask in masks.items():
        for side, m in (("lora_A", mask.a), ("lora_B", mask.b)):
            n = f"{name}.{side}.default.weight"
            assert not g[n][~m].any()
            assert_as_accurate(n, g[n][m], ge[n][m], g0[n][m], NETWORK_FACTOR)
    assert len(added) == 12


def by_example(model, losses):
    """Σ g and Σ g² of PEFT's own gradients, each example's by itself."""
    parameters = adapter_parameters(model)
    g = {n: torch.zeros_like(p) for n, p in parameters.items()}
    squared = copy.deepcopy(g)
    for loss in losses:
        grads = torch.autograd.grad(loss, [*parameters.values()], retain_graph=True)
        for n, grad in zip(parameters, grads):
            g[n] += grad
            squared[n] += grad.square()
    return g, squared


def alone(model, example):
    """The loss of one example, in the model's dtype."""
    ids = torch.tensor([example.prompt + example.completion])
    logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
    return nn.functional.cross_entropy(logits, torch.tensor(example.completion))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "torchao int8", "hqq"])
def test_importance_of_each_example(kind, packed, quantized, added):
    """Exact: one example at a time. The baseline is PEFT on the same batches, since what a batch
    does to the rounding of the base is not to be judged."""
    ids = torch.randint(3, 1000, (40,)).tolist()
    examples = [Example(ids[:n], ids[n : n + m]) for n, m in ((2, 14), (3, 9), (5, 1))]
    plain, patched = quantized(kind, FP32, init_std=0.1)
    sums = accumulate(patched, examples, batch_size=2, packed=packed)
    assert sums.count == 3 and len(added) >= 24
    batches = (batch_losses(plain, b, 0, packed=packed) for b in (examples[:2], examples[2:]))
    baseline = by_example(plain, itertools.chain.from_iterable(batches))
    exact_model = in_float64(plain)
    exact = by_example(exact_model, (alone(exact_model, e) for e in examples))
    for got, base, ref in zip((sums.g, sums.g_squared), baseline, exact):
        assert got.keys() == base.keys() and len(got) == 24
        for n in got:
            assert_as_accurate(n, *(t.cpu() for t in (got[n], ref[n], base[n])), NETWORK_FACTOR)


@pytest.mark.parametrize("kind", ["nf4", "int8"])  # PEFT refuses it on the others
def test_lora_bias_is_left_to_peft(kind, folder, added):
    plain = made(folder, kind, lora_bias=True)
    patched = copy.deepcopy(plain)
    report = accelerate(patched)
    assert not report.served and len(report.skipped) == 12
    why = "lora_bias=True on a base layer that makes its own output"
    assert set(report.skipped.values()) == {why}
    (y, g), (y0, g0) = run(patched), run(plain)
    assert torch.equal(y, y0) and len(g) == 36 and all(torch.equal(g[n], g0[n]) for n in g0)
    assert not added


def test_hooks_on_a_quantised_base_fire(quantized, added):
    plain, patched = quantized("nf4")
    calls = []
    layers = [layer_of(m, "0.self_attn.q_proj") for m in (patched, plain)]
    for layer in layers:
        base = layer.base_layer
        base.register_forward_pre_hook(lambda m, a: calls.append("pre") or (a[0] * 2,))
        base.register_forward_hook(lambda m, a, y: calls.append("post") or y * 3)
        base.register_full_backward_hook(lambda m, dx, dy: calls.append("back") or (dx[0] * 4,))
    judge_layer(*layers, torch.randn(2, 5, 32))
    assert calls == ["pre", "post", "back"] * 3 and len(added) == 1


def test_an_output_that_is_no_plain_tensor_is_left_to_peft(quantized, added):
    class Wrapped(torch.Tensor):
        pass

    layers = [layer_of(m, "0.self_attn.q_proj") for m in quantized("nf4")]
    for layer in layers:
        layer.base_layer.register_forward_hook(lambda m, a, y: y.as_subclass(Wrapped))
    x = torch.randn(2, 32)
    y0, y = (layer(x) for layer in layers)
    assert type(y) is type(y0) is Wrapped and torch.equal(y, y0) and not added


class Holder(nn.Module):
    """One layer under a name, and a parameter, from which PEFT knows the device."""

    def __init__(self, layer):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(1), False)
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def around(base, kind=None, *, adapters=FP32, **changes):
    """PEFT's layer over `base`, of its class `kind`, and a patched copy, with the report."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"]}
    config = LoraConfig(**(settings | changes))
    if kind is not None:
        config._register_custom_module({type(base): kind})
    plain = get_peft_model(Holder(base), config)
    for name, p in plain.named_parameters():
        if "lora_" in name:
            p.data = (torch.randn(p.shape) / 4).to(adapters)
    patched = copy.deepcopy(plain)
    report = accelerate(patched)
    layers = [m.base_model.model.layer for m in (plain, patched)]
    assert kind is None or type(layers[0]) is getattr(kind, "func", kind)
    return *layers, report


class StandIn(nn.Module):
    """A quantised layer as it looks to PEFT, with an output of a dtype of its own."""

    def __init__(self, compute=FP32):
        super().__init__()
        self.in_features, self.out_features, self.compute = 48, 32, compute
        self.register_buffer("qweight", torch.randint(-8, 8, (32, 48), dtype=torch.int8))

    def forward(self, x):
        with torch.autocast(DEVICE, enabled=False):
            return x.to(self.compute) @ (self.qweight.to(self.compute) / 64).T


# module of PEFT's class: its name; the library beside which it is defined, and what of that
WITHOUT_LIBRARIES = {
    "gptq": ("GPTQLoraLinear", None, None),
    "awq": ("AwqLoraLinear", None, None),
    "te": ("TeLinear", None, None),
    "eetq": ("EetqLoraLinear", "eetq", "EetqLinear"),
    "aqlm": ("AqlmLoraLinear", "aqlm", "QuantizedLinear"),
    "inc": ("IncLoraLinear", "neural_compressor", "Module"),
}


def peft_class(module, monkeypatch):
    """PEFT's class of that module, defined as if its library were there."""
    name, library, part = WITHOUT_LIBRARIES[module]
    where = f"peft.tuners.lora.{module}"
    if library is not None:
        stub = ModuleType(library)
        setattr(stub, part, type(part, (nn.Module,), {}))
        monkeypatch.setitem(sys.modules, library, stub)
        monkeypatch.setattr(peft.import_utils, f"is_{module}_available", lambda: True)
        monkeypatch.setattr(peft_lora, module, getattr(peft_lora, module))  # the import sets it
        monkeypatch.delitem(sys.modules, where)
    return getattr(importlib.import_module(where), name)


# Of x, of the adapter, of the base's output; whether under autocast.
STAND_INS = [
    (FP32, FP32, FP32, False),
    (BF16, BF16, BF16, False),
    (FP32, FP32, FP16, False),
    (FP32, FP32, FP16, True),
    (BF16, FP32, BF16, True),
    (BF16, BF16, FP32, False),
]


@pytest.mark.parametrize(("dtype", "adapters", "compute", "cast"), STAND_INS)
@pytest.mark.parametrize("module", WITHOUT_LIBRARIES)
def test_classes_of_other_libraries(module, dtype, adapters, compute, cast, monkeypatch, added):
    kind = peft_class(module, monkeypatch)
    plain, patched, report = around(StandIn(compute), kind, adapters=adapters)
    assert list(report.served.values()) == ["lora_add"]
    context = autocast if cast else contextlib.nullcontext
    judge_layer(patched, plain, torch.randn(2, 5, 48).to(dtype), context)
    mixed = cast and compute == FP16  # with bf16: how PEFT adds them up depends on the class
    assert len(added) == (not mixed)
    if module in ("inc", "te"):
        error = NotImplementedError
    else:
        error = AttributeError if module == "eetq" else None
    for layer in (patched, plain) if error else ():
        with pytest.raises(error):
            layer.merge()


def test_qalora_is_left_to_peft(monkeypatch, added):
    kind = peft_class("gptq", monkeypatch)
    plain, patched, report = around(StandIn(), kind, use_qalora=True, qalora_group_size=4)
    assert list(report.skipped.values()) == ["a QALoraLinearVariant, not plain LoRA"]
    x = torch.randn(3, 48)
    assert torch.equal(patched(x), plain(x)) and not added


class Column(nn.Linear):
    """As much of Megatron's class as PEFT needs."""

    gather_output = False

    def __init__(self, input_size, output_size, **options):
        super().__init__(input_size, output_size, bias=False)


class ColumnWithBias(Column):
    def forward(self, x):
        return super().forward(x), None


def test_megatrons_layers_are_left_to_peft(added):
    from peft.tuners.lora.tp_layer import LoraParallelLinear

    parts = SimpleNamespace(ColumnParallelLinear=Column, RowParallelLinear=type("Row", (), {}))
    options = {"backend": parts, "megatron_config": SimpleNamespace()}
    kind = functools.partial(LoraParallelLinear, **options)
    plain, patched, report = around(ColumnWithBias(48, 32), kind, init_lora_weights=False)
    (why,) = report.skipped.values()
    assert "tp_layer.LoraParallelLinear, no LoRA layer over one linear layer" in why
    x = torch.randn(3, 48)
    (y, bias), (y0, _) = patched(x), plain(x)
    assert torch.equal(y, y0) and bias is None and not added


@pytest.mark.parametrize("name", sorted(SERVED))
def test_each_class_that_is_served_exists(name):
    """In PEFT's source: most of the modules define it beside its library only."""
    module, _, kind = name.rpartition(".")
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    assert kind in [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class StandInPair(StandIn):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize("module", [None, "gptq", "te"])
def test_a_base_that_returns_a_tuple_fails_as_in_peft(module, monkeypatch, added):
    kind, base = None, Pair(48, 32)
    if module is not None:
        kind, base = peft_class(module, monkeypatch), StandInPair()
    for layer in around(base, kind)[:2]:
        with pytest.raises(AttributeError, match="'tuple' object has no attribute 'dtype'"):
            layer(torch.randn(3, 48))
    assert not added


class Float8(nn.Linear):
    """A weight in 8 bits and one scale, as in checkpoints of that kind."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        weight = self.weight.detach()
        self.scale = weight.abs().max() / 448
        self.weight = nn.Parameter((weight / self.scale).to(torch.float8_e4m3fn), False)

    def forward(self, x):
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias.to(x.dtype))


def finegrained(monkeypatch):
    """transformers' layer, with a forward that needs no GPU."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")

    def forward(self, x):
        scale = self.weight_scale_inv.detach().repeat_interleave(16, 0).repeat_interleave(16, 1)
        return nn.functional.linear(x, (self.weight.to(FP32) * scale).to(x.dtype))

    monkeypatch.setattr(module.FP8Linear, "forward", forward)
    layer = module.FP8Linear(48, 32, block_size=(16, 16))
    weight = (torch.randn(32, 48) / 7).to(layer.weight.dtype)
    layer.weight = nn.Parameter(weight, False)
    layer.weight_scale_inv.data = torch.rand(2, 3)
    return layer


def doubling(monkeypatch):
    return type("Doubling", (nn.Linear,), {"forward": lambda m, x: 2 * nn.Linear.forward(m, x)})(
        48, 32
    )


@pytest.mark.parametrize(("dtype", "adapters", "cast"), [(FP32, FP32, False), (FP32, FP32, True),
                                                         (BF16, BF16, False)])  # fmt: skip
@pytest.mark.parametrize("make", [finegrained, doubling, lambda m: Float8(48, 32)],
                         ids=["FP8Linear", "subclass", "float8"])  # fmt: skip
def test_subclasses_of_linear(make, dtype, adapters, cast, monkeypatch, added):
    base = make(monkeypatch)
    base = base.to(dtype) if base.weight.dtype == FP32 else base
    plain, patched, report = around(base, adapters=adapters)
    assert list(report.served.values()) == ["lora_add"] and type(plain) is peft_lora.Linear
    context = autocast if cast else contextlib.nullcontext
    judge_layer(patched, plain, torch.randn(2, 5, 48).to(dtype), context)
    assert len(added) == 1


@pytest.mark.parametrize("context", [contextlib.nullcontext, autocast])
def test_conv1d(context, added):
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    config._attn_implementation = "eager"
    targets = ["c_attn", "c_fc", "c_proj"]
    model = GPT2LMHeadModel(config).eval()
    plain = make_lora(model, target_modules=targets, fan_in_fan_out=True)
    patched = copy.deepcopy(plain)
    report = accelerate(patched)
    assert list(report.served.values()) == ["lora_add"] * 8
    compare(patched, plain, context)
    assert len(added) == 8
    for m in (patched, plain):
        m.merge_adapter()
    assert torch.equal(patched(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    for m in (patched, plain):
        m.unmerge_adapter()
    compare(patched, plain, context)
    assert len(added) == 16


WITHOUT = """
import sys

LIBRARIES = ("bitsandbytes", "torchao", "hqq", "gptqmodel", "awq", "aqlm", "eetq",
             "transformer_engine", "neural_compressor")
sys.modules.update(dict.fromkeys(LIBRARIES))  # as if they were not installed

def seen(event, args):
    if event == "import" and args[0].partition(".")[0] in LIBRARIES:
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        assert not frame.f_globals["__name__"].startswith("lorapar"), args[0]

sys.addaudithook(seen)
from against_peft import compare, pair
from lorapar import accelerate

plain, patched = pair()
assert len(accelerate(patched).served) == 12
compare(patched, plain)
assert not any(sys.modules.get(name) for name in LIBRARIES)
print("served")
"""


@pytest.mark.slow
def test_an_unquantised_model_needs_no_library_of_these():
    """Where they are missing all goes on, and this package does not even look for one."""
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path}\n{WITHOUT}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout == "served\n", ran.stderr[-2000:]
