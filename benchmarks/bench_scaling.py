"""Training steps and the scoring pass on several GPUs of one host, LLaMA-7B's shape, r=8.

A step is bench_step's: random bf16 weights, bf16 autocast, fp32 adapters, dropout .05, gradient
checkpointing (not reentrant), 4x2048 tokens a GPU; forward, backward with the gradients' reduction,
gradients set to None; no optimizer. Ways to run it:
  alone   without communication: on GPU 0 while the others idle (gpus 1), and on all at once
  DDP     as transformers' Trainer wraps a PEFT model: buffers broadcast, unused parameters looked
          for. It is wrapped before each turn, without broadcasting the weights again. Without LoRA
          nothing trains, DDP cannot wrap it, and each GPU runs alone
  FSDP2   as accelerate shards: a unit a decoder layer, the embeddings, the norm with the head; all
          in bf16, reductions too. Without LoRA the units still gather the adapters, 0.3 % more
One process a GPU, all models made once: the whole one and one sharded over each number of GPUs.
Every way, number of GPUs and variant has its turn in every round, whose order changes: GPU 0 alone,
the baseline of weak scaling, meets the same temperatures. A turn is a step that is not timed, then
one that is: all start together, the slowest counts, without garbage collection; other GPUs idle.
  scaling            tokens/s a GPU over that of GPU 0 alone, not sharded, with the same variant
  gpu_ms             time in which kernels other than NCCL's run, on rank 0
  comm_ms            time in which NCCL's run, waiting for other ranks included
  comm_exposed_ms    the part of it in which no other kernel runs
  all_gather_mib, reduced_mib    what all-gathers make and what is reduced in a step, on rank 0
  peak_gib           of the largest rank, as if the other models were not there
  loss               the mean over the ranks

Scoring is what the stage does: `lorapar.importance.accumulate_each` over the halves of two systems,
each of 100 examples in bench_score's lengths, batch 16, without gradient checkpointing, until the
sums are there on the GPU; `lorapar.ranks` is told of as many ranks as take part. Its scaling is its
speed-up over GPU 0 alone divided by the number of GPUs.
"""

import argparse
import contextlib
import functools
import gc
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple
from unittest import mock

import bench_step
import harness
import torch
import torch.distributed as dist
from bench_score import BATCH, examples
from bench_step import BASELINE, DEVICE, TOLERANCE, Variants, busy, wall_ms
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lorapar import ranks
from lorapar.importance import Sums, accumulate_each
from lorapar_kernels.testing import error

ALONE, DDP, FSDP2 = "alone", "DDP", "FSDP2"
VARIANTS = (BASELINE, "PEFT", "lorapar")
COLLECTIVES = {  # of torch 2.13 and before
    "all_gather_single": "gathers", "all_gather_into_tensor": "gathers",
    "reduce_scatter_single": "reductions", "reduce_scatter_tensor": "reductions",
}  # fmt: skip


class Turn(NamedTuple):
    """A way to run a step, on the first `gpus` GPUs, as a variant."""

    way: str
    gpus: int
    variant: str


