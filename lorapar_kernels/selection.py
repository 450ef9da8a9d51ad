"""Which elements of an adapter to keep: by cumulative importance, or a share of them by rank.

Two histograms of the scores' bits find the cut exactly, without sorting (see `histogram`).
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorapar_kernels.histogram import Histogram, histogram

_FINITE = 0x7F80  # upper halves below belong to finite numbers ≥ 0, the others to Inf, NaN or < 0
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select_by_mass(
    scores: Sequence[Tensor], theta: float, *, names: Sequence[str] | None = None
) -> list[Tensor]:
    """The smallest set of elements whose scores sum to `theta` of the total, one global cut.

    All tensors together are taken in descending order, ties by position; elements are kept up to
    and including the first whose running sum (float64) reaches theta · total. theta = 0 keeps
    none, theta = 1 keeps all. A CPU and a GPU keep the same elements.

    Args:
        scores: fp32 or 16-bit tensors of any shapes on one device, finite and not negative.
        theta: share of the mass, 0 to 1.
        names: of the tensors, for messages.

    Returns:
        One bool tensor per score tensor, same shape and device.

    Raises:
        TypeError: scores in another dtype.
        ValueError: theta outside [0, 1]; no elements; NaN, Inf or a negative score (with its
            tensor and count); all scores zero; scores on several devices.
    """
    if not 0.0 <= theta <= 1.0:
        raise ValueError(f"select_by_mass: theta must lie in [0, 1], got {theta}")
    found = _histogram("select_by_mass", scores, None)
    counts, sums, zeros = found.upper()
    _refuse_bad("select_by_mass", scores, counts, names)
    if theta in (0.0, 1.0):
        return [torch.full_like(s, bool(theta), dtype=torch.bool) for s in scores]
    counts, sums, (values, steps) = counts[:_FINITE], sums[:_FINITE], _values()
    if not counts.any():
        raise ValueError(
            f"select_by_mass: all {zeros} scores are zero, so no share of them can be taken"
        )
    mass = values * counts + steps * sums
    target = max(theta * mass.flip(0).cumsum(0)[-1].item(), math.ulp(0.0))  # at least one element
    upper, above = _reach(mass, target)
    counts = found.lower(upper)
    values = values[upper] + steps[upper] * torch.arange(len(counts), device="cpu")
    lower, above = _reach(values * counts, target, above)
    ties = math.ceil((target - above) / values[lower].item())
    return found.masks(upper << 16 | lower, ties)  # rounded up beyond their number: all of them


def select_top(
    scores: Sequence[Tensor],
    within: Sequence[Tensor],
    fraction: float,
    *,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """The highest-scored `floor(fraction · count)` elements among those marked in `within`.

    Args:
        scores: as in `select_by_mass`. Ties go by position.
        within: bool tensors of the same shapes.
        fraction: share of the marked elements by count, 0 to 1.
        names: of the tensors, for messages.

    Raises:
        TypeError, ValueError: fraction outside [0, 1], `within` that does not fit, or bad scores
            among the marked as in `select_by_mass`.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"select_top: fraction must lie in [0, 1], got {fraction}")
    found = _histogram("select_top", scores, within)
    counts, _, zeros = found.upper()
    _refuse_bad("select_top", scores, counts, names, within)
    above_zero = int(counts.sum())
    wanted = math.floor(fraction * (above_zero + zeros))
    if wanted == 0:
        return [torch.zeros_like(w) for w in within]
    if wanted > above_zero:
        return found.masks(0, wanted - above_zero)
    upper, above = _reach(counts, wanted)
    lower, above = _reach(found.lower(upper), wanted, above)
    return found.masks(upper << 16 | lower, int(wanted - above))


def _reach(amounts: Tensor, target: float, before: float = 0) -> tuple[int, float]:
    """Down from the last index: where `before` + the running sum reaches target, and the sum above
    that. Where rounding keeps it below, the last index that adds something."""
    running = before + amounts.flip(0).cumsum(0)
    at = min(int((running < target).sum()), int(amounts.flip(0).nonzero()[-1]))
    return len(amounts) - 1 - at, running[at - 1].item() if at else before


@functools.cache
def _values() -> tuple[Tensor, Tensor]:
    """By upper half: the smallest score that has it, and the distance to the next one. float64."""
    bits = torch.arange(_FINITE, dtype=torch.int32, device="cpu") << 16
    least, next_ = (b.view(torch.float32).double() for b in (bits, bits | 1))
    return least, next_ - least


def _histogram(caller: str, scores: Sequence[Tensor], within: Sequence[Tensor] | None) -> Histogram:
    if not scores or not sum(s.numel() for s in scores):
        raise ValueError(f"{caller}: got no scores")
    for i, score in enumerate(scores):
        if score.dtype not in _DTYPES:
            raise TypeError(f"{caller}: scores[{i}] is {score.dtype}; cast it to float32")
    if within is not None:
        shapes = [[(t.shape, t.device) for t in of] for of in (scores, within)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{caller}: within must have the shapes and the device of scores")
        if any(w.dtype != torch.bool for w in within):
            raise TypeError(f"{caller}: within must be bool tensors")
    if len(devices := {s.device for s in scores}) > 1:
        raise ValueError(
            f"{caller}: scores are on {', '.join(sorted(map(str, devices)))}; move them to one"
        )
    return histogram([s.detach().float() for s in scores], within)


def _refuse_bad(
    caller: str,
    scores: Sequence[Tensor],
    counts: Tensor,
    names: Sequence[str] | None,
    within: Sequence[Tensor] | None = None,
) -> None:
    if not counts[_FINITE:].any():
        return
    told = []
    for i, score in enumerate(scores):
        bad = ~torch.isfinite(score) | (score < 0)
        if within is not None:
            bad &= within[i]
        if count := int(bad.sum()):
            name = f"scores[{i}]" if names is None else names[i]
            told.append(f"{name} {list(score.shape)} has {count}")
    more = f" and {len(told) - 3} more tensors" if len(told) > 3 else ""
    raise ValueError(
        f"{caller}: {'; '.join(told[:3])}{more} elements that are NaN, Inf or negative; scores "
        f"must be finite and at least 0"
    )
