"""The extension against the Triton backend, forward and backward of a layer or group, bf16.

`ratio` is GPU time over Triton's, `wall_ratio` what a caller waits whose GPU is idle before the
call (the host binds it where few tokens come). `lorapar_kernels.extension.chosen` is read off this
table: in compiled graphs the GPU's time counts, in eager calls the longer of it and the host's,
which bench_host.py has.
"""

import argparse
import functools
import gc
import os
import statistics

import harness
import layers
import torch

from lorapar_kernels import Projection, extension, lora_linear_group
from lorapar_kernels.testing import error

ROWS = (1, 64, 512, 1024, 2048, 4096, 8192, 16384)
SHAPES = {  # K, N of each projection
    "4096->4096": (4096, (4096,)),
    "4096->1024": (4096, (1024,)),
    "4096->11008": (4096, (11008,)),
    "11008->4096": (11008, (4096,)),
    "4096->3x4096": (4096, (4096,) * 3),
    "4096->2x11008": (4096, (11008,) * 2),
}
ADAPTERS = [(16, 0.05), (16, 0.0), (64, 0.05), (128, 0.0), (256, 0.0)]  # r, dropout
BACKENDS = {"triton": "triton", "cuda": "cuda"}  # name → what serves it; --smoke has no GPU
TOLERANCE = 0.02  # of gradients in bf16, without dropout


def calls_of(m: int, k: int, widths: tuple[int, ...], r: int) -> dict:
    """Backend → call(p), which gives the gradients."""
    x = layers.randn(m, k).requires_grad_()
    group = []
    for n in widths:
        a, b = (t.requires_grad_() for t in layers.random_adapter(k, n, r))
        group.append(Projection(layers.randn(n, k) / k**0.5, a, b, 2.0))
    leaves = [x, *(t for one in group for t in (one.lora_a, one.lora_b))]
    dys = [layers.randn(m, n) for n in widths]

    def call(backend: str, p: float):
        os.environ["LORAPAR_BACKEND"] = BACKENDS[backend]
        ys = lora_linear_group(x, group, dropout_p=p)
        return torch.autograd.grad(ys, leaves, dys)

    return {backend: functools.partial(call, backend) for backend in BACKENDS}


def measure(label: str, calls: dict, p: float, rounds: int) -> dict:
    one, other = (calls[backend](0.0) for backend in BACKENDS)
    distance = max(error(a, b.double()).rms for a, b in zip(other, one, strict=True))
    if not distance <= TOLERANCE:
        raise SystemExit(f"{label}: the backends' gradients are {distance:.3f} apart")
    row: dict = {"case": label}
    calls = {backend: functools.partial(call, p) for backend, call in calls.items()}
    for column, host in (("", False), ("wall_", True)):
        times = harness.interleave(calls, rounds, host=host)
        for backend in BACKENDS:
            row[f"{column}{backend}_ms"] = round(statistics.median(times[backend]), 4)
        row[f"{column}ratio"] = harness.median_ratio(times["cuda"], times["triton"])
    return row


def main(options: argparse.Namespace) -> None:
    shapes, token_counts = SHAPES, ROWS
    if options.smoke:
        BACKENDS.update(dict.fromkeys(BACKENDS, "reference"))
        shapes, token_counts = {"40->2x24": (40, (24, 24))}, (1, 33)
    elif not extension.available():
        raise SystemExit(f"there is no extension to compare: {extension.why_not}")
    rows: list[dict] = []
    for r, p in ADAPTERS:
        for name, (k, widths) in shapes.items():
            new = []
            for m in token_counts:
                label = f"M={m} {name} r={r} p={p:g}"
                if harness.is_picked(label, options):
                    row = measure(label, calls_of(m, k, widths, r), p, options.rounds)
                    new.append(row)
                    gc.collect()
            if new:
                harness.report("backends", rows, new, options)


if __name__ == "__main__":
    main(harness.parse("backends", rounds=10))
