"""One LoRA layer over other bases than a bf16 linear layer, forward and backward.

`4-bit` and `8-bit` are bitsandbytes' (NF4, LLM.int8), which make their own output: PEFT and ours
add the adapter to it. `fp32` is a base as TRL loads it, under bf16 autocast, which casts W in every
call unless `cache_base` keeps the copy. Adapters are PEFT's default, fp32, under bf16 autocast, and
bf16 without, as TRL's QLoRA has them. 1.00 is the frozen base.
"""

import itertools
from collections.abc import Callable

import harness
import layers
import torch
from torch import nn

from lorapar_kernels import LoraMask

BASES = ("4-bit", "8-bit", "fp32")
# (M tokens, K, N, r, dropout)
SHAPES = [
    (512, 4096, 4096, 16, 0.05),
    (2048, 4096, 4096, 16, 0.05),
    (8192, 4096, 4096, 16, 0.0),
    (8192, 4096, 4096, 16, 0.05),
    (8192, 4096, 11008, 64, 0.05),
]


def label(base: str, m: int, k: int, n: int, r: int, p: float) -> str:
    return f"{base} M={m} {k}->{n} r={r} p={p:g}"


def quantised(base: str, k: int, n: int) -> tuple[nn.Module, type, torch.Tensor]:
    """The base layer, PEFT's class over it, and the weight that it stands for."""
    import bitsandbytes
    from peft.tuners.lora import bnb

    full = layers.frozen_linear(k, n)
    if base == "4-bit":
        kind, made = bnb.Linear4bit, bitsandbytes.nn.Linear4bit(
            k, n, bias=False, compute_dtype=layers.DTYPE, quant_type="nf4"
        )  # fmt: skip
        made.weight = bitsandbytes.nn.Params4bit(
            full.weight.data.cpu(), requires_grad=False, quant_type="nf4"
        )
        made = made.to(layers.DEVICE)
        weight = made.weight
        return made, kind, bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    kind, made = bnb.Linear8bitLt, bitsandbytes.nn.Linear8bitLt(
        k, n, bias=False, has_fp16_weights=False, threshold=6.0
    )  # fmt: skip
    made.weight = bitsandbytes.nn.Int8Params(
        full.weight.data.half().cpu(), requires_grad=False, has_fp16_weights=False
    )
    made = made.to(layers.DEVICE)
    scales = made.weight.SCB.float()[:, None] / 127
    return made, kind, made.weight.data.float() * scales


def case(base: str, m: int, k: int, n: int, r: int, p: float) -> harness.Case:
    x, dy = layers.randn(m, k).requires_grad_(), layers.randn(m, n)
    a, b = layers.random_adapter(k, n, r)
    if base == "fp32":
        frozen = layers.frozen_linear(k, n).float()
        kind, weight = layers.Linear, frozen.weight
    else:
        frozen, kind, weight = quantised(base, k, n)
    names = ("PEFT", "lorapar", *(("lorapar cached",) if base == "fp32" else ()))
    bf16 = () if base == "fp32" else ("PEFT bf16", "lorapar bf16")
    made = {name: layers.peft_layer(frozen, a, b, p, kind=kind) for name in names}
    made |= {name: layers.peft_layer(frozen, a, b, p, layers.DTYPE, kind) for name in bf16}
    for name, layer in made.items():
        if name.startswith("lorapar"):
            # 8-bit is left to PEFT, as found here, unless there is a mask
            masks = {"layer": LoraMask(None, None)} if base == "8-bit" else None
            model = nn.ModuleDict({"layer": layer})
            layers.accelerate(model, masks, cache_base=name == "lorapar cached")

    def run(layer, leaves, cast):
        return layers.forward_backward(lambda: [layer(x)], leaves, [dy], cast=cast)

    def train(on: bool) -> None:
        for layer in made.values():
            layer.train(on)

    calls = {
        name: lambda layer=layer, cast=name not in bf16: run(
            layer, [x, *layers.adapters([layer])], cast
        )
        for name, layer in made.items()
    }
    return harness.Case(
        label=label(base, m, k, n, r, p),
        providers={"frozen": lambda: run(frozen, [x], True), **calls},
        exact=lambda: layers.exact(x, [weight], [(a, b)], [dy]),
        # 8-bit rounds x too, so that what it computes is not x Wᵀ; the tests compare it with PEFT
        checked=() if base == "8-bit" else (*bf16, *names) if p == 0.0 else tuple(made),
        rank_share=1.5 * r * (k + n) / (k * n),
        train=train if p > 0.0 else None,
    )


def cases() -> dict[str, Callable[[], harness.Case]]:
    return {
        label(base, *shape): lambda base=base, shape=shape: case(base, *shape)
        for base, shape in itertools.product(BASES, SHAPES)
    }


def smoke() -> list[Callable[[], harness.Case]]:
    return [lambda: case("fp32", 33, 40, 24, 4, 0.05)]


if __name__ == "__main__":
    harness.main("bases", cases(), smoke)
