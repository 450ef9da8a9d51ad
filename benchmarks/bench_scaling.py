"""Training steps and the scoring pass on several GPUs of one host, LLaMA-7B's shape, r=8.

A step is bench_step's: random bf16 weights, bf16 autocast, fp32 adapters, dropout .05, gradient
checkpointing (not reentrant), 4x2048 tokens a GPU; forward, backward with the gradients' reduction,
gradients set to None; no optimizer. Ways to run it:
  alone   without communication: on GPU 0 while the others idle (gpus 1), and on all at once
  DDP     as transformers' Trainer wraps a PEFT model: buffers broadcast, unused parameters looked
          for. The weights are not broadcast again when it is wrapped, which comes before each
          measurement. Without LoRA nothing trains and nothing is reduced: those GPUs run alone
  FSDP2   as accelerate shards: a unit a decoder layer, the embeddings, the norm with the head; all
          in bf16, reductions too. Without LoRA the units still gather the adapters, 0.3 % more
One process a GPU, all models made once, the whole one and one sharded over each number of GPUs.
Every way, number of GPUs and variant takes its turn in every round, the order rotates: so the
baseline of weak scaling, GPU 0 alone, meets the same temperatures. A turn is a step that is not
timed, then one that is: all start together, the slowest counts, garbage collection is off, GPUs
that take no part idle.

  scaling            tokens/s a GPU over that of GPU 0 alone with the same variant, round by round
  gpu_ms             time in which a kernel that is not NCCL's runs, rank 0
  comm_ms            time in which a kernel of NCCL's runs, waiting for other ranks included
  comm_exposed_ms    the part of it in which no other kernel runs
  all_gather_mib, reduced_mib    what all-gathers make and what is reduced, in a step, a GPU
  peak_gib           of the largest rank, as if the other models were not there

Scoring is `lorapar.importance.accumulate` over bench_score's 100 examples in two halves, batch 16,
without gradient checkpointing; its ranks are those of a sub-group. `speed_up` is to one GPU.
"""

import argparse
import contextlib
import functools
import gc
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from unittest import mock

import bench_step
import harness
import torch
import torch.distributed as dist
from bench_score import BATCH, examples
from bench_step import BASELINE, DEVICE, SHAPE_7B, SHAPE_TINY, TOLERANCE, Variants, busy, wall_ms
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lorapar import ranks
from lorapar.importance import Sums, accumulate
from lorapar_kernels.testing import error

ALONE, DDP, FSDP2 = "alone", "DDP", "FSDP2"
VARIANTS = (BASELINE, "PEFT", "lorapar")
GATHERS = ("all_gather_single", "all_gather_into_tensor")  # torch 2.13 and before
REDUCTIONS = ("reduce_scatter_single", "reduce_scatter_tensor", "all_reduce")
BF16 = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16
)
MIB = 2**20


@dataclass(frozen=True)
class Turn:
    """A way to run a step, on the first `gpus` GPUs, as a variant."""

    way: str
    gpus: int
    variant: str


