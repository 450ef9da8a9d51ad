"""Plans: what the calls of a layer were made of, for the next ones; decoding and training."""

import copy
import weakref

import pytest
import torch
from conftest import DEVICE, make_lora, make_tiny_model
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorapar.calls import COPY, SUMS
from lorapar.patch import accelerate, lora_layers, restore
from lorapar.served import PLAN
from lorapar_kernels import ImportanceSums, LoraMask, extension, plan
from lorapar_kernels.testing import assert_close

BF16 = torch.bfloat16
MODES = {"decoding": False, "training": True}


def planned_layer(trains=False, *, training=None, name="o_proj", **changes):
    """A served layer that has a plan, and its x, of which there are few rows."""
    base = make_tiny_model(attention_bias=True, tie_word_embeddings=False).to(BF16)
    settings = {"lora_dropout": 0.5, "target_modules": ["o_proj", "up_proj", "gate_proj"]}
    model = make_lora(base, **(settings | changes)).to(DEVICE)
    model.train(trains if training is None else training)
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data = p.data.float()
    accelerate(model)
    layer = next(m for n, m in lora_layers(model).items() if name in n)
    x = torch.randn(3, 1, layer.in_features, dtype=BF16, device=DEVICE)
    with torch.set_grad_enabled(trains):
        layer(x)
    assert plan_of(layer) is not None
    return layer, x


def plan_of(layer):
    return layer.__dict__[PLAN].plan


def forget(layer):
    layer.__dict__[PLAN].plan = None


def by_plan(layer, x, trains=False):
    """y of the layer's plan, or whether that holds."""
    with torch.set_grad_enabled(trains):
        return plan.planned(plan_of(layer), layer.__dict__, x)


def by_layer(layer, x, trains=False):
    with torch.set_grad_enabled(trains):
        return layer(x)


def from_seed(function, *arguments):
    """What it gives, and what the generator gives next."""
    torch.manual_seed(5)
    return function(*arguments), torch.rand(1, device=DEVICE)


@pytest.mark.parametrize("trains", MODES.values(), ids=MODES)
@pytest.mark.parametrize("training", [False, True])
def test_a_plan_gives_the_bits_of_a_call_without_it(training, trains, cuda_backend):
    layer, x = planned_layer(trains, training=training)
    y, after = from_seed(by_plan, layer, x, trains)
    forget(layer)
    again, after_again = from_seed(by_layer, layer, x, trains)
    assert torch.equal(y, again) and y.shape == (3, 1, layer.out_features)
    assert torch.equal(after, after_again) and y.requires_grad is trains


def test_a_plan_gives_the_gradients_of_a_call_without_it(cuda_backend):
    layer, x = planned_layer(True)
    leaves = [x.requires_grad_(), _a(layer).weight, layer.lora_B["default"].weight]
    (y, _), dy = from_seed(by_plan, layer, x, True), torch.randn(3, 1, layer.out_features)
    dy = dy.to(y)
    found = torch.autograd.grad(y, leaves, dy)
    forget(layer)
    (y, _) = from_seed(by_layer, layer, x, True)
    for one, other in zip(found, torch.autograd.grad(y, leaves, dy), strict=True):
        assert torch.equal(one, other) and one.any()


def test_a_plan_drops_what_training_drops(cuda_backend):
    layer, x = planned_layer(training=True)
    y, after = from_seed(by_plan, layer, x)
    trained, after_trained = from_seed(layer, x)  # with autograd
    assert trained.requires_grad and torch.equal(after, after_trained)
    assert_close("y", y, trained.detach())
    other, _ = by_plan(layer, x), layer.eval()
    assert not torch.equal(other, y) and by_plan(layer, x) is False


def test_a_reentrant_checkpoint_recomputes_with_the_same_dropout(cuda_backend):
    """Its first forward is without autograd: of few rows it is decoding to us."""
    layer, x = planned_layer(training=True)
    seen = []

    def run(x):
        y = layer(x)
        seen.append((y.requires_grad, y.detach()))
        return y

    checkpoint(run, x.requires_grad_(), use_reentrant=True).sum().backward()
    (recorded, first), (recorded_again, again) = seen
    assert recorded_again and not recorded
    assert_close("y", again, first)


