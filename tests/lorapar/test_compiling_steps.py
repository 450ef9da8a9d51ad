"""Steps of compiled layers: what a step is, its gradients, masks, checkpoints and modes."""

import copy

import pytest
import torch
from against_peft import IDS, compare, run
from compiled_net import (
    TWO_CALLS,
    assert_equal_steps,
    breaks,
    cells,
    gradients,
    graphs,
    inputs,
    llama,
    loss,
    net,
    shapes_of,
    step,
    tower,
)
from conftest import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorapar.compiling import Compilation
from lorapar.patch import accelerate, lora_layers, restore
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

pytest_plugins = "compiled_net"
pytestmark = pytest.mark.usefixtures("fresh")


# Steps of CUDA graphs ---------------------------------------------------------------------------


def test_training_marks_every_forward(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    for steps in range(1, 4):
        value = loss(model)
        assert len(marks) == steps
        value.backward()
    assert len(marks) == 3
    restore(model)
    loss(model)
    assert len(marks) == 3


def test_without_graphs_nothing_is_marked(marks, monkeypatch):
    monkeypatch.setattr(Compilation, "records", False)
    model = net()
    accelerate(model, compile="default")
    loss(model).backward()
    assert not marks


def test_no_mark_while_a_backward_is_to_come(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    one, other = loss(model), loss(model)
    assert len(marks) == 1
    one.backward()
    third = loss(model)  # the backward of `other` is still to come
    assert len(marks) == 1
    with torch.no_grad():
        loss(model)
    assert len(marks) == 1
    (other + third).backward()
    loss(model).backward()
    assert len(marks) == 2


def test_a_forward_that_is_dropped_is_not_waited_for(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    kept = loss(model)
    del kept
    kept = loss(model)
    assert len(marks) == 2
    loss(model)
    assert len(marks) == 2
    del kept
    loss(model)
    assert len(marks) == 3


def test_forwards_without_grad_are_steps(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    for steps in range(1, 4):
        with torch.no_grad():
            y = model(inputs())
        assert len(marks) == steps and not y.requires_grad


def test_an_exception_leaves_no_forward_to_wait_for(marks):
    model = net()
    accelerate(model, compile="reduce-overhead")
    cells(model)[1].broken = True
    for steps in (1, 2):
        with pytest.raises(ValueError, match="broken"):
            loss(model)
        assert len(marks) == steps
    cells(model)[1].broken = False
    loss(model).backward()
    assert len(marks) == 3


@pytest.mark.parametrize("around", ["cells", "tower"])
@pytest.mark.parametrize("kind", TWO_CALLS)
def test_what_a_checkpoint_recomputes_is_no_step(kind, around, marks):
    plain, model = net(), net()
    for m in (plain, model):
        if around == "cells":
            tower(m).checkpoints = TWO_CALLS[kind]
        else:
            inner = tower(m)
            m.base_model.model.tower = Around(inner, TWO_CALLS[kind])
    report = accelerate(model, compile="reduce-overhead")
    for steps in range(1, 4):
        got = step(model)
        assert len(marks) == steps
        assert_equal_steps(got, step(plain))
    assert shapes_of(report) == {(5, 3, 8): 3 * 2 * 3}  # each layer twice a step


class Around(nn.Module):
    """The user's own checkpoint around all layers."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_what_hooks_save_is_not_recorded(kind, marks, monkeypatch):
    """A checkpoint that is not reentrant holds tensors for longer than graphs allow. Such a layer
    is compiled all the same."""
    seen = []

    def compile(function, mode="default", **options):
        return lambda *args, **kwargs: seen.append(mode) or function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    plain, model = net(), net()
    tower(model).checkpoints = TWO_CALLS[kind]
    accelerate(model, compile="reduce-overhead")
    for _ in range(2):
        seen.clear()
        assert_equal_steps(step(model), step(plain))
        recorded = "reduce-overhead" if TWO_CALLS[kind] else "default"
        assert len(seen) == 6 and set(seen[:3]) == {recorded}
    tower(model).checkpoints = None
    seen.clear()
    step(model)
    assert seen == ["reduce-overhead"] * 3


# Gradients that are kept ------------------------------------------------------------------------


@pytest.fixture
def copies(marks, monkeypatch):
    """How many gradients are copied."""
    seen, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, **k: seen.append(t) or clone(t, **k))
    return seen


def test_a_kept_gradient_is_copied_once(copies):
    plain, model = net(), net()
    accelerate(model, compile="reduce-overhead")
    trained = [p for p in model.parameters() if p.requires_grad]
    loss(model).backward()
    made = [p.grad for p in trained]
    assert not copies
    second = loss(model)
    assert len(copies) == len(trained) == 18
    kept = [p.grad for p in trained]
    assert all(k is not m and torch.equal(k, m) for k, m in zip(kept, made))
    second.backward()
    loss(model).backward()
    assert len(copies) == 18 and all(p.grad is k for p, k in zip(trained, kept))  # in place
    for _ in range(3):
        loss(plain).backward()
    assert_equal_steps((kept[0], gradients(model)), (kept[0], gradients(plain)))


def test_gradients_that_are_set_to_none_are_not_copied(copies):
    model = net()
    accelerate(model, compile="reduce-overhead")
    for _ in range(3):
        loss(model).backward()
        model.zero_grad(set_to_none=True)
    assert not copies


def test_zeroed_gradients_are_copied_once(copies):
    model = net()
    accelerate(model, compile="reduce-overhead")
    for _ in range(4):
        loss(model).backward()
        model.zero_grad(set_to_none=False)
    assert len(copies) == 18


def test_gradients_of_what_else_trains_in_a_layer_are_copied(copies):
    model = net()
    scales = [cell.scale.weight.requires_grad_() for cell in cells(model)]
    accelerate(model, compile="reduce-overhead")
    loss(model).backward()
    made = [p.grad for p in scales]
    loss(model)
    assert all(p.grad is not m for p, m in zip(scales, made)) and len(copies) == 18 + 3


# Masks ------------------------------------------------------------------------------------------


def masks_for(model, seed):
    generator = torch.Generator().manual_seed(seed)

    def some(p):
        return (torch.rand(p.shape, generator=generator) < 0.5).to(p.device)

    return {
        name: LoraMask(some(m.lora_A["default"].weight), some(m.lora_B["default"].weight))
        for name, m in lora_layers(model).items()
    }


def assert_masked(model, plain, masks):
    """Exact zeros where frozen, and the gradient elsewhere."""
    (y, g), (y0, g0) = step(model), step(plain)
    assert_close("y", y, y0)
    assert g.keys() == g0.keys()
    for name, mask in masks.items():
        for side, m in (("lora_A", mask.a), ("lora_B", mask.b)):
            key = f"{name}.{side}.default.weight"
            assert not g[key][~m].any() and g[key][m].any(), key
            assert_close(key, g[key][m], g0[key][m])


def test_masks_that_change_are_honoured(traced):
    plain, model = net(4), net(4)
    for seed in (1, 2, 1):
        masks = masks_for(model, seed)
        report = accelerate(model, masks, compile="default")
        assert_masked(model, plain, masks)
        assert_masked(model, plain, masks)
        assert shapes_of(report) == {(5, 3, 8): 8} and not report.compilation.eager
    assert breaks() == 0
    seen = graphs()
    assert seen <= 3  # one a compilation, not one a layer
    accelerate(model, compile="default")
    assert all(g.all() for g in step(model)[1].values())


def test_a_mask_set_on_compiled_layers_is_honoured(traced):
    """What is compiled stays, as `LoraParCallback` needs it."""
    from lorapar.patch import route

    plain, model = net(4), net(4)
    report = accelerate(model, compile="default")
    assert_equal_steps(step(model), step(plain))
    for seed in (1, 2):
        masks = masks_for(model, seed)
        assert route(model, masks, stage=None).compilation is report.compilation
        assert_masked(model, plain, masks)
    route(model, None, stage=None)
    assert_equal_steps(step(model), step(plain))
    assert shapes_of(report) == {(5, 3, 8): 4 * 4} and not report.compilation.eager
    assert breaks() == 0 and graphs() <= 3


def test_sums_set_on_compiled_layers_are_filled(traced):
    """And gradients are made again when they are gone, as after scoring."""
    from lorapar.calls import SUMS
    from lorapar_kernels import ImportanceSums

    plain, model = net(2), net(2)
    accelerate(model, compile="default")
    accelerate(plain)
    assert_equal_steps(step(model), step(plain))
    for m in (model, plain):
        for layer in lora_layers(m).values():
            a, b = (s["default"].weight for s in (layer.lora_A, layer.lora_B))
            sums = ImportanceSums(torch.zeros_like(a), torch.zeros_like(b))
            sums.examples(torch.tensor([0, 7, 15], dtype=torch.int32, device=DEVICE))
            layer.__dict__[SUMS] = sums
        assert not step(m)[1]
    wanted = lora_layers(plain)
    for name, layer in lora_layers(model).items():
        got, want = (m.__dict__.pop(SUMS) for m in (layer, wanted[name]))
        for side in ("a", "b"):
            assert getattr(want, side).any()
            assert_close(name, getattr(got, side), getattr(want, side))
    assert_equal_steps(step(model), step(plain))


# Everything else that a step may be -------------------------------------------------------------


def test_autocast_and_modes(traced):
    """Compiled once for each, and right in each."""
    plain, model = net(2), net(2)
    report = accelerate(model, compile="default")
    for _ in range(2):
        assert_equal_steps(step(model.train()), step(plain.train()))
        exact = step(copy.deepcopy(plain).double(), inputs().double())
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            results = zip(step(model), exact, step(plain))
        (y, ye, y0), (g, ge, g0) = results
        assert_as_accurate("y", y, ye, y0, NETWORK_FACTOR)
        assert g.keys() == g0.keys()
        for name in g:
            assert_as_accurate(name, g[name], ge[name], g0[name], NETWORK_FACTOR)
        assert_equal_steps(step(model.eval()), step(plain.eval()))
    # Under autocast the first layer's input is of another dtype than the others'.
    assert graphs() <= 4 and breaks() == 0 and not report.compilation.eager


def test_dropout_follows_the_generator_and_the_mode(traced):
    model = net(lora_dropout=0.5)
    accelerate(model, compile="default")
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(step(model))
    assert_equal_steps(*results[:2])
    assert not torch.equal(results[0][0], results[2][0])
    eager = copy.deepcopy(model)
    torch.manual_seed(1)
    assert_equal_steps(results[0], step(eager))
    assert_equal_steps(step(model.eval()), step(eager.eval()))
    assert breaks() == 0


def test_accumulation(traced, monkeypatch):
    monkeypatch.setattr(Compilation, "records", True)
    plain, model = net(2), net(2)
    accelerate(model, compile="reduce-overhead")
    for m in (model, plain):
        for seed in range(3):
            m(inputs(seed=seed)).square().mean().backward()
    assert_equal_steps((inputs(), gradients(model)), (inputs(), gradients(plain)))


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_checkpointing_of_transformers(kind, traced):
    """Which is inside the forward of a layer, since transformers 5.24: what it recomputes is
    compiled, and so is what it computes."""
    plain, model = llama(num_hidden_layers=3)
    for m in (plain, model):
        m.gradient_checkpointing_enable({"use_reentrant": TWO_CALLS[kind]})
    report = accelerate(model, compile="default")
    compare(model, plain)
    run(model)
    assert breaks() == 0 and 1 <= graphs() <= 2  # recorded, and not
    assert not report.compilation.eager and list(shapes_of(report)) == [(2, 5, 32)]
    assert all(layer.gradient_checkpointing for layer in model.base_model.model.model.layers)
    model.gradient_checkpointing_disable()
    compare(model, plain)


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_what_transformers_checkpoints_is_recomputed(kind, monkeypatch):
    calls = []

    def compile(function, **options):
        return lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    _, model = llama(num_hidden_layers=3)
    model.gradient_checkpointing_enable({"use_reentrant": TWO_CALLS[kind]})
    accelerate(model, compile="default")
    loss = model(input_ids=IDS, labels=IDS).loss
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 6


@pytest.mark.parametrize("kind", TWO_CALLS)
def test_dropout_is_the_same_when_recomputed(kind, traced):
    results = []
    for checkpoints in (None, TWO_CALLS[kind]):
        model = net(lora_dropout=0.5)
        tower(model).checkpoints = checkpoints
        accelerate(model, compile="default")
        torch.manual_seed(1)
        results.append(step(model))
    assert_equal_steps(*results)
