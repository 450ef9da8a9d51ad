"""Steps of compiled layers: what a step is, its gradients, masks, checkpoints and modes."""

import copy

import pytest
import torch
from against_peft import IDS, compare, run
from compiled_net import (
    TWO_CALLS,
    assert_equal_steps,
    breaks,
    graphs,
    inputs,
    llama,
    net,
    shapes_of,
    step,
    tower,
)
from conftest import DEVICE

from lorapar.patch import accelerate, lora_layers
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

pytest_plugins = "compiled_net"
pytestmark = pytest.mark.usefixtures("fresh")


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
    assert breaks() == 0 and 1 <= graphs() <= 2
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