class Fleet:
    """What one rank holds: the groups, the whole model, and a model sharded over each count."""

    def __init__(self, rank: int, world: int, counts: list[int], options: argparse.Namespace):
        self.rank, self.world, self.counts = rank, world, counts
        self.shape = SHAPE_TINY if options.smoke else SHAPE_7B
        batch, tokens = (2, 16) if options.smoke else (4, 2048)
        self.label = f"{batch}x{tokens} a GPU r=8 checkpointing"
        backend = "nccl" if harness.CUDA else "gloo"
        self.groups = {n: dist.new_group(range(n), backend=backend) for n in counts}
        self.control = {n: dist.new_group(range(n), backend="gloo") for n in counts}
        self.whole, self.sharded = self._variants(), {}
        generator = torch.Generator(DEVICE).manual_seed(1 + rank)
        self.ids = torch.randint(
            self.shape["vocab_size"], (batch, tokens), device=DEVICE, generator=generator
        )

    def _variants(self) -> Variants:
        torch.manual_seed(0)  # the same weights on every rank
        base = bench_step.build(self.shape)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        return Variants(base, r=8)

    def shard(self, n: int) -> None:
        if self.rank >= n:
            return
        variants = self.sharded[n] = self._variants()
        mesh = DeviceMesh.from_group(self.groups[n], DEVICE)
        shard = functools.partial(fully_shard, mesh=mesh, mp_policy=BF16)
        base = variants.base
        for unit in (*base.model.layers, base.model.embed_tokens):
            shard(unit, reshard_after_forward=True)
        shard([base.model.norm, base.lm_head], reshard_after_forward=False)
        shard(variants.model)
        variants.adapter = [p for p in base.parameters() if p.requires_grad]

    def variants(self, turn: Turn) -> Variants:
        return self.sharded[turn.gpus] if turn.way == FSDP2 else self.whole

    @contextlib.contextmanager
    def placed(self, turn: Turn) -> Iterator[nn.Module | None]:
        """The model in the turn's state, wrapped; None on a rank that takes no part."""
        if self.rank >= turn.gpus:
            yield None
            return
        variants = self.variants(turn)
        variants.become(turn.variant)
        if turn.way != DDP or turn.variant == BASELINE:
            yield variants.model
            return
        wrapped = DistributedDataParallel(
            variants.model,
            device_ids=[self.rank] if harness.CUDA else None,
            process_group=self.groups[turn.gpus],
            find_unused_parameters=True,
            init_sync=False,
        )
        try:
            yield wrapped
        finally:
            wrapped._remove_autograd_hooks()  # they are on the parameters, which stay

    def over_ranks(self, value: float, op: dist.ReduceOp) -> float:
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, op)
        return found.item()

    def slowest(self, call: Callable[[], object] | None) -> float:
        """Milliseconds of the slowest rank; all start together."""
        bench_step._synchronize()
        gc.disable()
        try:
            dist.barrier()
            mine = wall_ms(call) if call else 0.0
        finally:
            gc.enable()
        return self.over_ranks(mine, dist.ReduceOp.MAX)


def forward_backward(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def step(model: nn.Module, variants: Variants, ids: Tensor) -> Tensor:
    loss = forward_backward(model, ids)
    for p in variants.adapter:
        p.grad = None
    return loss


def gradient(fleet: Fleet, turn: Turn) -> Tensor | None:
    """All gradients of the adapter in one vector, None on a rank that takes no part."""
    with fleet.placed(turn) as model:
        if model is None:
            return None
        forward_backward(model, fleet.ids)
        adapter = fleet.variants(turn).adapter
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in adapter]
        found = torch.cat([g.flatten().float() for g in grads])
        for p in adapter:
            p.grad = None
    return found


def check(fleet: Fleet, way: str, n: int) -> None:
    """Without dropout PEFT's gradients and ours are the mean over the ranks of what PEFT makes
    alone, and the same bits on every rank; else nothing is timed."""
    right = gradient(fleet, Turn(ALONE, n, "PEFT p=0"))
    if right is not None:
        right = right.cpu()
        dist.all_reduce(right, group=fleet.control[n])
        right = right.div_(n).double()
    for name in ("PEFT p=0", "lorapar p=0"):
        found, distance, apart = gradient(fleet, Turn(way, n, name)), 0.0, False
        if found is not None:
            found = found.cpu()
            first = found.clone()
            dist.broadcast(first, 0, group=fleet.control[n])
            distance, apart = error(found, right).rms, not torch.equal(first, found)
        wrong = float(apart or not distance <= TOLERANCE)
        if fleet.over_ranks(wrong, dist.ReduceOp.MAX):
            raise SystemExit(
                f"{way}, {n} GPUs: {name}: rank {fleet.rank}: gradients are {distance:.3f} off the "
                f"mean of PEFT's (relative, limit {TOLERANCE}){', not rank 0 s' * apart}; nothing "
                f"was timed"
            )


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Calls and bytes of all-gathers and reductions that Python starts: FSDP2's, not DDP's."""
    found: Counter = Counter()

    def counting(kind: str, function: Callable) -> Callable:
        def call(*args, **options):
            tensors = [t for t in (*args, *options.values()) if isinstance(t, Tensor)]
            found[kind] += 1
            found[f"{kind}_bytes"] += max(t.nbytes for t in tensors)
            return function(*args, **options)

        return call

    with contextlib.ExitStack() as stack:
        for kind, names in (("gathers", GATHERS), ("reductions", REDUCTIONS)):
            for name in names:
                if function := getattr(dist, name, None):
                    stack.enter_context(mock.patch.object(dist, name, counting(kind, function)))
        yield found


def bucket_bytes(model: nn.Module | None) -> list[int]:
    """Of the buckets that DDP reduces in a step."""
    if not isinstance(model, DistributedDataParallel):
        return []
    facts = model._get_ddp_logging_data()
    sizes = facts.get("rebuilt_bucket_sizes") or facts["bucket_sizes"]
    return [int(size) for size in str(sizes).split(",")]


def kernel_times(call: Callable[[], object]) -> dict:
    """Busy time of kernels, of NCCL's, and of NCCL's where no other runs."""
    if not harness.CUDA:
        call()
        return {"gpu_ms": "", "comm_ms": "", "comm_exposed_ms": ""}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    spans: dict[bool, list] = {True: [], False: []}
    for e in profiled.events():
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation:
            spans["nccl" in e.name.lower()].append((e.time_range.start, e.time_range.end))
    own, all_ = busy(spans[False]), busy(spans[False] + spans[True])
    times = {"gpu_ms": own, "comm_ms": busy(spans[True]), "comm_exposed_ms": all_ - own}
    return {name: round(t / 1e3, 2) for name, t in times.items()}


def held_bytes(parameters: Iterable[Tensor]) -> int:
    """What this rank holds of them."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in set(parameters))


