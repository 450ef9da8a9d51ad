"""One LoRA layer, forward and backward: the frozen layer, PEFT, and this package.

On a CPU this shows that the frame works, not a speed to quote.
"""

import harness
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from lorapar_kernels import lora_linear

# (M tokens, K, N, r)
SHAPES = [(2048, 1024, 1024, 8), (512, 4096, 4096, 8)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(m: int, k: int, n: int, r: int) -> harness.Case:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x = torch.randn(m, k, dtype=dtype, device=DEVICE, requires_grad=True)
    dy = torch.randn(m, n, dtype=dtype, device=DEVICE)
    base = nn.Linear(k, n, bias=False, dtype=dtype, device=DEVICE).requires_grad_(False)
    layer = Linear(
        base, "default", config=LoraConfig(r=r, lora_alpha=2 * r, init_lora_weights=False),
        r=r, lora_alpha=2 * r,
    )  # fmt: skip
    layer = layer.to(DEVICE)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data, b.data = a.data.to(dtype), b.data.to(dtype)

    def run(f, *leaves):
        y = f()
        return [y, *torch.autograd.grad(y, leaves, dy)]

    def plain(x, w, a, b):
        return x @ w.T + 2.0 * (x @ a.T) @ b.T

    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    y = plain(wide[0], base.weight.double(), *wide[1:])
    return harness.Case(
        label=f"M={m} K={k} N={n} r={r} {str(dtype)[6:]}",
        providers={
            "frozen": lambda: run(lambda: base(x), x),
            "PEFT": lambda: run(lambda: layer(x), x, a, b),
            "lorapar": lambda: run(lambda: lora_linear(x, base.weight, a, b, 2.0), x, a, b),
        },
        exact=[t.detach() for t in (y, *torch.autograd.grad(y, wide, dy.double()))],
        checked=("PEFT", "lorapar"),
    )


def cases(smoke: bool):
    return [lambda s=s: case(*s) for s in ([(33, 40, 24, 4)] if smoke else SHAPES)]


if __name__ == "__main__":
    harness.main("lora_linear", cases)
