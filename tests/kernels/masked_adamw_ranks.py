"""One process of an FSDP2 run: torchrun masked_adamw_ranks.py OUT.

Trains a small network with MaskedAdamW, its parameters sharded over the ranks, some of them
unevenly, and writes them whole. One process trains it unsharded, without torch.distributed.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lorapar_kernels import MaskedAdamW

STEPS = 6


def train(world: int, rank: int) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 700), nn.Linear(700, 3))
    masks = {n: torch.rand(p.shape) < 0.4 for n, p in model.named_parameters() if "0" not in n}
    masks["3.weight"][:2] = False  # the first rank has nothing to train of it
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in (model[2], model):
            fully_shard(layer, mesh=mesh)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimiser = MaskedAdamW(model.named_parameters(), masks, **options)
    for step in range(STEPS):
        if step == STEPS // 2:  # resumed by another optimiser
            state = optimiser.state_dict()
            optimiser = MaskedAdamW(model.named_parameters(), masks, **options)
            optimiser.load_state_dict(state)
        optimiser.zero_grad()
        (model(x[rank::world]) - y[rank::world]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
    moments = sum(s["exp_avg"].numel() for s in optimiser.state.values())
    whole = {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for n, p in model.named_parameters()
    }
    return {"start": start, "end": whole, "masks": masks, "moments": moments}


def main(out: str) -> None:
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    if world > 1:
        dist.init_process_group("gloo")
    torch.save(train(world, rank), f"{out}.{world}.{rank}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