def peak_gib(fleet: Fleet, mine: Variants, unused: list[Tensor], call: Callable[[], object]):
    """Peak memory of a call, weights included; other models' and the `unused` are not."""
    if not harness.CUDA:
        call()
        return 0.0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held_bytes(unused)
    for other in {fleet.whole, *fleet.sharded.values()} - {mine}:  # whichever variant it is now
        peak -= held_bytes([*other.base.parameters(), *other.adapter])
    return peak / 2**30


def survey(fleet: Fleet, turn: Turn) -> dict:
    """A row without times: kernels and communication of a step, peak memory, loss."""
    peak, loss, moved, kernels, buckets = 0.0, 0.0, Counter(), {}, []
    with fleet.placed(turn) as model:
        if model is not None:
            variants = fleet.variants(turn)
            call = functools.partial(step, model, variants, fleet.ids)
            loss = call().item() / turn.gpus
            buckets = bucket_bytes(model)
            with counted() as moved:
                unused = variants.adapter if turn.variant == BASELINE else []
                peak = peak_gib(fleet, variants, unused, call)
            if fleet.rank == 0:
                kernels = kernel_times(call)
            else:
                call()
    reduced = moved["reductions_bytes"] + sum(buckets)
    return kernels | {
        "all_gathers": moved["gathers"],
        "all_gather_mib": round(moved["gathers_bytes"] / MIB, 1),
        "reductions": moved["reductions"] + len(buckets),
        "reduced_mib": round(reduced / MIB, 1),
        "peak_gib": round(fleet.over_ranks(peak, dist.ReduceOp.MAX), 2) or "",
        "loss": round(fleet.over_ranks(loss, dist.ReduceOp.SUM), 4),
    }


def timed(fleet: Fleet, turn: Turn) -> float:
    """Milliseconds of one step after one that is not timed."""
    with fleet.placed(turn) as model:
        call = None
        if model is not None:
            call = functools.partial(step, model, fleet.variants(turn), fleet.ids)
            call()
        return fleet.slowest(call)


def measure_steps(fleet: Fleet, options: argparse.Namespace) -> list[dict]:
    several = [n for n in fleet.counts if n > 1]
    ways = [
        way for way in (ALONE, DDP, FSDP2) if harness.is_picked(f"{way} {fleet.label}", options)
    ]
    if not ways:
        return []
    for n in several if FSDP2 in ways else ():
        fleet.shard(n)
    for way in (way for way in ways if way != ALONE):
        for n in several:
            check(fleet, way, n)
    plan = [(ALONE, n) for n in dict.fromkeys((1, fleet.world))]
    plan += [(way, n) for way in ways if way != ALONE for n in several]
    names = [name for name in VARIANTS if not options.skip or options.skip not in name]
    turns = [Turn(way, n, name) for way, n in plan for name in names]
    surveys = {turn: survey(fleet, turn) for turn in turns}  # also the warm-up
    times: dict[Turn, list[float]] = {turn: [] for turn in turns}
    gc.collect()
    for i in range(options.rounds):
        first = i * len(names) % len(turns) + i % len(names)
        for turn in turns[first:] + turns[:first]:
            times[turn].append(timed(fleet, turn))
    return [row_of(fleet, turn, times) | surveys[turn] for turn in turns]


