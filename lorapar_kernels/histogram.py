"""What a selection reads and writes: histograms of scores by their bits, and masks.

Computes    upper[b] = how many scores have b for their upper 16 bits, and Σ of their lower 16
            lower[b] = how many of those with one given upper half have b for their lower half
            mask = score > cut, and of those that equal the cut the first `quota` by flat index

Shapes      scores: T fp32 tensors of any shapes; within: bool, shaped like them, or None
            histograms int64 [65536] on the host; masks bool, shaped like the scores
Cost        three reads of the scores and one write of the masks. No sort, no flat copy.

The bits of fp32 numbers ≥ 0 rise with the numbers, and numbers with one upper half are equally
spaced: Σ of the lower halves, an integer, gives the exact sum of their values. Integers add up to
the same in any order: atomics leave the same bits every time, on a GPU as on a CPU.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapar_kernels._backend import triton_serves
from lorapar_kernels._launch import launch, wait_for_previous
from lorapar_kernels._many import addresses, chunks, numbers, pointer

HALVES = 1 << 16
_CHUNK = 4096
_BATCH = 1 << 20  # elements that the reference counts at a time


@triton.jit
def _read(scores_ptr, within_ptr, sizes_ptr, tensor_ptr, place_ptr, BLOCK: tl.constexpr):
    """The bits of a chunk's scores, -0 as 0, and which of them take part. [BLOCK]"""
    tensor = tl.load(tensor_ptr + tl.program_id(0))
    i = tl.load(place_ptr + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < tl.load(sizes_ptr + tensor)
    bits = tl.load(pointer(scores_ptr, tensor, tl.int32) + i, there, 0)
    if within_ptr is not None:
        there = there & (tl.load(pointer(within_ptr, tensor, tl.int8) + i, there, 0) != 0)
    return tl.where(bits == -2147483648, 0, bits), there


@triton.jit
def _upper_kernel(
    scores_ptr, within_ptr, sizes_ptr, tensor_ptr, place_ptr, counts_ptr, sums_ptr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    bits, there = _read(scores_ptr, within_ptr, sizes_ptr, tensor_ptr, place_ptr, BLOCK)
    upper, counted = (bits >> 16) & 0xFFFF, there & (bits != 0)  # zeros would all meet in one place
    one = tl.full((BLOCK,), 1, tl.int64)
    tl.atomic_add(counts_ptr + upper, one, counted, sem="relaxed")
    tl.atomic_add(sums_ptr + upper, (bits & 0xFFFF).to(tl.int64), counted, sem="relaxed")
    zeros = tl.sum((there & (bits == 0)).to(tl.int64))
    tl.atomic_add(counts_ptr + 65536, zeros, sem="relaxed")


@triton.jit
def _lower_kernel(
    scores_ptr, within_ptr, sizes_ptr, tensor_ptr, place_ptr, upper_ptr, counts_ptr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    bits, there = _read(scores_ptr, within_ptr, sizes_ptr, tensor_ptr, place_ptr, BLOCK)
    counted = there & (((bits >> 16) & 0xFFFF) == tl.load(upper_ptr))
    one = tl.full((BLOCK,), 1, tl.int64)
    tl.atomic_add(counts_ptr + (bits & 0xFFFF), one, counted, sem="relaxed")


@triton.jit
def _ties_kernel(
    scores_ptr, within_ptr, sizes_ptr, tensor_ptr, place_ptr, cut_ptr, ties_ptr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    bits, there = _read(scores_ptr, within_ptr, sizes_ptr, tensor_ptr, place_ptr, BLOCK)
    ties = tl.sum((there & (bits == tl.load(cut_ptr))).to(tl.int32))
    tl.store(ties_ptr + tl.program_id(0), ties)


@triton.jit
def _mask_kernel(
    scores_ptr, within_ptr, sizes_ptr, tensor_ptr, place_ptr, cut_ptr, before_ptr, starts_ptr,
    out_ptr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    bits, there = _read(scores_ptr, within_ptr, sizes_ptr, tensor_ptr, place_ptr, BLOCK)
    cut, quota = tl.load(cut_ptr), tl.load(cut_ptr + 1)
    tie = (there & (bits == cut)).to(tl.int32)
    nth = tl.load(before_ptr + tl.program_id(0)) + tl.cumsum(tie, 0)  # 1 for the first tie of all
    keep = there & ((bits > cut) | ((tie != 0) & (nth <= quota)))
    tensor, place = tl.load(tensor_ptr + tl.program_id(0)), tl.load(place_ptr + tl.program_id(0))
    i = place.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    out = out_ptr + tl.load(starts_ptr + tensor) + i
    tl.store(out, keep, i < tl.load(sizes_ptr + tensor))


class _Kernels:
    """All tensors at once, by the kernels above."""

    def __init__(self, scores: Sequence[Tensor], within: Sequence[Tensor] | None):
        self.scores, self.device = scores, scores[0].device
        self.sizes = [s.numel() for s in scores]
        flags = None if within is None else [w.contiguous().view(torch.int8) for w in within]
        self.alive = [s.contiguous() for s in scores], flags
        one = chunks(self.sizes, _CHUNK, self.device)
        self.count, self.like = one.count, one.tensor
        self.table = (
            addresses(self.alive[0], self.device),
            None if flags is None else addresses(flags, self.device),
            numbers(self.sizes, torch.int64, self.device),
            one.tensor, one.place,
        )  # fmt: skip

    def _launch(self, kernel, *more: Tensor) -> None:
        if self.count:
            tensors = (*self.table, *more)
            launch(kernel, (self.count,), self.like, tensors, (), BLOCK=_CHUNK, num_warps=8)

    def upper(self) -> tuple[Tensor, Tensor, int]:
        found = torch.zeros(2 * HALVES + 1, dtype=torch.int64, device=self.device)
        self._launch(_upper_kernel, found[HALVES:], found)
        found = found.cpu()
        return found[HALVES:-1], found[:HALVES], int(found[-1])

    def lower(self, upper: int) -> Tensor:
        counts = torch.zeros(HALVES, dtype=torch.int64, device=self.device)
        self._launch(_lower_kernel, numbers([upper], torch.int64, self.device), counts)
        return counts.cpu()

    def masks(self, cut: int, quota: int) -> list[Tensor]:
        at = numbers([cut, quota], torch.int64, self.device)
        ties = torch.zeros(self.count, dtype=torch.int32, device=self.device)
        self._launch(_ties_kernel, at, ties)
        before = ties.cumsum(0) - ties
        sizes = self.table[2]
        flat = torch.empty(sum(self.sizes), dtype=torch.bool, device=self.device)
        self._launch(_mask_kernel, at, before, sizes.cumsum(0) - sizes, flat.view(torch.int8))
        return [m.view(s.shape) for m, s in zip(flat.split(self.sizes), self.scores)]


class _Reference:
    """The same in PyTorch, about a million elements at a time."""

    def __init__(self, scores: Sequence[Tensor], within: Sequence[Tensor] | None):
        self.scores, self.within = scores, within

    def _batches(self) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
        """Some tensors, their bits, int32, flat, -0 as 0, and which of them take part."""
        first, count = 0, 0
        for i, score in enumerate(self.scores, 1):
            count += score.numel()
            if count < _BATCH and i < len(self.scores):
                continue
            some, within = self.scores[first:i], None
            if self.within is not None:
                within = torch.cat([w.flatten() for w in self.within[first:i]])
            yield some, (torch.cat([s.flatten() for s in some]) + 0.0).view(torch.int32), within
            first, count = i, 0

    def _bits(self) -> Iterator[Tensor]:
        for _, bits, within in self._batches():
            yield bits if within is None else bits[within]

    def upper(self) -> tuple[Tensor, Tensor, int]:
        device = self.scores[0].device
        counts = torch.zeros(HALVES, dtype=torch.int64, device=device)
        sums, zeros = torch.zeros_like(counts, dtype=torch.float64), 0  # of integers below 2⁵³
        for bits in self._bits():
            upper = (bits >> 16) & 0xFFFF
            counts += torch.bincount(upper, minlength=HALVES)
            sums += torch.bincount(upper, (bits & 0xFFFF).double(), minlength=HALVES)
            zeros += bits.numel() - int(torch.count_nonzero(bits))
        counts[0] -= zeros
        return counts.cpu(), sums.long().cpu(), zeros

    def lower(self, upper: int) -> Tensor:
        counts = torch.zeros(HALVES, dtype=torch.int64, device=self.scores[0].device)
        for bits in self._bits():
            bits = bits[((bits >> 16) & 0xFFFF) == upper]
            counts += torch.bincount(bits & 0xFFFF, minlength=HALVES)
        return counts.cpu()

    def masks(self, cut: int, quota: int) -> list[Tensor]:
        found = []
        for scores, bits, within in self._batches():
            mask, tie = bits > cut, bits == cut
            if within is not None:
                mask &= within
                tie &= within
            if quota and (count := int(torch.count_nonzero(tie))):
                if count > quota:  # the first ones only
                    tie[tie.nonzero()[quota:]] = False
                mask |= tie
                quota -= min(count, quota)
            parts = mask.split([s.numel() for s in scores])
            found += [part.view(s.shape) for part, s in zip(parts, scores)]
        return found


Histogram = _Kernels | _Reference


def histogram(scores: Sequence[Tensor], within: Sequence[Tensor] | None = None) -> Histogram:
    """What reads these fp32 scores, those marked in `within` alone, by their device's backend.

    upper() → counts and sums of lower halves, int64 [65536], zeros left out, and their number;
    lower(upper) → counts [65536]; masks(cut, quota) → bool tensors, `cut` the bits of a score.
    """
    kind = _Kernels if triton_serves(scores[0].device) else _Reference
    return kind(scores, within)