def test_a_checkpoint_recomputes_what_a_plan_gave(cuda_backend):
    layer, x = planned_layer(True)
    leaves, grads = [x.requires_grad_(), _a(layer).weight, layer.lora_B["default"].weight], []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        y, _ = from_seed(run, x)
        grads.append(torch.autograd.grad(y.float().square().sum(), leaves))
    assert all(torch.equal(one, other) for one, other in zip(*grads)) and grads[0][0].any()


def test_what_a_plan_holds_is_not_kept_longer(cuda_backend):
    layer, x = planned_layer(True)
    weight, layer.base_layer = weakref.ref(layer.base_layer.weight), nn.Identity()
    assert weight() is not None
    layer(x)
    assert weight() is None and plan_of(layer) is None


def test_accelerate_and_restore_forget_plans(cuda_backend):
    layer, x = planned_layer(True)
    accelerate(layer)
    assert plan_of(layer) is None
    layer(x)
    layer.delete_adapter("default")
    assert plan_of(layer) is None
    restore(layer)
    assert PLAN not in layer.__dict__


def test_a_plan_ends_with_another_p(cuda_backend):
    layer, x = planned_layer(training=True)
    layer.lora_dropout["default"].p = 0.25
    assert by_plan(layer, x) is False
    by_layer(layer, x)
    assert type(by_plan(layer, x)) is torch.Tensor and plan_of(layer).dropout_p == 0.25


def _switch(layer):
    layer.update_layer("other", 4, lora_alpha=8, config=LoraConfig())
    layer.set_adapter("other")


def _list_of_two(layer):
    layer.update_layer("other", 4, lora_alpha=8, config=LoraConfig())
    layer._active_adapter = active = ["default"]
    with torch.no_grad():
        layer(torch.ones(1, 1, layer.in_features, dtype=BF16, device=DEVICE))
    assert plan_of(layer) is not None
    active.append("other")


def _forward(module):
    def change(layer):
        found = module(layer)
        found.forward = lambda x: 2 * type(found).forward(found, x)

    return change


def _hook(module):
    return lambda layer: module(layer).register_forward_hook(lambda m, x, y: 2 * y)


def _a(layer):
    return layer.lora_A["default"]


def _set(**values):
    return lambda layer: layer.__dict__.update(values)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "scale": lambda layer: layer.set_scale("default", 0.25),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "another adapter": _switch,
    "two adapters in the list": _list_of_two,
    "training": lambda layer: layer.train(not layer.training),
    "hook on A": _hook(_a),
    "backward hook on A": lambda layer: _a(layer).register_full_backward_hook(lambda *of: None),
    "hook on the base": _hook(lambda layer: layer.base_layer),
    "hook on dropout": _hook(lambda layer: layer.lora_dropout["default"]),
    "forward of A": _forward(_a),
    "forward of the base": _forward(lambda layer: layer.base_layer),
    "parametrised base": lambda layer: nn.utils.parametrizations.weight_norm(layer.base_layer),
    "class of the base": lambda layer: setattr(layer.base_layer, "__class__", Twice),
    "class of A": lambda layer: setattr(_a(layer), "__class__", Twice),
    "another base": lambda layer: layer._modules.update(base_layer=copy.deepcopy(layer.base_layer)),
    "base that trains": lambda layer: layer.base_layer.weight.requires_grad_(),
    "fp32 base": lambda layer: layer.base_layer.float(),
    "float64 adapter": lambda layer: _a(layer).double(),
    "other parameters": lambda layer: _a(layer).__setstate__(
        {"_parameters": dict(_a(layer)._parameters)}
    ),
    "other modules": lambda layer: vars(layer.lora_A).update(_modules=dict(layer.lora_A._modules)),
    "no cast": _set(cast_input_dtype_enabled=False),
    "mask": lambda layer: layer.__dict__.update(_lorapar_masks={"default": mask_of(layer)}),
    "tensor-parallel": lambda layer: layer.base_layer.__dict__.update(_hf_tp_plan="colwise"),
    "bias of B": lambda layer: layer.lora_B["default"].register_parameter(
        "bias", nn.Parameter(torch.ones(layer.out_features, device=DEVICE))
    ),
}


