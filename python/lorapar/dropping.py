"""Removing rank columns that neither stage uses, by setting their column of B to zero."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorapar.batches import Example, batch_losses
from lorapar.partitioning import Partition, adapter_parameters


@torch.no_grad()
def drop_columns(model: nn.Module, partition: Partition) -> int:
    """Zeroes B's columns that `partition` marks dead; returns how many were not zero before."""
    dropped, parameters = 0, adapter_parameters(model)
    for layer, flags in (partition.meta.get("live") or {}).items():
        b = parameters[f"{layer}.lora_B.weight"]
        dead = ~torch.tensor(flags, device=b.device)
        dropped += int(b[:, dead].any(0).sum())
        b[:, dead] = 0
    return dropped


@torch.no_grad()
def mean_loss(
    model: nn.Module, examples: Sequence[Example], tokenizer: Any, batch_size: int
) -> float:
    """The mean over examples of each one's mean loss, dropout off; the model's mode is kept."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    total = 0.0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        total += float(batch_losses(model, batch, tokenizer.pad_token_id).sum())
    for module, mode in modes.items():
        module.training = mode
    return total / len(examples)
