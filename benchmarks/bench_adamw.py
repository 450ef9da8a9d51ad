"""A step of MaskedAdamW on an adapter of LLaMA-7B's shape, against torch.optim.AdamW.

fp32 adapters with fp32 gradients, q k v gate up down in 32 layers, 40 % of the elements trainable,
scattered. `ms` is GPU time (the card is kept busy before each step), `host_ms` what a caller waits
with the card idle. `rms` and `peak`: distance from AdamW in float64 after 100 steps on the first
layer, over trainable elements.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence

import harness
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from lorapar_kernels import MaskedAdamW
from lorapar_kernels.testing import FACTOR, error

ACTIVE = 0.4
STEPS = 100
ARGUMENTS = {"lr": 2e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
DEVICE = "cuda" if harness.CUDA else "cpu"
WIDTHS_7B = (4096, 11008)
MATRICES = 12  # of a layer: A and B of six projections


def shapes(r: int, layers: int, hidden: int, inner: int) -> list[tuple[int, int]]:
    """A and B of q, k, v, gate, up and down, layer by layer."""
    widths = [(hidden, hidden)] * 3 + [(hidden, inner)] * 2 + [(inner, hidden)]
    one = [shape for K, N in widths for shape in ((r, K), (N, r))]
    return one * layers


class Variant:
    """Parameters and gradients of its own, and an optimiser."""

    def __init__(self, sizes: Sequence, make: Callable[[list, dict], Optimizer], dtype=None):
        generator = torch.Generator(DEVICE).manual_seed(1)

        def randn(shape, std):
            t = torch.randn(shape, generator=generator, device=DEVICE) * std
            return t if dtype is None else t.to(dtype)

        self.masks = {
            f"p{i}": torch.rand(s, generator=generator, device=DEVICE) < ACTIVE
            for i, s in enumerate(sizes)
        }
        self.named = [(f"p{i}", Parameter(randn(s, 0.01))) for i, s in enumerate(sizes)]
        for name, p in self.named:
            p.grad = randn(p.shape, 1e-3) * self.masks[name]
        before = torch.cuda.memory_allocated() if harness.CUDA else 0
        self.optimiser = make(self.named, self.masks)
        self.step()
        held = torch.cuda.memory_allocated() - before if harness.CUDA else 0
        self.bytes = round(held / sum(p.numel() for _, p in self.named), 3)

    def step(self) -> None:
        self.optimiser.step()


def masked(named: list, masks: dict) -> Optimizer:
    return MaskedAdamW(named, masks, **ARGUMENTS)


def dense(**how: bool) -> Callable[[list, dict], Optimizer]:
    return lambda named, masks: AdamW([p for _, p in named], **ARGUMENTS, **how)


MAKE = {
    "torch fused": dense(fused=True),
    "torch foreach": dense(foreach=True),
    "lorapar MaskedAdamW": masked,
}


def train(sizes: Sequence, make: Callable, dtype=None) -> list[Tensor]:
    """The trainable elements of each parameter after STEPS steps of the same gradients."""
    variant = Variant(sizes, make, dtype)
    generator = torch.Generator(DEVICE).manual_seed(2)
    for _ in range(STEPS):
        for name, p in variant.named:
            g = torch.randn(p.shape, generator=generator, device=DEVICE) * 1e-3
            p.grad.copy_(g * variant.masks[name])
        variant.step()
    return [p.detach()[variant.masks[name]] for name, p in variant.named]


def errors(sizes: Sequence) -> dict[str, tuple[float, float]]:
    """RMS and peak error by variant; SystemExit where ours is too far off."""
    exact = torch.cat(train(sizes, dense(), torch.float64))
    found = {n: tuple(error(torch.cat(train(sizes, make)), exact)) for n, make in MAKE.items()}
    for ours, theirs in zip(found["lorapar MaskedAdamW"], found["torch fused"]):
        if not ours <= FACTOR * theirs:
            raise SystemExit(f"MaskedAdamW is {ours:.1e} off, torch's fused AdamW {theirs:.1e}")
    return found


def measure(label: str, sizes: Sequence, rounds: int) -> list[dict]:
    off = errors(sizes[:MATRICES])
    variants = {name: Variant(sizes, make) for name, make in MAKE.items()}
    calls = {name: v.step for name, v in variants.items()}
    gpu = harness.interleave(calls, rounds)
    host = harness.interleave(calls, rounds, host=True)
    rows = []
    for name, v in variants.items():
        row = {"case": label, "provider": name, "elements": sum(p.numel() for _, p in v.named)}
        row["ms"], row["host_ms"] = (round(statistics.median(t[name]), 4) for t in (gpu, host))
        row["ratio"], row["host_ratio"] = (
            harness.median_ratio(t[name], t["torch fused"]) for t in (gpu, host)
        )
        row["state_bytes_per_element"] = v.bytes
        row["rms"], row["peak"] = (f"{e:.2e}" for e in off[name])
        rows.append(row)
    return rows


def main(options: argparse.Namespace) -> None:
    cases = {f"LLaMA-7B r={r}": shapes(r, 32, *WIDTHS_7B) for r in (8, 64)}
    if options.smoke:
        cases = {"tiny": shapes(4, 2, 32, 48)}
    rows = []
    for label, sizes in cases.items():
        if harness.is_picked(label, options):
            harness.report("adamw", rows, measure(label, sizes, options.rounds), options)
            gc.collect()


if __name__ == "__main__":
    main(harness.parse("adamw", rounds=50))
