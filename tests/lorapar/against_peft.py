"""One step of a tiny model, patched and not, judged against the same model in float64."""

import contextlib
import copy

import torch
from conftest import DEVICE, make_lora, make_tiny_model

from lorapar.groups import GROUP
from lorapar.patch import lora_layers
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate

IDS = torch.tensor([[1, 5, 9, 30, 7], [1, 8, 3, 2, 4]], device=DEVICE)


def run(model, ids=IDS, context=contextlib.nullcontext):
    """Logits and gradients of one step."""
    model.zero_grad()
    with context():
        logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def compare(patched, plain, context=contextlib.nullcontext):
    """Both against the same model in float64."""
    exact = copy.deepcopy(plain).double()
    (y, g), (y0, g0), (ye, ge) = run(patched, IDS, context), run(plain, IDS, context), run(exact)
    assert_as_accurate("logits", y, ye, y0)
    assert g.keys() == g0.keys()
    for name in g:
        assert_as_accurate(name, g[name], ge[name], g0[name], NETWORK_FACTOR)


def pair(**changes):
    """Two equal models with an adapter. Eager attention: the same bits at every call."""
    plain = make_lora(make_tiny_model(attn_implementation="eager"), **changes).to(DEVICE)
    return plain, copy.deepcopy(plain)


def cast_base(model, dtype):
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(dtype)


def layer_of(model, name):
    """The LoRA layer whose module name ends in `name`."""
    return next(m for n, m in lora_layers(model).items() if n.endswith(name))


def group_of(model, name):
    return layer_of(model, name).__dict__[GROUP][0]
