"""Measures launch configurations and writes lorapar_kernels/tuned/<gpu>.json.

Each op is one function from (M, width, R) to the launches it is used for; it makes its tensors,
and the module under measurement asks for its configuration by its own key, which is recorded. An
entry is written where a candidate is MARGIN faster than the default, over all uses. Candidates are
compiled in parallel first, on few rows: a kernel does not depend on M. Plans (cuBLAS on a written
delta, or one GEMM that runs on over the rank) are measured on the whole op, forward and backward.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import harness
import torch
from torch import Tensor

from lorapar_kernels import (
    _tuned,
    dropout,
    dy_gradients,
    expand,
    extended_gemm,
    gradient,
    lora_linear,
    shrink,
)
from lorapar_kernels.pack import padded_rank

ROWS, WIDTHS = (2048, 8192), (4096, 11008, 1024)
LAYERS = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
PLAN_RANKS = (16, 32, 64, 128, 256)
PLAN_ROWS = (8192,)  # fewer rows are bound by the host, which says nothing of plans
COMPILE_ROWS = 256  # divisible as ROWS are
MARGIN = 0.02
PLAN_MARGIN = 0.005
DROPOUT = 0.05
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Launches = dict[str, Callable[[], object]]
Plan = tuple[bool, bool]


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def _valid(r: int) -> Tensor:
    return torch.ones(r, dtype=torch.int8, device=DEVICE)


def _bits(m: int, k: int, projections: int = 1) -> Tensor:
    bits = dropout.new_bits(torch.empty(m, k, device=DEVICE), projections, DROPOUT)
    return bits.random_()


def shrink_launches(m: int, k: int, r: int) -> Launches:
    x, a, valid, s = _randn(m, k), _randn(r, k), _valid(r), _randn(m, r)
    return {"S": lambda: shrink.shrink(x, a, valid, s, r)}


def shrink_dropout_launches(m: int, k: int, r: int) -> Launches:
    x, a, valid, s, bits = _randn(m, k), _randn(r, k), _valid(r), _randn(m, r), _bits(m, k)
    seed = torch.randint(2**62, (1,), device=DEVICE)
    return {"S": lambda: shrink.shrink_dropout(x, a, valid, seed, DROPOUT, s, bits)}


def expand_launches(m: int, n: int, r: int) -> Launches:
    s, a, out = _randn(m, r), _randn(r, n), _randn(m, n)
    return {"y": lambda: expand.expand(s, a, out)}


def expand_dropout_launches(m: int, n: int, r: int) -> Launches:
    s, a, out, bits = _randn(m, 3 * r), _randn(3 * r, n), _randn(m, n), _bits(m, n, 3)
    return {
        "dX": lambda: expand.expand(s[:, :r], a[:r], out, bits=bits[:1]),
        "dX of q, k, v": lambda: expand.expand(s, a, out, bits=bits),
    }


def gradient_launches(m: int, k: int, r: int, *, with_dropout: bool = False) -> Launches:
    s, x, bits = _randn(m, r), _randn(m, k), _bits(m, k) if with_dropout else None
    like = torch.empty(r, k, device=DEVICE)

    def run() -> None:
        partial = gradient.gradient(s, x, index=None, bits=bits)
        gradient.finish(partial, like, 0, slot=None, mask=None)

    return {"dA": run}


def dy_gradients_launches(m: int, n: int, r: int) -> Launches:
    dy, b, s, ds, valid = _randn(m, n), _randn(r, n), _randn(m, r), _randn(m, r), _valid(r)
    like = torch.empty(n, r, device=DEVICE)

    def run() -> None:
        partial = dy_gradients.dy_gradients(dy, b, s, ds, valid, index=None)
        gradient.finish(partial, like, 1, slot=None, mask=None)

    return {"dS, dB": run}


def _grid(names: tuple[str, ...], *values: tuple[int, ...]) -> list[dict]:
    return [dict(zip((*names, "num_warps", "num_stages"), v, strict=True)) for v in values]


@dataclass(frozen=True)
class Op:
    module: ModuleType  # asks for its configuration by `config`
    launches: Callable[[int, int, int], Launches]
    ranks: tuple[int, ...]  # as in the key
    candidates: list[dict]


OPS = {  # by the name under which the module asks
    "shrink": Op(shrink, shrink_launches, (16, 32, 64, 128), _grid(
        ("BLOCK_M", "BLOCK_K"),
        (64, 128, 4, 4), (64, 128, 4, 5), (64, 64, 4, 6), (32, 128, 4, 4), (32, 256, 4, 3),
        (32, 128, 2, 5), (32, 64, 2, 6), (16, 256, 4, 4), (16, 128, 2, 5), (128, 64, 8, 4),
        (64, 64, 8, 4), (64, 64, 4, 3), (64, 32, 4, 5),
    )),
    "shrink_dropout": Op(shrink, shrink_dropout_launches, (16, 32, 64, 128), _grid(
        ("BLOCK_M",),
        (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 1), (32, 4, 2), (32, 4, 3), (32, 2, 2),
        (32, 8, 2), (32, 4, 1), (16, 4, 2), (16, 2, 2), (16, 2, 3),
    )),
    "expand": Op(expand, expand_launches, (16, 32, 64), _grid(
        ("BLOCK_M", "BLOCK_N"),
        (128, 128, 8, 2), (128, 128, 4, 2), (64, 128, 4, 2), (128, 256, 8, 2), (64, 256, 4, 2),
        (64, 256, 8, 2), (32, 256, 4, 2), (32, 512, 8, 2), (16, 512, 4, 2), (64, 64, 4, 2),
        (32, 128, 4, 2),
    )),
    "expand_dropout": Op(expand, expand_dropout_launches, (16, 32, 64), _grid(
        ("BLOCK_M", "BLOCK_N"),
        (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 2, 2), (32, 64, 4, 2),
        (64, 128, 4, 2), (32, 128, 4, 2), (128, 128, 8, 2), (32, 256, 4, 2),
    )),
    "gradient": Op(gradient, gradient_launches, (16, 32, 64), _grid(
        ("BLOCK_M", "BLOCK_K"),
        (64, 128, 4, 4), (64, 128, 4, 5), (64, 128, 8, 5), (128, 128, 8, 3), (128, 128, 8, 4),
        (64, 64, 4, 5), (128, 64, 4, 4), (32, 128, 4, 6), (64, 32, 4, 6), (64, 64, 4, 3),
    )),
    "gradient_dropout": Op(
        gradient, functools.partial(gradient_launches, with_dropout=True), (16, 32, 64, 128), _grid(
            ("BLOCK_M", "BLOCK_K"),
            (64, 128, 8, 4), (64, 128, 4, 4), (32, 256, 8, 4), (64, 256, 8, 3), (64, 64, 4, 4),
            (128, 128, 8, 3), (64, 128, 8, 3), (128, 64, 8, 4), (32, 64, 4, 6),
        )),
    "dy_gradients": Op(dy_gradients, dy_gradients_launches, (16, 32, 64), _grid(
        ("BLOCK_M", "BLOCK_N"),
        (64, 256, 8, 3), (64, 256, 4, 3), (64, 256, 8, 4), (32, 512, 8, 3), (64, 128, 4, 4),
        (32, 256, 4, 4), (128, 128, 8, 3), (64, 128, 4, 5), (32, 128, 4, 5), (64, 512, 8, 2),
    )),
}  # fmt: skip


PLANS = "extended_gemm"


def using(op: Op, candidate: dict | None, asked: dict | None = None):
    """Makes the op's module take `candidate`, or its own default, which `asked` gets."""

    def config(name, rows, key, hopper, safe, interpreted):
        default = hopper if rows.is_cuda else interpreted
        if asked is not None:
            asked[name, key] = default
        return dict(candidate or default)

    return mock.patch.object(op.module, "config", config)


