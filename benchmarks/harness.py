"""How the benchmarks measure: checked first, interleaved, L2 flushed, ratios taken round by round.

On a GPU every call stands between two events after a flush that writes FLUSH_BYTES and then reads
CLEAN_BYTES, so that L2 holds neither a call's tensors nor lines that its loads would have to write
back. It takes longer than the host needs to launch a call, so that times are GPU times; with
`--host` the GPU is idle before each call, so that they are what a host-bound caller waits.
"""

import argparse
import csv
import gc
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from lorapar_kernels.testing import FACTOR, error

RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()
FLUSH_BYTES = 2**33  # about 2.6 ms on an H100
CLEAN_BYTES = 2**28
WARMUP = 4  # rounds


@dataclass(frozen=True)
class Case:
    """Some rows of a table: `providers` maps a name to a call that returns outputs and gradients.

    Names that begin with `lorapar` are ours and must be right; those with `frozen` have no adapter.
    """

    label: str
    providers: Mapping[str, Callable[[], Sequence[Tensor]]]
    exact: Callable[[], Sequence[Tensor]]  # in float64, without dropout
    checked: Sequence[str]  # providers that compute `exact`; the first one sets the standard
    rank_share: float  # flops of the adapter over those of the frozen GEMMs
    train: Callable[[bool], None] | None = None  # switches dropout on or off; None: p = 0
    baselines: Mapping[str, str] = field(default_factory=lambda: {"ratio": "frozen"})
    bound: str = "frozen"  # whose time, plus rank_share, is the bound