def row_of(fleet: Fleet, turn: Turn, times: dict[Turn, list[float]]) -> dict:
    def ratio(way: str, gpus: int, variant: str) -> float | str:
        base = times.get(Turn(way, gpus, variant))
        return harness.median_ratio(times[turn], base) if base else ""

    ms, alone = statistics.median(times[turn]), times[Turn(ALONE, 1, turn.variant)]
    return {
        "case": f"{turn.way} {fleet.label}",
        "gpus": turn.gpus,
        "variant": turn.variant,
        "ms": round(ms, 2),
        "tokens_per_s": round(1e3 * turn.gpus * fleet.ids.numel() / ms),
        "ratio_to_no_lora": ratio(turn.way, turn.gpus, BASELINE),
        "ratio_to_peft": ratio(turn.way, turn.gpus, "PEFT"),
        "scaling": harness.median_ratio(alone, times[turn]),
    }


@contextlib.contextmanager
def among(fleet: Fleet, n: int) -> Iterator[None]:
    """`lorapar.ranks` knows of the first n ranks only."""

    def add_up(t: Tensor) -> None:
        if n > 1:
            dist.all_reduce(t, group=fleet.groups[n])

    with mock.patch.multiple(
        ranks,
        rank=lambda: fleet.rank,
        world=lambda: n,
        add_up=add_up,
        _control=fleet.control[n],
    ):
        yield


def measure_scoring(fleet: Fleet, options: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)  # the same examples on every rank
    batch = examples(fleet.shape["vocab_size"], 0.05 if options.smoke else 1.0)
    label = f"scoring {len(batch)} examples in two halves r=8"
    if not harness.is_picked(label, options):
        return []
    fleet.sharded.clear()
    gc.collect()
    fleet.whole.base.gradient_checkpointing_disable()
    fleet.whole.become("lorapar")

    def score(n: int) -> list[Sums]:
        with among(fleet, n):
            halves = (batch[::2], batch[1::2])
            return [accumulate(fleet.whole.model, half, batch_size=BATCH) for half in halves]

    rows, times, first = {}, {n: [] for n in fleet.counts}, None
    for n in fleet.counts:
        peak, call = 0.0, functools.partial(score, n)
        if fleet.rank < n:
            found = call()
            peak = peak_gib(fleet, fleet.whole, [], call)
        if fleet.rank == 0:
            made = torch.cat([t.flatten() for sums in found for t in sums.g.values()]).double()
            first = made if first is None else first
            distance = error(made, first).rms
        wrong = float(fleet.rank == 0 and not distance <= TOLERANCE)
        if fleet.over_ranks(wrong, dist.ReduceOp.MAX):
            raise SystemExit(f"{label}: {n} GPUs: the sums are not one GPU's; nothing was timed")
        peak = round(fleet.over_ranks(peak, dist.ReduceOp.MAX), 2)
        rows[n] = {"case": label, "gpus": n, "variant": "lorapar", "peak_gib": peak or ""}
    for i in range(options.rounds):
        at = i % len(fleet.counts)
        for n in fleet.counts[at:] + fleet.counts[:at]:
            call = functools.partial(score, n) if fleet.rank < n else None
            times[n].append(fleet.slowest(call))
    for n, row in rows.items():
        ms = statistics.median(times[n])
        speed_up = statistics.median(one / t for one, t in zip(times[1], times[n]))
        row |= {"ms": round(ms, 2), "speed_up": round(speed_up, 3)}
        row["scaling"] = round(speed_up / n, 3)
        row["examples_per_s"] = round(1e3 * len(batch) / ms, 1)
    return list(rows.values())


def work(
    rank: int, world: int, rendezvous: str, counts: list[int], options: argparse.Namespace
) -> None:
    """One process of them, with the GPU of its rank."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)  # as torchrun has it
    if harness.CUDA:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo",  # idle ranks wait on the host; NCCL's groups are the fleet's
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=5),
    )
    fleet, rows = Fleet(rank, world, counts, options), []
    for measure in (measure_steps, measure_scoring):
        new = measure(fleet, options)
        if rank == 0 and new:
            harness.report("scaling", rows, new, options)
    dist.barrier()
    dist.destroy_process_group()


def main(options: argparse.Namespace) -> None:
    here = torch.cuda.device_count() if harness.CUDA else 2
    counts = [2**i for i in range(here.bit_length())]
    if options.gpus:
        counts = [int(n) for n in options.gpus.split(",")]
    counts = sorted({1, *counts})  # one is what the others are compared with
    if counts[-1] > here:
        raise SystemExit(f"{counts[-1]} GPUs were asked for; {here} are here")
    with tempfile.TemporaryDirectory() as folder:
        args = (counts[-1], f"{folder}/rendezvous", counts, options)
        torch.multiprocessing.spawn(work, args, nprocs=counts[-1])


if __name__ == "__main__":
    main(harness.parse("scaling", rounds=5, gpus=True))
