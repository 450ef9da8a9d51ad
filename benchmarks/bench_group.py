"""Projections of one x (q, k, v; gate, up), forward and backward, bf16, M = 8192.

`frozen` is the separate frozen layers in one autograd graph, which adds up their dX; `frozen
chained` adds them inside its GEMMs, by beta = 1. Both are baselines; the bound is on the second.
"""

from collections.abc import Callable, Sequence

import harness
import layers
import torch
from torch import nn

from lorapar_kernels import Projection, lora_linear_group

QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj")
# name, (M, K, N of each, r, dropout)
SHAPES = [
    ("q,k,v", QKV, (8192, 4096, (4096, 4096, 4096), 16, 0.0)),
    ("q,k,v", QKV, (8192, 4096, (4096, 4096, 4096), 16, 0.05)),
    ("q,k,v", QKV, (8192, 4096, (4096, 4096, 4096), 64, 0.0)),
    ("gate,up", MLP, (8192, 4096, (11008, 11008), 16, 0.0)),
    ("gate,up", MLP, (8192, 4096, (11008, 11008), 16, 0.05)),
    ("gate,up", MLP, (8192, 4096, (11008, 11008), 64, 0.0)),
    ("q,k,v GQA", QKV, (8192, 4096, (4096, 1024, 1024), 16, 0.0)),
]


class Chained(torch.autograd.Function):
    """y_i = x W_iᵀ; dX = Σ dY_i W_i, each product added by its GEMM to those before."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(*weights)
        return tuple(x @ w.T for w in weights)

    @staticmethod
    def backward(ctx, *dys):
        first, *others = zip(dys, ctx.saved_tensors)
        dx = torch.mm(*first)
        for dy, weight in others:
            dx.addmm_(dy, weight)
        return dx, *(None for _ in dys)


class Block(nn.Module):
    """The projections as siblings, as a model has them."""

    def __init__(self, projections: dict[str, nn.Module]):
        super().__init__()
        for name, projection in projections.items():
            self.add_module(name, projection)

    def forward(self, x):
        return [projection(x) for projection in self.children()]


def label(group: str, m: int, k: int, ns: Sequence[int], r: int, p: float) -> str:
    return f"{group} M={m} {k}->{'+'.join(map(str, ns))} r={r} p={p:g}"


def case(group: str, names: Sequence[str], shape: tuple) -> harness.Case:
    m, k, ns, r, p = shape
    x, dys = layers.randn(m, k).requires_grad_(), [layers.randn(m, n) for n in ns]
    bases = [layers.frozen_linear(k, n) for n in ns]
    adapter = [layers.random_adapter(k, n, r) for n in ns]
    weights = [base.weight for base in bases]

    def block(dtype=torch.float32) -> Block:
        made = [layers.peft_layer(base, *ab, p, dtype) for base, ab in zip(bases, adapter)]
        return Block(dict(zip(names, made)))

    default, bf16, ours = block(), block(layers.DTYPE), block()
    layers.accelerate(ours)
    compiled, frozen = layers.compiled(default), Block(dict(zip(names, bases)))
    leaves = {b: [x, *layers.adapters([*b.children()])] for b in (default, bf16, ours)}

    def run(forward, leaves, cast):
        return layers.forward_backward(lambda: forward(x), leaves, dys, cast=cast)

    def grouped(x):
        a_and_b = leaves[ours][1:]
        projections = [
            Projection(w, a, b, layers.SCALE)
            for w, a, b in zip(weights, a_and_b[: len(ns)], a_and_b[len(ns) :])
        ]
        return lora_linear_group(x, projections, dropout_p=p if ours.training else 0.0)

    def train(on: bool) -> None:
        for module in (default, bf16, ours):
            module.train(on)

    return harness.Case(
        label=label(group, *shape),
        providers={
            "frozen": lambda: run(frozen, [x], False),
            "frozen chained": lambda: run(lambda x: Chained.apply(x, *weights), [x], False),
            "PEFT": lambda: run(default, leaves[default], True),
            "PEFT bf16": lambda: run(bf16, leaves[bf16], False),
            "PEFT compiled": lambda: run(compiled, leaves[default], True),
            "lorapar": lambda: run(grouped, leaves[ours], True),
            "lorapar accelerate": lambda: run(ours, leaves[ours], True),
        },
        exact=lambda: layers.exact(x, weights, adapter, dys),
        checked=("PEFT", "PEFT bf16", "lorapar", "lorapar accelerate"),
        rank_share=1.5 * r * sum(k + n for n in ns) / sum(k * n for n in ns),
        train=train if p > 0.0 else None,
        baselines={"ratio": "frozen", "ratio_chained": "frozen chained"},
        bound="frozen chained",
    )


def cases() -> dict[str, Callable[[], harness.Case]]:
    return {
        label(group, *shape): lambda group=group, names=names, shape=shape: case(
            group, names, shape
        )
        for group, names, shape in SHAPES
    }


def smoke() -> list[Callable[[], harness.Case]]:
    return [
        lambda: case("q,k,v", QKV, (33, 40, (40, 24, 24), 4, 0.0)),
        lambda: case("gate,up", MLP, (256, 128, (96, 96), 8, 0.05)),
    ]


if __name__ == "__main__":
    harness.main("group", cases(), smoke)