def check(case: Case) -> dict[str, float]:
    """RMS error by provider, the largest of its outputs; SystemExit where one of ours is wrong.

    With dropout on, the distance from the result without it is the noise of dropout: a second
    check, of its size.
    """
    exact, worst = case.exact(), {}
    for dropout in (False, True) if case.train else (False,):
        if case.train:
            case.train(dropout)
        limits = None
        for name in case.checked:
            outputs = case.providers[name]()
            errors = [error(out, ref).rms for out, ref in zip(outputs, exact, strict=True)]
            if limits is None:
                slack = [torch.finfo(t.dtype).eps / (8 if t.itemsize < 4 else 2) for t in outputs]
                limits = [FACTOR * e + s for e, s in zip(errors, slack)]
            right = all(e <= limit for e, limit in zip(errors, limits))  # NaN is not
            if name.startswith("lorapar") and not right:
                pairs = ", ".join(f"{e:.1e} of {at:.1e}" for e, at in zip(errors, limits))
                how = f"wrong{' with dropout' * dropout}, rms errors and limits {pairs}"
                raise SystemExit(f"{case.label}: {name} is {how}; nothing was timed")
            worst.setdefault(name, max(errors))
    return worst


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, *, host: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round. A round runs every call once; the order rotates."""
    names, late = list(calls), dict.fromkeys(calls, 0)
    times: dict[str, list] = {name: [] for name in names}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if CUDA else None
    for turn in range(WARMUP + rounds if CUDA else rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if not CUDA:
                start = time.perf_counter()
                calls[name]()
                times[name].append(1e3 * (time.perf_counter() - start))
                continue
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            flush.zero_()
            flush[:CLEAN_BYTES].view(torch.int32).amax()
            if host:
                torch.cuda.synchronize()
            events[0].record()
            calls[name]()
            events[1].record()
            late[name] += events[1].query()
            times[name].append(events)
    if not CUDA:
        return times
    torch.cuda.synchronize()
    if not host and (slow := [name for name in names if late[name] > rounds // 2]):
        print(f"The GPU waited for the host in: {', '.join(slow)}", file=sys.stderr)
    return {n: [a.elapsed_time(b) for a, b in t[WARMUP:]] for n, t in times.items()}


def peak_mib(call: Callable[[], object]) -> float | str:
    """MiB that one call holds at its peak, outputs and gradients included."""
    if not CUDA:
        return ""
    call()  # compiles, and makes the workspaces that stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def measure(case: Case, options: argparse.Namespace) -> list[dict]:
    """A row a provider: times, ratios, share of the bound, peak memory, error."""
    worst, skip = check(case), options.skip
    calls = {n: call for n, call in case.providers.items() if not skip or skip not in n}
    peaks = {name: peak_mib(call) for name, call in calls.items()}
    times = interleave(calls, options.rounds, host=options.host)
    rows = []
    for name, ms in times.items():
        ordered = sorted(ms)
        row = {"case": case.label, "provider": name, "ms": round(statistics.median(ms), 4)}
        for column, share in (("p20", 0.2), ("p80", 0.8)):
            row[column] = round(ordered[int(share * (len(ordered) - 1))], 4)
        for column, base in case.baselines.items():
            row[column] = median_ratio(ms, times[base])
        bound = [f * (1.0 + case.rank_share) for f in times[case.bound]]
        row["of_bound"] = "" if name.startswith("frozen") else median_ratio(bound, ms)
        row["peak_mib"] = peaks[name]
        row["rms"] = f"{worst[name]:.1e}" if name in worst else ""
        rows.append(row)
    return rows


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    return round(statistics.median(t / b for t, b in zip(times, base, strict=True)), 3)


def parse(
    name: str, rounds: int, *, host: bool = False, cpu: bool = False, gpus: bool = False
) -> argparse.Namespace:
    """The command line of every benchmark; `host` where --host means something, `cpu` where a
    machine without a GPU is measured as well, `gpus` where several GPUs are."""
    parser = argparse.ArgumentParser(description=f"Benchmark {name}")
    parser.add_argument("--smoke", action="store_true", help="tiny, on any device; writes nothing")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--case", help="only cases with this in their label; writes only to --out")
    if host:
        parser.add_argument("--host", action="store_true", help="idle GPU before each call")
    if gpus:
        parser.add_argument("--gpus", help="how many, as 1,2,4; default: the powers of two here")
    parser.add_argument("--skip", help="leave out providers with this in their name")
    parser.add_argument("--out", type=Path, help=f"folder of {name}.csv, default {RESULTS.name}/")
    parser.add_argument("--commit", help="to record where there is no git")
    options = parser.parse_args(namespace=argparse.Namespace(host=False))
    if options.smoke:
        options.rounds = 1
        torch.set_num_threads(1)  # the tensors are tiny; threads only wait
    elif not CUDA and not cpu:
        parser.error("no GPU here: only --smoke runs")
    torch.manual_seed(0)
    return options


def where(commit: str | None = None) -> dict[str, str]:
    """Card, versions, commit and command."""
    if not commit and shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "triton", "peft", "transformers")
    versions = {package: import_module(package).__version__ for package in packages}
    card = torch.cuda.get_device_name() if CUDA else "CPU"
    command = re.sub(r" --(out|commit) \S+", "", " ".join(sys.argv))
    return {"gpu": card, **versions, "commit": commit or "unknown", "command": command}


def report(name: str, rows: list[dict], new: list[dict], options: argparse.Namespace) -> None:
    """Prints `new`, adds it to `rows` and writes all of these: a killed run keeps what it has."""
    rows += new
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([str(row.get(c, "")) for c in columns] for row in new)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths)).rstrip(), flush=True)
    print(flush=True)
    if options.smoke or (options.case and not options.out):
        return
    folder = options.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    facts = where(options.commit)
    head = ", ".join(f"{k} {v}" for k, v in facts.items() if k not in ("gpu", "command"))
    with open(folder / f"{name}{'_host' * options.host}.csv", "w", newline="") as f:
        f.write(f"# {facts['gpu']}, {head}; {facts['command']}\n")
        writer = csv.DictWriter(f, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def main(name: str, cases: Mapping[str, Callable[[], Case]], smoke: Callable[[], list]) -> None:
    """Runs the picked cases, each made when its turn comes."""
    options, rows = parse(name, rounds=50, host=True), []
    picked = [make for label, make in cases.items() if is_picked(label, options)]
    for make in smoke() if options.smoke else picked:
        report(name, rows, measure(make(), options), options)
        gc.collect()


def is_picked(label: str, options: argparse.Namespace) -> bool:
    return not options.case or options.case in label