class Fleet:
    """What one rank holds: groups, the whole model, and one sharded over each number of GPUs."""

    def __init__(self, rank: int, counts: list[int], options: argparse.Namespace):
        self.rank, self.counts, self.options = rank, counts, options
        self.shape = bench_step.SHAPE_TINY if options.smoke else bench_step.SHAPE_7B
        shape = (2, 16) if options.smoke else (4, 2048)
        self.label = f"{shape[0]}x{shape[1]} a GPU r=8 checkpointing"
        backend = "nccl" if harness.CUDA else "gloo"
        self.groups = {n: dist.new_group(range(n), backend=backend) for n in counts}
        self.control = {n: dist.new_group(range(n), backend="gloo") for n in counts}
        self.whole, self.sharded = self._variants(), {}
        seeded = torch.Generator(DEVICE).manual_seed(1 + rank)
        self.ids = torch.randint(
            self.shape["vocab_size"], shape, device=DEVICE, generator=seeded
        )  # fmt: skip

    def _variants(self) -> Variants:
        torch.manual_seed(0)  # the same weights on every rank
        base = bench_step.build(self.shape)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        return Variants(base, r=8)

    def shard(self, n: int) -> None:
        variants = self.sharded[n] = self._variants()
        base, bf16 = variants.base, torch.bfloat16
        shard = functools.partial(
            fully_shard,
            mesh=DeviceMesh.from_group(self.groups[n], DEVICE),
            mp_policy=MixedPrecisionPolicy(bf16, reduce_dtype=bf16, output_dtype=bf16),
        )
        for unit in (*base.model.layers, base.model.embed_tokens):
            shard(unit, reshard_after_forward=True)
        shard([base.model.norm, base.lm_head], reshard_after_forward=False)
        variants.call = shard(variants.model)
        variants.adapter = [p for p in base.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def placed(self, turn: Turn) -> Iterator[Variants | None]:
        """The model in the turn's state, wrapped; None on a rank that takes no part."""
        if self.rank >= turn.gpus:
            yield None
            return
        variants = self.sharded[turn.gpus] if turn.way == FSDP2 else self.whole
        variants.become(turn.variant)
        if turn.way != DDP or turn.variant == BASELINE:
            yield variants
            return
        before, variants.call = variants.call, DistributedDataParallel(
            variants.model,
            device_ids=[self.rank] if harness.CUDA else None,
            process_group=self.groups[turn.gpus],
            find_unused_parameters=True,
            init_sync=False,
        )  # fmt: skip
        try:
            yield variants
        finally:
            variants.call._remove_autograd_hooks()  # they are on the parameters, which stay
            variants.call = before

    def peak_gib(self, variants: Variants, call: Callable[[], object]) -> float:
        """Peak memory of a call, weights included; other models and adapters not in place not."""
        if not harness.CUDA:
            call()
            return 0.0
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        held: set[Tensor] = set()
        for each in (self.whole, *self.sharded.values()):
            held |= {*each.base.parameters(), *each.adapter}
        held -= {*variants.base.parameters()}
        return (torch.cuda.max_memory_allocated() - sum(map(local_bytes, held))) / 2**30


def local_bytes(p: Tensor) -> int:
    return (p.to_local() if isinstance(p, DTensor) else p).nbytes


def over_ranks(value: float, op: dist.ReduceOp = dist.ReduceOp.MAX) -> float:
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, op)
    return found.item()


def slowest(call: Callable[[], object] | None) -> float:
    """Milliseconds of the slowest rank; all start together. None: this rank waits."""
    bench_step._synchronize()
    gc.disable()
    try:
        dist.barrier()
        mine = wall_ms(call) if call else 0.0
    finally:
        gc.enable()
    return over_ranks(mine)


def gradient(fleet: Fleet, turn: Turn) -> Tensor | None:
    """All gradients of the adapter in one vector on the CPU; None: this rank takes no part."""
    with fleet.placed(turn) as variants:
        if not variants:
            return None
        variants.forward_backward(fleet.ids)
        grads = [p.grad for p in variants.adapter]
        grads = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
        for p in variants.adapter:
            p.grad = None
        return torch.cat([g.flatten().float() for g in grads]).cpu()