# Seen in each call, which is left to the long way; the plan itself holds.
STAYING = [CHANGES[name] for name in ("base that trains", "fp32 base", "float64 adapter")]


def mask_of(layer):
    """Column 1 of the rank is dead."""
    a, b = _a(layer).weight, layer.lora_B["default"].weight
    live = torch.arange(len(a), device=DEVICE) != 1
    return LoraMask(live[:, None].repeat(1, a.shape[1]), live.repeat(len(b), 1), live=live)


@pytest.mark.parametrize("trains", MODES.values(), ids=MODES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_plan_ends_with_what_it_was_made_of(change, trains, cuda_backend):
    layer, x = planned_layer(trains)
    assert type(by_plan(layer, x, trains)) is torch.Tensor
    change(layer)
    assert by_plan(layer, x, trains) is (change in STAYING)


@pytest.mark.parametrize("trains", MODES.values(), ids=MODES)
def test_a_plan_reads_the_weights_as_they_are(trains, cuda_backend):
    layer, x = planned_layer(trains, lora_dropout=0.0)
    before = by_plan(layer, x, trains)
    for module in (_a(layer), layer.lora_B["default"], layer.base_layer):
        grad = module is not layer.base_layer
        module.weight = nn.Parameter(module.weight.detach() * 1.5, requires_grad=grad)
        after = by_plan(layer, x, trains)
        assert not torch.equal(before, after)
        before = after
    with torch.no_grad():
        layer.base_layer.bias = nn.Parameter(layer.base_layer.bias + 1, requires_grad=False)
    after = by_plan(layer, x, trains)
    forget(layer)
    assert not torch.equal(before, after) and torch.equal(after, by_layer(layer, x, trains))


@pytest.mark.parametrize("trains", MODES.values(), ids=MODES)
def test_a_plan_with_dead_columns(trains, cuda_backend):
    layer, x = planned_layer(trains, lora_dropout=0.0)
    layer.__dict__["_lorapar_masks"] = {"default": mask_of(layer)}
    y = by_layer(layer, x, trains)
    assert torch.equal(y, by_plan(layer, x, trains))
    _a(layer).weight.data = _a(layer).weight.data[:2]
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data[:, :2]
    assert by_plan(layer, x, trains) is True  # its live columns lie outside


def test_a_plan_trains_what_a_mask_lets_train(cuda_backend):
    layer, x = planned_layer(True)
    a, b = _a(layer).weight, layer.lora_B["default"].weight
    mask = LoraMask(torch.rand_like(a) < 0.5, torch.rand_like(b) < 0.5)
    layer.__dict__["_lorapar_masks"] = {"default": mask}
    by_layer(layer, x, True)
    (da, db) = torch.autograd.grad(by_plan(layer, x, True).sum(), (a, b))
    assert not da[~mask.a].any() and not db[~mask.b].any() and da.any() and db.any()


def test_a_plan_sees_a_mask_come_and_go(cuda_backend):
    layer, x = planned_layer()
    masks = layer.__dict__["_lorapar_masks"] = {}
    without = by_layer(layer, x)
    assert type(by_plan(layer, x)) is torch.Tensor
    masks["default"] = mask_of(layer)
    assert by_plan(layer, x) is False
    assert not torch.equal(by_layer(layer, x), without)
    assert type(by_plan(layer, x)) is torch.Tensor
    masks.clear()
    assert by_plan(layer, x) is False


def test_a_plan_sees_sums_come_and_go(cuda_backend):
    layer, x = planned_layer(True)
    sums = ImportanceSums(_a(layer).weight, layer.lora_B["default"].weight)
    sums.examples(torch.tensor([0, 3], dtype=torch.int32, device=DEVICE))
    layer.__dict__[SUMS] = sums
    assert by_plan(layer, x, True) is False
    layer(x).sum().backward()
    assert sums.b.any() and layer.lora_B["default"].weight.grad is None
    assert plan_of(layer) is None
    del layer.__dict__[SUMS]
    by_layer(layer, x, True)
    assert by_plan(layer, x, True).requires_grad


def test_layers_of_a_group_train_together(cuda_backend):
    layer, x = planned_layer(name="gate_proj")
    assert type(by_plan(layer, x)) is torch.Tensor  # decoding, each alone
    assert by_plan(layer, x, True) is True


def test_a_copy_of_the_weight_is_not_planned_for(cuda_backend):
    layer, x = planned_layer(True)
    layer.__dict__[COPY] = None
    assert by_plan(layer, x, True) is True


@pytest.mark.parametrize("trains", MODES.values(), ids=MODES)
def test_calls_that_a_plan_leaves_alone(trains, cuda_backend, monkeypatch):
    layer, x = planned_layer(trains)
    made, state = plan_of(layer), layer.__dict__
    for other in (x.double(), x[..., 1:], x.to("meta"), x.as_subclass(Sub)):
        assert by_plan(layer, other, trains) is True
    seen = []
    with torch.set_grad_enabled(trains):
        torch.func.vmap(lambda of: (seen.append(plan.planned(made, state, x)), of)[1])(x)
    monkeypatch.setenv("LORAPAR_BACKEND", "triton")
    seen.append(by_plan(layer, x, trains))
    monkeypatch.setenv("LORAPAR_BACKEND", "")
    with torch.autograd.forward_ad.dual_level():
        seen.append(not by_plan(layer, x, trains))
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: None)
    seen.append(not by_plan(layer, x, trains))
    handle.remove()
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, x, y: None)
    seen.append(not by_plan(layer, x, trains))
    handle.remove()
    assert seen == [True] * 5 and type(by_plan(layer, x, trains)) is torch.Tensor
    monkeypatch.setattr(extension, "module", None)
    assert by_plan(layer, x, trains) is True


