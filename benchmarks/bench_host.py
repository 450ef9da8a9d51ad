"""Host microseconds a layer takes, forward and backward apart: until the call returns.

The GPU is idle when a call begins and nothing waits for it, so that this is what a host-bound step
pays. bf16 autocast, fp32 adapters, dropout .05; `decode` is the forward alone, in eval mode without
autocast, as in `generate`. `frozen` is nn.Linear. Of a group, times are per layer.
  lorapar triton   without the extension: kernels, and plan d where rows are few
  lorapar cuda     with it, where it is built
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import harness
import layers
import torch
from bench_group import QKV, Block
from torch import Tensor

from lorapar_kernels import _backend

P, R = 0.05, 8
# tokens, K, N of each layer; several: a group
SHAPES = [
    (512, 4096, (4096,)),
    (2048, 4096, (4096,)),
    (512, 4096, (1024,)),
    (8192, 4096, (1024,)),
    (512, 4096, (4096, 4096, 4096)),
    (2048, 4096, (4096, 4096, 4096)),
]
DECODES = [(1, 4096, (4096,)), (64, 4096, (4096,)), (1, 4096, (4096, 4096, 4096))]
SMOKE = [(256, 128, (96,)), (256, 128, (96, 96, 96))]
WARMUP = 10


@dataclass
class Provider:
    """One way to call the layers, and what it took: microseconds a layer."""

    module: Callable
    leaves: Sequence[Tensor]
    backend: str | None = None
    forward_us: list[float] = field(default_factory=list)
    backward_us: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def chosen(self):
        """Served by this backend."""
        before = os.environ.pop("LORAPAR_BACKEND", None)
        if self.backend:
            os.environ["LORAPAR_BACKEND"] = self.backend
        try:
            yield
        finally:
            os.environ.pop("LORAPAR_BACKEND", None)
            if before is not None:
                os.environ["LORAPAR_BACKEND"] = before


def backends() -> list[str]:
    """Those that can run here."""
    if not harness.CUDA:
        return ["reference"]
    found = [name for name in _backend.BACKENDS if name != "reference"]
    if "cuda" in found:
        from lorapar_kernels import extension

        if not extension.available():
            found.remove("cuda")
    return found


def providers(k: int, ns: Sequence[int], x: Tensor, *, training: bool):
    """name → Provider, and what `exact` needs."""
    bases = [layers.frozen_linear(k, n) for n in ns]
    adapter = [layers.random_adapter(k, n, R) for n in ns]

    def block() -> Block:
        made = [layers.peft_layer(base, *ab, P) for base, ab in zip(bases, adapter)]
        return Block(dict(zip(QKV, made))).train(training)

    peft, ours = block(), block()
    layers.accelerate(ours)
    found = {
        "frozen": Provider(Block(dict(zip(QKV, bases))), [x]),
        "PEFT": Provider(peft, [x, *layers.adapters([*peft.children()])]),
    }
    leaves = [x, *layers.adapters([*ours.children()])]
    for name in backends():
        found[f"lorapar {name}"] = Provider(ours, leaves, name)
    return found, bases, adapter, (peft, ours)


def measure(label: str, m: int, k: int, ns: Sequence[int], rounds: int, *, training: bool):
    x = layers.randn(m, k).requires_grad_(training)
    dys = [layers.randn(m, n) for n in ns]
    found, bases, adapter, modules = providers(k, ns, x, training=training)

    def results(provider: Provider) -> list[Tensor]:
        with provider.chosen():
            if training:
                forward = lambda: provider.module(x)  # noqa: E731
                return layers.forward_backward(forward, provider.leaves, dys, cast=True)
            with torch.no_grad():
                return provider.module(x)

    def exact() -> list[Tensor]:
        return layers.exact(x, [b.weight for b in bases], adapter, dys)[
            : None if training else len(ns)
        ]

    def train(on: bool) -> None:
        for module in modules:
            module.train(on)

    harness.check(
        harness.Case(
            label=label,
            providers={n: lambda p=p: results(p) for n, p in found.items()},
            exact=exact,
            checked=[n for n in found if n != "frozen"],
            rank_share=0.0,
            train=train if training else None,
        )
    )
    names = list(found)
    for turn in range(WARMUP + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            run(found[name], x, dys, training, keep=turn >= WARMUP)
    return rows(label, found, len(ns))


def run(provider: Provider, x: Tensor, dys: Sequence[Tensor], training: bool, *, keep: bool):
    with provider.chosen():
        _synchronize()
        # autocast is entered anew, as in every step, since it keeps its casts of A and B
        with layers.autocast() if training else torch.no_grad():
            begin = time.perf_counter()
            ys = provider.module(x)
            forward = time.perf_counter() - begin
        _synchronize()
        if training:
            begin = time.perf_counter()
            gradients = torch.autograd.grad(ys, provider.leaves, dys)
            backward = time.perf_counter() - begin
            _synchronize()
            del gradients
    if keep:
        provider.forward_us.append(1e6 * forward / len(dys))
        if training:
            provider.backward_us.append(1e6 * backward / len(dys))


def rows(label: str, found: dict[str, Provider], count: int) -> list[dict]:
    """Medians; `added_us`: of both passes over `frozen` in the same round."""

    def total(p: Provider) -> list[float]:
        return [sum(pair) for pair in zip(p.forward_us, p.backward_us or [0.0] * len(p.forward_us))]

    base, made = total(found["frozen"]), []
    for name, provider in found.items():
        row = {"case": label, "layers": count, "provider": name}
        row["forward_us"] = round(statistics.median(provider.forward_us), 1)
        row["backward_us"] = (
            round(statistics.median(provider.backward_us), 1) if provider.backward_us else ""
        )
        added = [t - b for t, b in zip(total(provider), base)]
        row["added_us"] = "" if name == "frozen" else round(statistics.median(added), 1)
        made.append(row)
    return made


def _synchronize() -> None:
    if harness.CUDA:
        torch.cuda.synchronize()


def main() -> None:
    options, table = harness.parse("host", rounds=100), []
    training, decodes = (SMOKE, SMOKE) if options.smoke else (SHAPES, DECODES)
    for kind, shapes in (("step", training), ("decode", decodes)):
        for m, k, ns in shapes:
            label = f"{kind} M={m} {k}->{'+'.join(map(str, ns))}"
            if harness.is_picked(label, options):
                made = measure(label, m, k, ns, options.rounds, training=kind == "step")
                harness.report("host", table, made, options)


if __name__ == "__main__":
    main()
