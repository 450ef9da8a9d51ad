"""Which elements of an adapter to keep: by cumulative importance, or a share of them by rank."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def select_by_mass(scores: Sequence[Tensor], theta: float) -> list[Tensor]:
    """The smallest set of elements whose scores sum to `theta` of the total, one global cut.

    All tensors together are sorted in descending order, ties by position; elements are kept up to
    and including the first whose running sum (float64) reaches theta · total. theta = 0 keeps
    none, theta = 1 keeps all.

    Args:
        scores: tensors of any shapes, finite and not negative.
        theta: share of the mass, 0 to 1.

    Returns:
        One bool tensor per score tensor, same shape and device.

    Raises:
        ValueError: theta outside [0, 1]; no elements; NaN, Inf or a negative score (with its
            tensor and count); all scores zero.
    """
    if not 0.0 <= theta <= 1.0:
        raise ValueError(f"select_by_mass: theta must lie in [0, 1], got {theta}")
    flat = _flatten("select_by_mass", scores)
    if theta in (0.0, 1.0):
        return [torch.full_like(s, bool(theta), dtype=torch.bool) for s in scores]
    ordered, order = flat.sort(descending=True, stable=True)
    running = ordered.double().cumsum(0)
    if running[-1] == 0:
        raise ValueError(
            f"select_by_mass: all {flat.numel()} scores are zero, so no share of them can be taken"
        )
    count = int(torch.searchsorted(running, theta * running[-1])) + 1
    return _unflatten(order[:count], scores)


def select_top(scores: Sequence[Tensor], within: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """The highest-scored `floor(fraction · count)` elements among those marked in `within`.

    Args:
        scores: tensors of any shapes, finite and not negative. Ties go by position.
        within: bool tensors of the same shapes.
        fraction: share of the marked elements by count, 0 to 1.

    Raises:
        ValueError: fraction outside [0, 1], or bad scores as in `select_by_mass`.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"select_top: fraction must lie in [0, 1], got {fraction}")
    flat = _flatten("select_top", scores)
    marked = torch.cat([w.flatten() for w in within])
    candidates = torch.nonzero(marked).flatten()
    order = flat[candidates].sort(descending=True, stable=True).indices
    count = math.floor(fraction * candidates.numel())
    return _unflatten(candidates[order[:count]], scores)


def _flatten(caller: str, scores: Sequence[Tensor]) -> Tensor:
    if not scores or not sum(s.numel() for s in scores):
        raise ValueError(f"{caller}: got no scores")
    for index, score in enumerate(scores):
        bad = int((~torch.isfinite(score) | (score < 0)).sum())
        if bad:
            raise ValueError(
                f"{caller}: scores[{index}] {list(score.shape)} has {bad} elements that are NaN, "
                f"Inf or negative; scores must be finite and at least 0"
            )
    return torch.cat([s.flatten() for s in scores])


def _unflatten(chosen: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    total = sum(s.numel() for s in like)
    keep = torch.zeros(total, dtype=torch.bool, device=chosen.device)
    keep[chosen] = True
    parts = keep.split([s.numel() for s in like])
    return [part.view(s.shape) for part, s in zip(parts, like)]
