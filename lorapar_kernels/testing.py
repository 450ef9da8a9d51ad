"""The one numerical judgement, shared by the tests and the benchmarks."""

from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 1.5  # how much farther from float64 than plain PyTorch in the same dtype
# Gradients through a whole network: every layer's rounding adds, the largest of some 10,000 errors
# is a draw of its own, and attention's softmax cancels what it can (seen: 3.8, k_proj in fp32).
NETWORK_FACTOR = 5.0
# Through merged weights or a decomposition some thousand roundings add (seen: 40).
CLOSE = 256


class Error(NamedTuple):
    """Relative distance of a result from its float64 reference."""

    rms: float  # ‖out − ref‖ / ‖ref‖         a drift everywhere
    peak: float  # max|out − ref| / max|ref|   one wrong element


def error(out: Tensor, ref: Tensor) -> Error:
    """Distance from a float64 reference. A NaN anywhere gives NaN, which passes no comparison."""
    if out.numel() == 0:
        return Error(0.0, 0.0)
    difference, ref = out.double() - ref, ref.double()
    tiny = torch.finfo(torch.float64).tiny
    return Error(
        (difference.norm() / ref.norm().clamp_min(tiny)).item(),
        (difference.abs().max() / ref.abs().max().clamp_min(tiny)).item(),
    )


def assert_close(name: str, out: Tensor, ref: Tensor) -> None:
    """Fails unless two right computations of one thing, in one dtype, agree to CLOSE ulps of the
    largest element: the same sums in another order."""
    assert out.dtype == ref.dtype and out.shape == ref.shape, (
        f"{name}: got {out.dtype} {list(out.shape)}, expected {ref.dtype} {list(ref.shape)}"
    )
    peak, limit = error(out, ref).peak, CLOSE * torch.finfo(out.dtype).eps
    assert peak <= limit, f"{name}: peak difference {peak:.2e} is above {limit:.2e}"


def assert_as_accurate(
    name: str, out: Tensor, ref: Tensor, baseline: Tensor, factor: float = FACTOR
) -> None:
    """Fails unless `out` is at most `factor` times as far from `ref` as `baseline`, in both norms.

    Args:
        name: what is judged, for the message.
        out: the result.
        ref: the same in float64.
        baseline: the same by plain PyTorch, in out's dtype.
        factor: FACTOR, or NETWORK_FACTOR.

    The terms in eps are the part of an ulp that any rounded result may be off by. They are wider
    for fp32 and float64, whose sums have no wider accumulator, so that their order alone moves the
    result (seen: 8.5e-8 against 4.0e-8 on one row of 64, both right).
    """
    assert out.dtype == baseline.dtype and out.shape == ref.shape, (
        f"{name}: got {out.dtype} {list(out.shape)}, expected {baseline.dtype} {list(ref.shape)}"
    )
    got, base, eps = error(out, ref), error(baseline, ref), torch.finfo(out.dtype).eps
    slack = eps / 2 if out.element_size() >= 4 else eps / 8
    limit = Error(factor * base.rms + slack, factor * base.peak + 4 * slack)
    for kind in Error._fields:
        g, lim = getattr(got, kind), getattr(limit, kind)
        if not g <= lim:  # also catches NaN
            at = (out.double() - ref).abs().nan_to_num(torch.inf).argmax()
            index = [int(i) for i in torch.unravel_index(at, ref.shape)]
            raise AssertionError(
                f"{name}: {kind} error {g:.2e} is above {lim:.2e} "
                f"(PyTorch in {out.dtype}: {getattr(base, kind):.2e}); worst at {index}: "
                f"{out.flatten()[at].item():.6g}, exact {ref.flatten()[at].item():.6g}"
            )
