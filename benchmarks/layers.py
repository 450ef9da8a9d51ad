"""What the layer benchmarks share: one adapter in PEFT's layer, in ours, and in float64."""

from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

import lorapar
from lorapar_kernels import LoraMask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
SCALE = 2.0


def randn(m: int, n: int) -> Tensor:
    return torch.randn(m, n, dtype=DTYPE, device=DEVICE)


def frozen_linear(k: int, n: int) -> nn.Linear:
    base = nn.Linear(k, n, bias=False, dtype=DTYPE, device=DEVICE).requires_grad_(False)
    nn.init.normal_(base.weight, std=k**-0.5)
    return base


def random_adapter(k: int, n: int, r: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] in fp32; the adapter's part of y is about as large as the base's."""
    a = torch.randn(r, k, device=DEVICE) / k**0.5
    return a, torch.randn(n, r, device=DEVICE) / (SCALE * r**0.5)


def peft_layer(
    base: nn.Linear, a: Tensor, b: Tensor, p: float, dtype: torch.dtype = torch.float32,
    kind: type = Linear,
) -> Linear:  # fmt: skip
    """PEFT's layer of this kind with copies of A and B in `dtype`, in train mode."""
    r = a.shape[0]
    config = LoraConfig(r=r, lora_alpha=int(SCALE * r), lora_dropout=p, init_lora_weights=False)
    layer = kind(base, "default", config=config, r=r, lora_alpha=config.lora_alpha).to(DEVICE)
    layer.lora_A["default"].weight.data = a.to(dtype, copy=True)
    layer.lora_B["default"].weight.data = b.to(dtype, copy=True)
    return layer.train()


def accelerate(
    model: nn.Module, masks: dict[str, LoraMask] | None = None, *, cache_base: bool = False
) -> None:
    """lorapar.accelerate, which must serve every layer."""
    report = lorapar.accelerate(model, masks, cache_base=cache_base)
    if report.skipped:
        raise SystemExit(f"accelerate left layers to PEFT: {report}")


def adapters(layers: Sequence[Linear]) -> list[Tensor]:
    """A of every layer, then B of every layer."""
    sides = [*(layer.lora_A for layer in layers), *(layer.lora_B for layer in layers)]
    return [side["default"].weight for side in sides]


def autocast():
    return torch.autocast(DEVICE, dtype=DTYPE)


def forward_backward(
    forward: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor], dys: Sequence[Tensor],
    *, cast: bool,
) -> list[Tensor]:  # fmt: skip
    """Outputs and the gradients of `leaves`; the forward under autocast if `cast`."""
    if cast:
        with autocast():
            ys = forward()
    else:
        ys = forward()
    return [*ys, *torch.autograd.grad(ys, leaves, dys)]


def exact(
    x: Tensor, weights: Sequence[Tensor], adapter: Sequence[tuple[Tensor, Tensor]],
    dys: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """y of each layer, dX, dA of each, dB of each, in float64."""
    leaf = x.detach().double().requires_grad_()
    a, b = ([t.double().requires_grad_() for t in side] for side in zip(*adapter))
    ys = [leaf @ w.double().T + SCALE * (leaf @ u.T) @ v.T for w, u, v in zip(weights, a, b)]
    gradients = torch.autograd.grad(ys, [leaf, *a, *b], [dy.double() for dy in dys])
    return [*(y.detach() for y in ys), *gradients]


def compiled(module: nn.Module) -> Callable:
    """torch.compile of this module alone; earlier ones are forgotten."""
    torch.compiler.reset()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    return torch.compile(module, dynamic=False, backend=backend)