def check(fleet: Fleet, way: str, n: int) -> None:
    """Without dropout PEFT's gradients and ours are the mean over the ranks of what PEFT makes
    alone, and the same bits on every rank; else nothing is timed."""
    right, distance, same = gradient(fleet, Turn(ALONE, n, "PEFT p=0")), 0.0, True
    if right is not None:
        dist.all_reduce(right, group=fleet.control[n])
        right = right.div_(n).double()
    for name in ("PEFT p=0", "lorapar p=0"):
        found = gradient(fleet, Turn(way, n, name))
        if found is not None:
            first = found.clone()
            dist.broadcast(first, 0, group=fleet.control[n])
            distance, same = error(found, right).rms, torch.equal(first, found)
        if over_ranks(not (same and distance <= TOLERANCE)):  # NaN is not
            raise SystemExit(
                f"{way} on {n} GPUs: {name}: on rank {fleet.rank} gradients are {distance:.3f} off "
                f"the mean of PEFT's (relative, limit {TOLERANCE}), the same as on rank 0: {same}; "
                f"nothing was timed"
            )


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Calls and bytes of the all-gathers and reductions of FSDP2; DDP's are not Python's."""
    found: Counter = Counter()

    def counting(kind: str, function: Callable, *args, **options):
        found[kind] += 1
        sizes = [t.nbytes for t in (*args, *options.values()) if isinstance(t, Tensor)]
        found[f"{kind} in bytes"] += max(sizes)
        return function(*args, **options)

    names = {name: kind for name, kind in COLLECTIVES.items() if hasattr(dist, name)}
    calls = {n: functools.partial(counting, kind, getattr(dist, n)) for n, kind in names.items()}
    with mock.patch.multiple(dist, **calls):
        yield found


def kernel_times(call: Callable[[], object]) -> dict:
    """Busy time of kernels, of NCCL's, and of NCCL's where no other runs."""
    spans: dict[bool, list] = {True: [], False: []}
    for name, *span in bench_step.kernels(call):
        spans["nccl" in name.lower()].append(span)
    own, either = busy(spans[False]), busy(spans[False] + spans[True])
    times = {"gpu_ms": own, "comm_ms": busy(spans[True]), "comm_exposed_ms": either - own}
    return {name: round(t / 1e3, 2) for name, t in times.items()}


def survey(fleet: Fleet, turn: Turn) -> dict:
    """What a row has beside times of steps: kernels, communication, peak memory, loss."""
    peak, loss, moved, buckets, kernels = 0.0, 0.0, Counter(), [], {}
    with fleet.placed(turn) as variants:
        if variants:
            call = functools.partial(variants.step, fleet.ids)
            with counted() as moved:
                peak = fleet.peak_gib(variants, call)
            if isinstance(variants.call, DistributedDataParallel):
                sizes = variants.call._get_ddp_logging_data()["bucket_sizes"]
                buckets = [int(size) for size in sizes.split(",")]
            if harness.CUDA and fleet.rank == 0:
                kernels = kernel_times(call)
            elif harness.CUDA:
                call()
            loss = call().item() / turn.gpus
    return {
        **kernels,
        "all_gathers": moved["gathers"],
        "all_gather_mib": round(moved["gathers in bytes"] / 2**20, 1),
        "reductions": moved["reductions"] + len(buckets),
        "reduced_mib": round((moved["reductions in bytes"] + sum(buckets)) / 2**20, 1),
        "peak_gib": round(over_ranks(peak), 2) or "",
        "loss": round(over_ranks(loss, dist.ReduceOp.SUM), 4),
    }


def timed(fleet: Fleet, turn: Turn) -> float:
    """Milliseconds of one step after one that is not timed."""
    with fleet.placed(turn) as variants:
        call = functools.partial(variants.step, fleet.ids) if variants else None
        if call:
            call()
        return slowest(call)


def measure_steps(fleet: Fleet) -> list[dict]:
    options, several = fleet.options, [n for n in fleet.counts if n > 1]
    picked = [w for w in (ALONE, DDP, FSDP2) if harness.is_picked(f"{w} {fleet.label}", options)]
    plan = [(way, n) for way in picked if way != ALONE for n in several]
    for way, n in plan:
        if way == FSDP2 and fleet.rank < n:
            fleet.shard(n)
    for way, n in plan:
        check(fleet, way, n)
    if picked:
        plan = [*((ALONE, n) for n in sorted({1, fleet.counts[-1]})), *plan]
    names = [name for name in VARIANTS if not options.skip or options.skip not in name]
    turns = [Turn(way, n, name) for way, n in plan for name in names]
    surveys = {turn: survey(fleet, turn) for turn in turns}  # also the warm-up
    gc.collect()
    times: dict[Turn, list[float]] = {turn: [] for turn in turns}
    for i in range(options.rounds):
        first = i * len(turns) // options.rounds
        order = turns[first:] + turns[:first]
        for turn in order[:: 1 - 2 * (i % 2)]:  # so that none always follows the same one
            times[turn].append(timed(fleet, turn))
    return [row_of(fleet, turn, times) | surveys[turn] for turn in turns]


def row_of(fleet: Fleet, turn: Turn, times: dict[Turn, list[float]]) -> dict:
    def ratio(name: str) -> float | str:
        base = times.get(turn._replace(variant=name))
        return harness.median_ratio(times[turn], base) if base else ""

    ms = statistics.median(times[turn])
    return {
        "case": f"{turn.way} {fleet.label}",
        "gpus": turn.gpus,
        "variant": turn.variant,
        "ms": round(ms, 2),
        "tokens_per_s": round(1e3 * turn.gpus * fleet.ids.numel() / ms),
        "ratio_to_no_lora": ratio(BASELINE),
        "ratio_to_peft": ratio("PEFT"),
        "scaling": harness.median_ratio(times[Turn(ALONE, 1, turn.variant)], times[turn]),
    }


def measure_scoring(fleet: Fleet) -> list[dict]:
    torch.manual_seed(0)  # the same examples on every rank
    share = 0.05 if fleet.options.smoke else 1.0
    systems = [examples(fleet.shape["vocab_size"], share) for _ in range(2)]
    parts = [half for system in systems for half in (system[::2], system[1::2])]
    label = f"scoring 2 systems of {len(systems[0])} examples in two halves r=8"
    if not harness.is_picked(label, fleet.options):
        return []
    fleet.sharded.clear()
    fleet.whole.base.gradient_checkpointing_disable()
    fleet.whole.become("lorapar")

    def score(n: int) -> list[Sums]:
        """The sums of each half, on the first n ranks."""
        of_all = functools.partial(dist.all_reduce, group=fleet.groups[n])
        told = {"rank": lambda: fleet.rank, "world": lambda: n, "_control": fleet.control[n]}
        with mock.patch.multiple(ranks, **told, add_up=of_all if n > 1 else lambda t: None):
            found = accumulate_each(fleet.whole.model, parts, batch_size=BATCH, on_host=False)
        bench_step._synchronize()
        return found

    calls = {n: functools.partial(score, n) if fleet.rank < n else None for n in fleet.counts}
    peaks, off, right = {}, 0.0, None
    for n, call in calls.items():  # also the warm-up
        if fleet.rank == 0:
            found = torch.cat([t.flatten().cpu() for sums in call() for t in sums.g.values()])
            right = found.double() if right is None else right
            off = error(found, right).rms
        elif call:
            call()
        if over_ranks(not off <= TOLERANCE):
            raise SystemExit(f"{label}: on {n} GPUs Σg is {off:.3f} off; nothing was timed")
        peaks[n] = over_ranks(fleet.peak_gib(fleet.whole, call) if call else 0.0)
    times: dict[int, list[float]] = {n: [] for n in calls}
    for i in range(fleet.options.rounds):
        at = i % len(fleet.counts)
        for n in fleet.counts[at:] + fleet.counts[:at]:
            times[n].append(slowest(calls[n]))
    rows = []
    for n, ms in times.items():
        row = {
            "case": label,
            "gpus": n,
            "variant": "lorapar",
            "ms": round(statistics.median(ms), 2),
        }
        row["speed_up"] = harness.median_ratio(times[1], ms)
        row["scaling"] = round(row["speed_up"] / n, 3)
        rows.append(row | {"peak_gib": round(peaks[n], 2) or ""})
    return rows


def work(rank: int, rendezvous: str, counts: list[int], options: argparse.Namespace) -> None:
    """One of the processes; its GPU is that of its rank."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)  # as torchrun has it
    if harness.CUDA:
        torch.cuda.set_device(rank)
    dist.init_process_group(  # gloo: ranks that take no part wait on the host, not on the GPU
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=counts[-1],
        timeout=timedelta(minutes=5),
    )  # fmt: skip
    fleet, rows = Fleet(rank, counts, options), []
    for measure in (measure_steps, measure_scoring):
        new = measure(fleet)
        if new and rank == 0:
            harness.report("scaling", rows, new, options)
    dist.barrier()
    dist.destroy_process_group()


def main(options: argparse.Namespace) -> None:
    here = torch.cuda.device_count() if harness.CUDA else 2
    counts = [2**i for i in range(here.bit_length())]
    if options.gpus:
        counts = [int(n) for n in options.gpus.split(",")]
    counts = sorted({1, *counts})  # one is what the others are compared with
    if harness.CUDA and counts[-1] > here:
        raise SystemExit(f"{counts[-1]} GPUs were asked for, {here} are here")
    with tempfile.TemporaryDirectory() as folder:
        args = (f"{folder}/rendezvous", counts, options)
        try:
            torch.multiprocessing.spawn(work, args, nprocs=counts[-1])
        except torch.multiprocessing.ProcessExitedException as e:  # it has said why
            raise SystemExit(e.exit_code) from None


if __name__ == "__main__":
    main(harness.parse("scaling", rounds=5, gpus=True))