def test_decoding_is_of_few_rows_and_in_the_dtype_of_x(cuda_backend, monkeypatch):
    layer, x = planned_layer()
    monkeypatch.delenv("LORAPAR_BACKEND")
    monkeypatch.setattr(extension, "chosen", lambda *size: False)
    for other in (x.float(), x.expand(3, 22, -1)):
        assert by_plan(layer, other) is True
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert by_plan(layer, x) is True
    assert type(by_plan(layer, x)) is torch.Tensor  # no choice of `chosen`
    assert by_plan(layer, x, True) is True


def test_the_choice_is_asked_once_the_plan_holds(cuda_backend, monkeypatch):
    layer, x = planned_layer(True)
    asked, made = [], plan_of(layer)
    monkeypatch.delenv("LORAPAR_BACKEND")
    monkeypatch.setattr(extension, "chosen", lambda *size: asked.append(size) or len(asked) > 1)
    assert by_plan(layer, x, True) is True
    assert by_plan(layer, x, True).requires_grad
    assert asked == [(3, layer.in_features, layer.out_features, 2, 1, 4)] * 2
    assert plan_of(layer) is made


def test_a_plan_follows_autocast(cuda_backend):
    layer, x = planned_layer(True, lora_dropout=0.0)
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = by_plan(layer, x, True)
        assert y.dtype == torch.float16
        forget(layer)
        assert torch.equal(y, layer(x))


class Sub(torch.Tensor):
    pass


def test_a_plan_is_its_layers_own(cuda_backend):
    layer, x = planned_layer()
    assert PLAN not in copy.deepcopy(layer).__dict__ and PLAN not in copy.copy(layer).__dict__
    copied = copy.deepcopy(layer)
    assert torch.equal(by_layer(copied, x), by_plan(layer, x)) and plan_of(copied) is not None
    replica = layer._replicate_for_data_parallel()
    replica._modules = dict(layer._modules)
    assert by_plan(replica, x) is False
    gone = weakref.ref(layer)
    del layer, replica, copied
    assert gone() is None  # no cycle keeps it