def runs_with(op: Op, candidate: dict | None, launch: Callable) -> Callable[[], None]:
    def run() -> None:
        with using(op, candidate):
            launch()

    return run


def try_one(job: tuple[str, int, int, dict | None]) -> str:
    """Compiles a candidate by running it once; what went wrong, or nothing. In its own process."""
    name, width, r, candidate = job
    try:
        for launch in OPS[name].launches(COMPILE_ROWS, width, r).values():
            runs_with(OPS[name], candidate, launch)()
        if harness.CUDA:
            torch.cuda.synchronize()
    except Exception as e:  # too much shared memory, mostly
        return f"{type(e).__name__}: {e}".splitlines()[0][:100]
    return ""


def compile_all(jobs: list[tuple]) -> set[str]:
    """Compiles all jobs in parallel; the keys (`job_key`) of those that run."""
    workers = min(14, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        failures = dict(zip(map(job_key, jobs), pool.map(try_one, jobs)))
    for key, failure in failures.items():
        if failure:
            print(f"left out: {key}: {failure}", flush=True)
    return {key for key, failure in failures.items() if not failure}


def job_key(job: tuple) -> str:
    return json.dumps(job)


def best(op: Op, launches: Launches, candidates: list[dict], rounds: int) -> dict | None:
    """The fastest candidate over all uses, None where the default is as good; prints both."""
    if not candidates:
        return None
    cost = [0.0] * len(candidates)
    for launch in launches.values():
        calls = {"default": runs_with(op, None, launch)}
        calls |= {str(i): runs_with(op, c, launch) for i, c in enumerate(candidates)}
        times = {n: statistics.median(ms) for n, ms in harness.interleave(calls, rounds).items()}
        for i in range(len(candidates)):
            cost[i] += times[str(i)] / times["default"] / len(launches)
    first = min(range(len(candidates)), key=cost.__getitem__)
    print(f"    {cost[first]:.3f} of the default: {candidates[first]}", flush=True)
    return candidates[first] if cost[first] <= 1.0 - MARGIN else None


def tune(picked: dict[str, Op], rounds: int) -> Iterator[tuple[str, str, dict[str, dict]]]:
    """(op, key, configuration by M) where a candidate wins at some M; the default at the others."""
    jobs = [(n, WIDTHS[0], r, c) for n, op in picked.items() for r in op.ranks
            for c in op.candidates]  # fmt: skip
    fine = compile_all(jobs)
    print(f"{len(fine)} of {len(jobs)} candidates compiled", flush=True)
    for (name, op), width in itertools.product(picked.items(), WIDTHS):
        for r in op.ranks:
            candidates = [c for c in op.candidates if job_key((name, WIDTHS[0], r, c)) in fine]
            by_m, won = {}, False
            for m in ROWS:
                launches, asked = op.launches(m, width, r), {}
                with using(op, None, asked):
                    for launch in launches.values():
                        launch()
                (((name_there, key), default),) = asked.items()
                assert name_there == name, f"{name}: the module asks for {name_there}"
                print(f"{name} {key} M={m}", flush=True)
                winner = best(op, launches, candidates, rounds)
                by_m[str(m)], won = winner or default, won or winner is not None
            if won:
                yield name, key, by_m


def plan_times(m: int, k: int, n: int, r: int, p: float, rounds: int) -> dict[Plan, float]:
    """Median milliseconds of a layer, forward and backward, under each (plan of y, plan of dX)."""
    x, w, dy = _randn(m, k).requires_grad_(), _randn(n, k), _randn(m, n)
    a = torch.randn(r, k, device=DEVICE, requires_grad=True)
    b = torch.randn(n, r, device=DEVICE, requires_grad=True)

    def run(plan: Plan) -> None:
        def wins(x, w, a, R, *, transposed, dropout=False):
            return plan[0] if transposed else plan[1]

        with mock.patch.object(extended_gemm, "wins", wins):
            torch.autograd.grad(lora_linear(x, w, a, b, 2.0, dropout_p=p), (x, a, b), dy)

    both = list(itertools.product((False, True), repeat=2))
    calls = {str(plan): functools.partial(run, plan) for plan in both}
    times = harness.interleave(calls, rounds)
    return {plan: statistics.median(times[str(plan)]) for plan in both}


def plans(rounds: int) -> Iterator[tuple[str, str, bool]]:
    """(key, M, whether `extended_gemm` is the faster plan), for y and for dX of each layer."""
    cases = itertools.product(LAYERS, PLAN_RANKS, (0.0, DROPOUT), PLAN_ROWS)
    for (k, n), r, p, m in cases:
        times = plan_times(m, k, n, r, p, rounds)
        cublas, best = times[False, False], min(times, key=times.__getitem__)
        if times[best] > (1.0 - PLAN_MARGIN) * cublas:
            best = (False, False)
        print(f"plan K={k} N={n} r={r} p={p} M={m}: y, dX extended {best}, "
              f"{times[best] / cublas:.3f} of cuBLAS", flush=True)  # fmt: skip
        for transposed, plan in zip((True, False), best):
            if not (transposed and p):  # the plan of y is that without dropout
                like = torch.empty(n, k, device="meta")
                yield (
                    extended_gemm.plan_key(like, padded_rank(r), transposed, p > 0.0),
                    str(m),
                    plan,
                )


def as_json(table: dict) -> str:
    """Indented, but one line a configuration."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s*([^{}]*?)\s*\}", lambda m: f"{{{' '.join(m[1].split())}}}", text) + "\n"


def smoke() -> None:
    """Every launch with its default and one candidate; needs TRITON_INTERPRET=1 on a CPU."""
    for name, op in OPS.items():
        for candidate in (None, op.candidates[-1]):
            if failure := try_one((name, 64, 16, candidate)):
                raise SystemExit(f"{name} {candidate}: {failure}")
            print(f"{name} {candidate or 'default'}: runs")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune launch configurations for this GPU")
    parser.add_argument(
        "--op", action="append", choices=(*OPS, PLANS), help="only this; keeps the others'"
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="another folder for the file")
    parser.add_argument("--commit", help="to record where there is no git")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        return smoke()
    if not harness.CUDA:
        parser.error("no GPU here")
    facts = harness.where(options.commit)
    file = _tuned.file_of(facts["gpu"])
    ops = json.loads(file.read_text())["ops"] if file.exists() else {}
    picked = {name: op for name, op in OPS.items() if not options.op or name in options.op}
    ops = {name: table for name, table in ops.items() if name not in picked}
    file = options.out / file.name if options.out else file
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {k: facts[k] for k in ("gpu", "torch", "triton", "commit", "command")}
    for name, key, by_m in tune(picked, options.rounds):
        ops.setdefault(name, {})[key] = by_m
        file.write_text(as_json({**head, "ops": ops}))
    if options.op and PLANS not in options.op:
        return
    _tuned._table.cache_clear(), _tuned._nearest.cache_clear()  # plans run on the new launches
    ops[PLANS] = {}
    for key, m, plan in plans(options.rounds):
        ops[PLANS].setdefault(key, {})[m] = plan
        file.write_text(as_json({**head, "ops": ops}))


if __name__ == "__main__":
    main()
