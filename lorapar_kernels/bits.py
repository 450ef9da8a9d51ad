"""Bool tensors as bits: eight elements a byte, the first in the lowest bit."""

import functools

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Bits of a bool tensor, flat, the last byte filled with zeros: uint8 [ceil(n/8)]."""
    flat = mask.flatten()
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.uint8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=mask.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """The bool tensor of this shape that `pack_bits` was given."""
    bits = _table(packed.device)[0].index_select(0, packed.int())
    return bits.flatten()[: torch.Size(shape).numel()].view(shape)


def count_bits(packed: Tensor) -> Tensor:
    """How many bits of each byte are set, int64, shaped like `packed`."""
    return _table(packed.device)[1].index_select(0, packed.flatten().int()).view(packed.shape)


@functools.cache
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    """The eight bits of every byte, bool [256, 8], and their number, int64 [256]."""
    bytes_, places = (torch.arange(n, device=device) for n in (256, 8))
    bits = (bytes_[:, None] >> places) & 1
    return bits.bool(), bits.sum(1)
