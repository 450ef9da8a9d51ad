"""One process of a DDP run: python ddp.py RANK WORLD RENDEZVOUS OUT. Writes loss and gradients."""

import sys

import torch
import torch.distributed as dist
from against_peft import pair
from torch.nn.parallel import DistributedDataParallel

from lorapar.patch import accelerate


def main(rank: int, world: int, rendezvous: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    results = []
    for patched in (False, True):
        model = pair()[0].cpu().train()
        if patched:
            accelerate(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        wrapped, losses = DistributedDataParallel(model), []
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        ids = torch.arange(3, 27).view(4, 6)[rank::world]
        for _ in range(3):
            loss = wrapped(input_ids=ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append({"losses": torch.stack(losses), "grads": torch.cat(grads)})
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
