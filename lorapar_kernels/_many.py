"""One launch over many tensors: a table of addresses, and the tensors cut into equal chunks.

A kernel gets the chunk of its program as (which tensor, which of its chunks), and the tensor's
address from the table: one copy to the device a launch, whatever the number of tensors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._launch import cdiv


class Chunks(NamedTuple):
    """Which part of which tensor each program has. int32 [C] on the device, and C."""

    tensor: Tensor
    place: Tensor
    count: int


def chunks(sizes: Sequence[int], chunk: int, device: torch.device) -> Chunks:
    """Cuts tensors of so many elements into chunks of `chunk` elements, the last one shorter."""
    counts = torch.tensor([cdiv(n, chunk) for n in sizes], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    tensor, place = (t.to(device, torch.int32) for t in (tensor, place))
    return Chunks(tensor, place, len(tensor))


def addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64 [tensors] on the device. The caller keeps the tensors alive until the launch."""
    return numbers([t.data_ptr() for t in tensors], torch.int64, device)


def numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers on the device. The host waits for nothing: CUDA copies them aside at once."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@triton.jit
def pointer(addresses_ptr, tensor, element: tl.constexpr):
    """The address of one tensor of the table, as a pointer to elements of that type."""
    return tl.load(addresses_ptr + tensor).to(tl.pointer_type(element))
