"""What is said of an optimiser is what it does to elements whose gradient is zero."""

import copy

import pytest
import torch
from conftest import DEVICE, beyond
from transformers.optimization import Adafactor

from lorapar.drift import Drift, drift, moved

DECAY, METHOD = {"decay": True}, {"method": True}
OPTIMISERS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}, DECAY),
    "AdamW, no decay": (torch.optim.AdamW, {"weight_decay": 0.0}, None),
    "AdamW, fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}, DECAY),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}, DECAY),
    "SGD": (torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9}, DECAY),
    "SGD, no decay": (torch.optim.SGD, {"momentum": 0.9}, None),
    "Adafactor": (Adafactor, {"weight_decay": 0.1, "relative_step": False}, DECAY),
    "Adafactor, relative": (Adafactor, {"lr": None, "weight_decay": 0.1}, DECAY),
    "Adafactor, no decay": (Adafactor, {"relative_step": False}, None),
    "torch's Adafactor": (torch.optim.Adafactor, {"weight_decay": 0.0}, None),
    "Muon": (torch.optim.Muon, {"weight_decay": 0.1}, {**DECAY, **METHOD}),
    "Muon, no decay": (torch.optim.Muon, {"weight_decay": 0.0}, METHOD),
    "ASGD, whose term lambd decays": (torch.optim.ASGD, {}, METHOD),
}


def parameter(shape=(8, 512), dtype=torch.float32):
    return torch.nn.Parameter((torch.randn(shape) * 0.05).to(DEVICE, dtype))


def scattered(p):
    return torch.rand(p.shape) < 0.4


def frozen_moved(optimiser, p, mask, steps=4):
    """Whether real steps move frozen elements of the real parameter."""
    start, mask = p.detach().clone(), mask.to(p.device)
    for _ in range(steps):
        p.grad = torch.randn_like(p) * mask
        optimiser.step()
    assert moved(p.detach(), start)[mask].any()
    return bool(moved(p.detach(), start)[~mask].any())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_it_says_what_the_optimiser_does(name):
    kind, options, expected = OPTIMISERS[name]
    p = parameter()
    mask = scattered(p)
    optimiser = kind([p], **{"lr": 1e-3, **options})
    found = drift(optimiser, {p: mask})
    if expected is not None:
        expected = Drift(kind.__name__, int((~mask).sum()), **{"decay": False, **expected})
    assert found == expected
    assert (found is not None) == frozen_moved(optimiser, p, mask)


@pytest.mark.parametrize("lr", [1e-4, 1e-1])
def test_decay_below_rounding_moves_nothing(lr):
    p = parameter(dtype=torch.bfloat16)
    mask = scattered(p)
    optimiser = torch.optim.AdamW([p], lr=lr, weight_decay=0.1)
    assert (
        (drift(optimiser, {p: mask}) is not None) == frozen_moved(optimiser, p, mask) == (lr > 0.01)
    )


def test_whole_frozen_columns_keep_their_zero_under_muon():
    p = parameter()
    mask = torch.zeros(p.shape, dtype=torch.bool)
    mask[:3] = True
    optimiser = torch.optim.Muon([p], weight_decay=0.0)
    assert drift(optimiser, {p: mask}) is None
    assert not frozen_moved(optimiser, p, mask)


@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_groups_are_tried_with_their_own_options(decays):
    one, two, whole = parameter(), parameter((512, 8)), parameter()
    masks = {p: scattered(p) for p in (one, two)}
    masks[whole] = torch.ones(whole.shape, dtype=torch.bool)
    groups = [{"params": [p], "weight_decay": d} for p, d in zip((one, two, whole), (*decays, 0.1))]
    assert (drift(torch.optim.AdamW(groups, lr=1e-3), masks) is not None) == any(decays)


