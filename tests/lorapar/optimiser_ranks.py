"""One of WORLD processes whose optimiser's state is saved and loaded by torch and accelerate:
torchrun optimiser_ranks.py FOLDER. In FOLDER lies `one`, a state saved unsharded.

Each case, of parameters sharded by FSDP2, writes what it found to FOLDER/RANK. At the end rank 0
goes on alone, as a world of one, from what accelerate saved for all.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import fsdp_utils
from accelerate.utils.fsdp_utils import (
    fsdp2_switch_optimizer_parameters,
    load_fsdp_optimizer,
    save_fsdp_optimizer,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import ShardedStateDictConfig, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lorapar_kernels import MaskedAdamW

fsdp_utils.logger = logging.getLogger(__name__)  # its own wants an `Accelerator`

BEFORE, AFTER = range(2), range(2, 4)  # steps, the state saved between
KINDS = {
    "full": {"state_dict_type": "FULL_STATE_DICT"},
    "sharded": {"state_dict_type": "SHARDED_STATE_DICT"},
    "sharded, left on its device": {
        "state_dict_type": "SHARDED_STATE_DICT",
        "state_dict_config": ShardedStateDictConfig(offload_to_cpu=False),
    },
}
SHAPES = {
    "uneven": (7, 5),
    "few": (1, 6),  # fewer rows than ranks
    "late": (8, 6),  # nothing trainable on the first rank
    "frozen": (4, 3),  # nothing at all
    "whole": (9,),  # no mask
    "columns": (3, 8),  # sharded by columns
}
OPTIONS = [
    {"full_state_dict": False},
    {"full_state_dict": False, "cpu_offload": True},
    {"full_state_dict": False, "flatten_optimizer_state_dict": True},
    {"full_state_dict": True},
    {"full_state_dict": True, "broadcast_from_rank0": True},
    {"full_state_dict": True, "broadcast_from_rank0": True, "cpu_offload": True},
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ParameterDict({n: torch.randn(s) for n, s in SHAPES.items()})
        self.sixteen = nn.Linear(6, 9).bfloat16()


def make_masks() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    masks = {f"inner.{n}": torch.rand(s) < 0.5 for n, s in SHAPES.items() if n != "whole"}
    masks["inner.late"][:4] = False
    masks["inner.frozen"][:] = False
    return masks | {"sixteen.weight": torch.rand(9, 6) < 0.5}


def make_optimiser(model: Net, masks=None) -> MaskedAdamW:
    named = dict(model.named_parameters())
    plain = [named.pop("inner.whole"), named.pop("sixteen.bias")]
    groups = [
        {"params": list(named.items())},
        {"params": list(zip(("inner.whole", "sixteen.bias"), plain)), "weight_decay": 0.0},
    ]
    return MaskedAdamW(groups, masks or make_masks(), lr=1e-2, weight_decay=0.1)


def shard(model: Net, mesh) -> Net:
    by_columns = model.inner["columns"]
    fully_shard(model.sixteen, mesh=mesh)
    place = lambda p: Shard(1) if p is by_columns else None  # noqa: E731
    return fully_shard(model, mesh=mesh, shard_placement_fn=place)


def sharded(mesh, masks=None) -> tuple[Net, MaskedAdamW]:
    """The optimiser is made first and gets the shards afterwards, as in `Accelerator.prepare`."""
    model = Net()
    optimiser, named = make_optimiser(model, masks), dict(model.named_parameters())
    names = {p: n for n, p in named.items()}
    held = [[names[p] for p in group["params"]] for group in optimiser.param_groups]
    for group, its in zip(optimiser.param_groups, held):
        group["params"] = [torch.empty(1) for _ in its]
        for empty, name in zip(group["params"], its):
            empty.data_ptr = name
    shard(model, mesh)
    fsdp2_switch_optimizer_parameters(optimiser, dict(model.named_parameters()))
    return model, optimiser


def run(model: Net, optimiser: MaskedAdamW, steps: range) -> None:
    """The same gradients in any world, so that the ends can be compared."""
    for step in steps:
        torch.manual_seed(100 + step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(p.dtype).to(p.device)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements, src_data_rank=None)
        optimiser.step()
        optimiser.zero_grad()


def values(model: Net) -> dict[str, torch.Tensor]:
    found = {n: p.detach() for n, p in model.named_parameters()}
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).cpu().clone()
        for n, p in found.items()
    }


def put(model: Net, start: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(distribute_tensor(start[n].to(p.device), p.device_mesh, p.placements))


def plugin(kind: str) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(fsdp_version=2, **KINDS[kind])


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        process_index=dist.get_rank(),
        num_processes=dist.get_world_size(),
        is_main_process=dist.get_rank() == 0,
        is_fsdp2=True,
        wait_for_everyone=dist.barrier,
    )


def moments(optimiser: MaskedAdamW) -> list[torch.Tensor]:
    """What this rank holds."""
    everything = [p for group in optimiser.param_groups for p in group["params"]]
    found = [optimiser.state[p] for p in everything if optimiser.state.get(p)]
    assert len(found) == len(everything) - 1  # of all but the frozen one, on every rank
    return [torch.tensor(s["step"]) for s in found] + [
        s[key] for s in found for key in ("exp_avg", "exp_avg_sq")
    ]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(some, others, strict=True)
    )


def by_itself(mesh, folder: Path) -> dict:
    model, optimiser = sharded(mesh)
    run(model, optimiser, BEFORE)
    state = optimiser.state_dict()
    again = make_optimiser(model)
    again.load_state_dict(state)
    made = {
        "model": values(model),
        "optimiser": state,
        "kept": same(*map(moments, (optimiser, again))),
    }
    run(model, again, AFTER)
    return made | {"end": values(model)}


def from_one(mesh, folder: Path) -> dict:
    model, optimiser = sharded(mesh)
    saved = torch.load(folder / "one", weights_only=True)
    put(model, saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    run(model, optimiser, AFTER)
    return {"end": values(model)}


def by_torch(mesh, folder: Path) -> dict:
    """Which of the ways to get and set it bring back each moment."""
    model, optimiser = sharded(mesh)
    run(model, optimiser, BEFORE)
    found = {}
    for options in OPTIONS:
        state = get_optimizer_state_dict(model, optimiser, options=StateDictOptions(**options))
        other, fresh = sharded(mesh)
        set_optimizer_state_dict(other, fresh, state, options=StateDictOptions(**options))
        found[str(options)] = same(*map(moments, (optimiser, fresh)))
    return found


def by_accelerate(mesh, folder: Path) -> dict:
    found, others = {}, {n: m.flip(0, -1) for n, m in make_masks().items()}  # as many elements
    for kind in KINDS:
        model, optimiser = sharded(mesh)
        run(model, optimiser, BEFORE)
        save_fsdp_optimizer(plugin(kind), accelerator(), optimiser, model, folder / kind)
        found[kind] = loaded_by_accelerate(mesh, folder, kind, values(model))
        try:
            loaded_by_accelerate(mesh, folder, kind, values(model), others)
        except ValueError as error:
            found[f"{kind}, other mask"] = str(error)
    return found


def loaded_by_accelerate(mesh, folder: Path, kind: str, start, masks=None) -> dict:
    model, optimiser = sharded(mesh, masks)
    put(model, start)
    load_fsdp_optimizer(plugin(kind), accelerator(), optimiser, model, folder / kind)
    run(model, optimiser, AFTER)
    return values(model)


@contextlib.contextmanager
def joined(folder: Path, rank: int, world: int) -> Iterator[str]:
    """The group of so many processes, and its kind of device."""
    store = f"file://{folder}/meet{world}"
    if torch.cuda.device_count() >= world > 1:
        torch.cuda.set_device(rank)
        kind, backend = "cuda", "cpu:gloo,cuda:nccl"
    else:
        kind, backend = "cpu", "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    yield kind
    dist.destroy_process_group()


def main(rank: int, world: int, folder: Path) -> None:
    with joined(folder, rank, world) as kind:
        mesh = init_device_mesh(kind, (world,))
        found = {
            f.__name__: f(mesh, folder) for f in (by_itself, from_one, by_torch, by_accelerate)
        }
        hybrid = init_device_mesh(kind, (2, world // 2), mesh_dim_names=("copies", "shards"))
        found["hybrid"] = by_itself(hybrid, folder)
    if rank == 0:
        with joined(folder, 0, 1) as kind:
            mesh, start = init_device_mesh(kind, (1,)), found["by_itself"]["model"]
            found["alone"] = {k: loaded_by_accelerate(mesh, folder, k, start) for k in KINDS}
    torch.save(found, folder / str(rank))


if __name__ == "__main__":
    main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1]))
