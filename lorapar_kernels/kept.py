"""What the forward of a group keeps for its backward, in one tensor of the compute dtype.

One tensor instead of five: under CUDA graphs each one that is kept costs the host some microseconds
in every step.

Shapes      bits int16 [P, M, words] (see `dropout`), a_pack [P·R, K], b_pack [R, Σ N_i],
            valid int8 [P·R], S [M, P·R], in this order, each from a multiple of 256 bytes on
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes


class Sizes(NamedTuple):
    """Of a call: M rows, K and N = Σ N_i columns, P projections of padded rank R."""

    M: int
    K: int
    P: int
    R: int
    N: int
    drops: bool  # whether there are bits


class Kept(NamedTuple):
    """The parts, views of the one tensor."""

    bits: Tensor
    a_pack: Tensor
    b_pack: Tensor
    valid: Tensor
    s: Tensor


def new_kept(x: Tensor, sizes: Sizes) -> Tensor:
    """Room for all parts, of x's dtype and device, uninitialised."""
    return x.new_empty(_layout(sizes, x.dtype)[-1] // x.element_size())


def parts_of(kept: Tensor, sizes: Sizes) -> Kept:
    """The parts of what `new_kept` made for these sizes."""
    *places, _ = _layout(sizes, kept.dtype)
    raw = kept.view(torch.uint8)
    return Kept(*(raw[at:end].view(dtype).view(shape) for shape, dtype, at, end in places))


def _layout(sizes: Sizes, dtype: torch.dtype) -> list:
    """Shape, dtype, first and end byte of each part; last, the bytes of all."""
    M, K, P, R, N, drops = sizes
    shapes = [
        ((P, M, -(-K // 1024) * 64) if drops else (0, 0, 0), torch.int16),
        ((P * R, K), dtype),
        ((R, N), dtype),
        ((P * R,), torch.int8),
        ((M, P * R), dtype),
    ]
    places, at = [], 0
    for shape, kind in shapes:
        end = at + math.prod(shape) * kind.itemsize
        places.append((shape, kind, at, end))
        at = -(-end // _ALIGNMENT) * _ALIGNMENT
    return [*places, at]
