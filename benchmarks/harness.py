"""Checks every provider against float64, then times them interleaved, as ratios to the first."""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorapar_kernels.testing import FACTOR, error

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: `providers` maps a name to a call that returns y and gradients."""

    label: str
    providers: dict[str, Callable[[], Sequence[torch.Tensor]]]
    exact: Sequence[torch.Tensor] | None = None  # float64, for the providers that compute it
    checked: Sequence[str] = ()  # the first of these is the baseline


def check(case: Case) -> dict[str, float]:
    """RMS error by provider; SystemExit where one is wrong."""
    errors, limit = {}, None
    for name in case.checked:
        rms = max(error(out, ref).rms for out, ref in zip(case.providers[name](), case.exact))
        limit = FACTOR * rms if limit is None else limit
        if not rms <= limit + 1e-7:
            raise SystemExit(f"{case.label}: {name} is wrong (rms {rms:.1e}); nothing was timed")
        errors[name] = rms
    return errors


def measure(case: Case, rounds: int) -> list[dict]:
    """Medians over rounds in which every provider runs once, and medians of ratios."""
    errors, sync = check(case), torch.cuda.synchronize if torch.cuda.is_available() else int
    times: dict[str, list[float]] = {name: [] for name in case.providers}
    for round_ in range(rounds + 2):
        for name, call in case.providers.items():
            sync()
            start = time.perf_counter()
            call()
            sync()
            if round_ >= 2:  # two rounds of warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    first = times[next(iter(times))]
    return [
        {
            "case": case.label,
            "provider": name,
            "ms": round(statistics.median(ms), 4),
            "ratio": round(statistics.median(m / f for m, f in zip(ms, first)), 3),
            "rms": f"{errors[name]:.1e}" if name in errors else "",
        }
        for name, ms in times.items()
    ]


def main(name: str, cases: Callable[[bool], list[Callable[[], Case]]]) -> None:
    """The command line of a benchmark: a table, and a CSV with where it was measured."""
    parser = argparse.ArgumentParser(description=f"Benchmark {name}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, nothing written: CI")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for make in cases(options.smoke):
        rows += measure(make(), 1 if options.smoke else options.rounds)
    width = max(len(row["case"]) for row in rows)
    print(f"{'case':{width}} {'provider':12} {'ms':>9} {'ratio':>6} {'rms':>8}")
    for row in rows:
        print("{case:{w}} {provider:12} {ms:9.3f} {ratio:6.2f} {rms:>8}".format(w=width, **row))
    if options.smoke:
        return
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    where = f"{card}, torch {torch.__version__}, {torch.get_num_threads()} threads, {commit}"
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as f:
        f.write(f"# {where}; {' '.join(sys.argv)}\n")
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
