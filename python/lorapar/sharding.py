"""FSDP 2 over a base model that does not train: for scoring and evaluation.

Training is accelerate's business, which shards base and adapter together. Here the adapter stays
whole on every rank: its sums are kept per rank and added up once.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lorapar import models, ranks


def shard_base(model: nn.Module) -> None:
    """Spreads the base model's weights, frozen, over the ranks of the group; the adapter is whole.

    Every rank calls it, on a model on the CPU. All weights, buffers and the adapter become those of
    rank 0, so the other ranks may hold anything of the same shapes, or meta tensors: transformers
    loads no more under FSDP_CPU_RAM_EFFICIENT_LOADING. One block at a time is whole on the GPU.

    Args:
        model: a causal language model, or a PEFT model of one. Changed in place: its blocks, and
            the language model itself, become FSDP units; it has to be called, or to `generate`,
            through `base_of(model)`.
    """
    base, where = base_of(model), models.device()
    mesh = init_device_mesh(where.type, (ranks.world(),))
    kept: set[Tensor] = set()  # on the device, and not to be sharded
    if isinstance(model, PeftModel):
        for name, module in base.named_modules():
            if name.rpartition(".")[2].startswith(model.base_model.prefix):
                kept |= _fetch(module, where, kept)
    adapter = {t for t in kept if isinstance(t, nn.Parameter)}
    for unit in (*outermost_blocks(base), base):
        for t in _fetch(unit, where, kept):
            if isinstance(t, nn.Parameter):
                t.requires_grad_(False)
            else:
                kept.add(t)
        fully_shard(unit, mesh=mesh, ignored_params=adapter)
    base._is_fsdp_managed_module = True  # so `generate` goes on until every rank is done


def base_of(model: nn.Module) -> nn.Module:
    """The model within PEFT's wrapper. Some versions of that call its forward past FSDP's hooks."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether its base is spread, so that each forward and backward needs all ranks."""
    return isinstance(base_of(model), FSDPModule)


def outermost_blocks(
    model: nn.Module, which: Callable[[nn.Module], bool] = lambda m: True
) -> list[nn.Module]:
    """The model's GradientCheckpointingLayers, of those which `which` takes; none in another."""
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for m in model.modules():  # from the outside in
        if isinstance(m, GradientCheckpointingLayer) and m not in inside and which(m):
            blocks.append(m)
            inside.update(m.modules())
    return blocks


def _fetch(unit: nn.Module, where: torch.device, kept: set[Tensor]) -> set[Tensor]:
    """Puts the unit's tensors on the device, with rank 0's values, and returns them.

    Left alone is what is in `kept` or sharded already. What is one tensor on rank 0, tied, becomes
    one on every rank.
    """
    made = set()
    for names in ranks.first(lambda: _names(unit, kept)):
        split = (name.rpartition(".") for name in names)
        holders = [(unit.get_submodule(path), last) for path, _, last in split]
        t = _from_first(getattr(*holders[0]), where)
        for module, last in holders:
            setattr(module, last, t)
        made.add(t)
    return made


def _names(unit: nn.Module, kept: set[Tensor]) -> list[list[str]]:
    """The names of each tensor to fetch; those of a tied one together."""
    found: dict[Tensor, list[str]] = {}
    every = (unit.named_parameters, unit.named_buffers)
    for name, t in (pair for of in every for pair in of(remove_duplicate=False)):
        if t not in kept and not isinstance(t, DTensor):
            found.setdefault(t, []).append(name)
    return list(found.values())


@torch.no_grad()
def _from_first(t: Tensor, where: torch.device) -> Tensor:
    """Rank 0's tensor, a parameter if t is one; the others' may be on meta."""
    if ranks.rank() == 0:
        made = t.detach().to(where).contiguous()
    else:
        made = torch.empty(t.shape, dtype=t.dtype, device=where)
    dist.broadcast(made, src=0)
    return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