def test_a_warm_up_from_zero_hides_nothing():
    p = parameter()
    mask = scattered(p)
    optimiser = torch.optim.AdamW([p], lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: step / 10)
    assert optimiser.param_groups[0]["lr"] == 0
    assert drift(optimiser, {p: mask}) == Drift("AdamW", int((~mask).sum()), decay=True)


def test_nothing_frozen_is_nothing_to_say():
    p = parameter()
    assert drift(torch.optim.Muon([p]), {p: torch.ones(p.shape, dtype=torch.bool)}) is None


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_the_optimiser_and_the_random_state_are_left_alone(kind):
    class Noisy(kind):
        def step(self, closure=None):
            torch.rand((), device=self.param_groups[0]["params"][0].device)
            super().step(closure)

    p = parameter()
    mask = scattered(p)
    optimiser = Noisy([p], lr=1e-3, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5)
    frozen_moved(optimiser, p, mask, steps=1)
    calls = []
    optimiser.register_step_post_hook(lambda *a: calls.append(1))
    before = copy.deepcopy([optimiser.state_dict(), p.detach(), p.grad])
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if DEVICE == "cuda" else None
    assert drift(optimiser, {p: mask}) is not None
    assert torch.equal(torch.get_rng_state(), states[0]) and not calls
    assert DEVICE != "cuda" or torch.equal(torch.cuda.get_rng_state(), states[1])
    assert str([optimiser.state_dict(), p.detach(), p.grad]) == str(before)
    for key, value in optimiser.state[p].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[0]["state"][0][key]))


class OfAModel(torch.optim.SGD):
    """Built from a model, as LOMO is."""

    def __init__(self, model, lr, weight_decay=0.0):
        super().__init__(model.parameters(), lr=lr, weight_decay=weight_decay)


class Idle(torch.optim.SGD):
    """Steps elsewhere, as layerwise optimisers do in the backward."""

    def step(self, closure=None):
        pass


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_what_cannot_be_tried_is_said(decay):
    layer = torch.nn.Linear(8, 8, bias=False)
    (p,) = layer.parameters()
    masks = {p: scattered(p)}
    switch = f"weight decay is {'on' if decay else 'off'}"
    for optimiser, why in (
        (OfAModel(layer, 0.1, decay), "AttributeError: 'list' object has no attribute"),
        (Idle([p], 0.1, weight_decay=decay), "trainable elements did not move either"),
        (
            torch.optim.SGD([parameter()], 0.1, weight_decay=decay),
            "none of them is in its parameters",
        ),
    ):
        found = drift(optimiser, masks)
        assert why in found.unknown and not found.method and found.decay == bool(decay)
        assert switch in str(found) and "could not be tried" in str(found)
    assert "closure" in drift(torch.optim.LBFGS([p]), masks).unknown
    assert "none of them is in its parameters" in drift(object(), masks).unknown


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind, options", [("AdamW8bit", {}), ("AdamW", {"optim_bits": 8})])
def test_bitsandbytes(kind, options, decay):
    """8-bit moments may hold no zero: then frozen elements move without weight decay too."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    p = parameter()
    mask = scattered(p)
    optimiser = getattr(bitsandbytes.optim, kind)([p], lr=1e-3, weight_decay=decay, **options)
    found = drift(optimiser, {p: mask})
    start = p.detach().clone()
    assert (found is not None) == frozen_moved(optimiser, p, mask)
    assert optimiser.state[p]["state1"].dtype == torch.uint8 and not torch.equal(p, start)
    assert found is None or found.decay == bool(decay)


@pytest.mark.slow
@pytest.mark.parametrize("decay", beyond([0.1], [0.0, 0.1]))
def test_torchao(decay):
    AdamW8bit = pytest.importorskip("torchao.optim").AdamW8bit
    p = parameter()
    mask = scattered(p)
    optimiser = AdamW8bit([p], lr=1e-3, weight_decay=decay)
    assert (drift(optimiser, {p: mask}) is not None) == frozen_moved(optimiser, p, mask)
