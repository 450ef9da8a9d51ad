"""Steps of a small network learn the same on the kernels as in plain PyTorch."""

import pytest
import torch
from cases import delta, make
from conftest import DEVICE, KERNEL_DTYPES
from torch.nn.functional import gelu, linear, mse_loss

from lorapar_kernels import LoraMask, MaskedAdamW, Projection, lora_add, lora_linear
from lorapar_kernels import lora_linear_group as grouped
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate

STEPS = 50 if DEVICE == "cuda" else 20  # interpreted, each takes half a second
SCALE = 2.0


def network(dtype, device):
    """Frozen layers, adapters in fp32 and data: two that share x, one after them, one added."""
    sizes = [(24, 40), (24, 40), (40, 24), (24, 8)]
    layers = [make(((32,), k, n, 6), dtype, device, torch.float32)[1:] for k, n in sizes]
    x = torch.randn(32, 24, dtype=dtype, device=device)
    return layers, x, torch.randn(32, 8, device=device)


def curve(layers, x, target, to, ours: bool, mask) -> torch.Tensor:
    """The loss of every step, in `to` or in fp32 if that is narrower."""
    wide = torch.promote_types(to, torch.float32)
    adapters = [
        [t.detach().to(wide).clone().requires_grad_() for t in (a, b)] for _, a, b, _ in layers
    ]
    bases = [(w.to(to), bias.to(to)) for w, _, _, bias in layers]
    x, target, losses = x.to(to), target.to(wide), []
    named = [(f"{i}.{n}", t) for i, pair in enumerate(adapters) for n, t in zip("ab", pair)]
    masks = {} if mask is None else {"0.a": mask.a, "0.b": mask.b}
    optimizer = MaskedAdamW(named, masks, lr=1e-2)

    def layer(i, x):
        (w, bias), (a, b), chosen = bases[i], adapters[i], mask if i == 0 else None
        if ours and i == 3:
            return lora_add(linear(x, w, bias), x, a, b, SCALE, mask=chosen)
        if ours:
            return lora_linear(x, w, a, b, SCALE, bias=bias, mask=chosen)
        return linear(x, w, bias) + delta(x, a, b, SCALE, chosen)

    for _ in range(STEPS):
        if ours:
            one, two = grouped(
                x, [Projection(w, a, b, SCALE, bias, m) for (w, bias), (a, b), m in
                    zip(bases[:2], adapters[:2], (mask, None))]
            )  # fmt: skip
        else:
            one, two = layer(0, x), layer(1, x)
        loss = mse_loss(layer(3, layer(2, gelu(one) * two)).to(wide), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype,masked", list(zip(KERNEL_DTYPES, (False, True, True))), ids=str)
def test_loss_curve_is_that_of_plain_pytorch(dtype, masked, device, kernels):
    """As near the curve in float64 as plain PyTorch in this dtype: the noise of rounding."""
    layers, x, target = network(dtype, device)
    mask = None
    if masked:
        mask = LoraMask(
            torch.rand(6, 24, device=device) < 0.3, torch.rand(40, 6, device=device) < 0.3
        )
    ours = curve(layers, x, target, dtype, True, mask)
    plain, exact = (curve(layers, x, target, to, False, mask) for to in (dtype, torch.float64))
    assert exact[-1] < 0.5 * exact[0], "it does not learn"
    assert_as_accurate("loss", ours, exact, plain, NETWORK_FACTOR)
