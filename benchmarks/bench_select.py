"""Selection of two systems' elements, against the way the released script selects.

On a GPU: an adapter of LLaMA-7B's shape at r = 8 (17.9 M elements) and at r = 256 (573 M). Without
one: the first on two CPU cores, and the script's way, which makes a dict of every element,
sorts them in pandas and walks down with `iterrows`. That is run on a sample and multiplied by the
elements; the row says so. `seconds` holds two selections, or the whole partition (both sets, the
shared elements, both stages' masks); `peak_gib` what it held beyond the scores, on a CPU the whole
process at its peak.
"""

import argparse
import math
import resource
import statistics
import time
from collections.abc import Callable

import harness
import torch
from bench_adamw import WIDTHS_7B, shapes
from torch import Tensor

from lorapar.config import PartitionSettings
from lorapar.partitioning import make_partition
from lorapar_kernels import select_by_mass

THETA = 0.9
SAMPLE = 100_000
SCRIPT = "released script's way (pandas)"


def scores(sizes: list, seed: int, device: str) -> dict[str, Tensor]:
    """|product of two normals| by parameter name, as |g φ| is at a random start."""
    generator = torch.Generator(device).manual_seed(seed)

    def score(shape):
        g, phi = (torch.randn(shape, generator=generator, device=device) for _ in "12")
        return g.mul_(phi).abs_().mul_(1e-6)

    return {f"l{i // 2}.lora_{'AB'[i % 2]}.weight": score(s) for i, s in enumerate(sizes)}


def pandas_selection(flat: Tensor, theta: float) -> set[int]:
    """What the released script does with one system's scores, as its description says."""
    import pandas

    rows = [{"index": i, "score": float(v)} for i, v in enumerate(flat.tolist())]
    frame = pandas.DataFrame(rows).sort_values("score", ascending=False)
    wanted, running, kept = theta * frame["score"].sum(), 0.0, set()
    for _, row in frame.iterrows():
        running += row["score"]
        kept.add(int(row["index"]))
        if running >= wanted:
            break
    return kept


def timed(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds, and GiB held at the peak beyond what was there before."""
    call()
    seconds, peak = [], 0.0
    if harness.CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(rounds):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    if harness.CUDA:
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return statistics.median(seconds), peak


def _synchronize() -> None:
    if harness.CUDA:
        torch.cuda.synchronize()


def measure(label: str, sizes: list, options: argparse.Namespace, script: bool) -> list[dict]:
    device = "cuda" if harness.CUDA else "cpu"
    one, two = (scores(sizes, seed, device) for seed in (1, 2))
    both = [list(s.values()) for s in (one, two)]
    elements = sum(t.numel() for t in both[0])
    check(both[0])
    settings = PartitionSettings(THETA, 0.5, 0.5)
    calls = {
        "lorapar, two selections": lambda: [select_by_mass(s, THETA) for s in both],
        "lorapar, whole partition": lambda: make_partition(one, two, settings),
    }
    rows = []
    for name, call in calls.items():
        seconds, peak = timed(call, options.rounds)
        rows.append(
            {"case": label, "provider": name, "elements": elements, "seconds": round(seconds, 4),
             "peak_gib": round(peak, 3), "how": "measured"}
        )  # fmt: skip
    if script:
        sample = torch.cat([s.flatten() for s in both[0]])[:SAMPLE].cpu()
        start = time.perf_counter()
        pandas_selection(sample, THETA)
        took = time.perf_counter() - start
        rows.append(
            {"case": label, "provider": SCRIPT, "elements": elements,
             "seconds": round(2 * took * elements / len(sample), 1), "peak_gib": "",
             "how": f"extrapolated: two systems, from {len(sample)} elements in {took:.2f} s"}
        )  # fmt: skip
    return rows


def check(of: list[Tensor]) -> None:
    """The set is the script's on a sample; on everything, its mass is θ and no more."""
    sample = torch.cat([s.flatten() for s in of])[:2000]
    (mask,) = select_by_mass([sample], THETA)
    same = set(mask.nonzero().flatten().tolist()) == pandas_selection(sample.cpu(), THETA)
    kept = select_by_mass(of, THETA)
    total = math.fsum(s.double().sum().item() for s in of)
    mass = math.fsum(s[m].double().sum().item() for s, m in zip(of, kept))
    least = min(s[m].min().item() for s, m in zip(of, kept) if m.any())
    if not (same and 0 <= mass - THETA * total <= least + 1e-9 * total):
        raise SystemExit(f"wrong selection: {mass / total} of the mass; nothing was timed")


def main(options: argparse.Namespace) -> None:
    cases = {"17.9 M, LLaMA-7B r=8": shapes(8, 32, *WIDTHS_7B)}
    if harness.CUDA:
        cases["573 M, LLaMA-7B r=256"] = shapes(256, 32, *WIDTHS_7B)
    if options.smoke:
        cases = {"tiny": shapes(4, 2, 32, 48)}
    elif not harness.CUDA:
        torch.set_num_threads(2)
    rows = []
    for label, sizes in cases.items():
        if harness.is_picked(label, options):
            new = measure(label, sizes, options, script=not harness.CUDA or options.smoke)
            harness.report("select" if harness.CUDA else "select_cpu", rows, new, options)


if __name__ == "__main__":
    main(harness.parse("select", rounds=10, cpu=True))
