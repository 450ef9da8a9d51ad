"""Importance of adapter elements from sums of per-example gradients.

I(φ) = | ḡ φ − ½ F̂ φ² |      ḡ = Σg / E      F̂ = Σg² / E      E examples, g one gradient an example

The form is LoRA-PAR's (arXiv 2507.20999): the change of the loss when φ is set to zero, to second
order, with the diagonal empirical Fisher for the Hessian. φ is constant while scoring, so the two
sums are all that has to be kept.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lorapar_kernels import reference

VARIANTS = ("taylor2", "taylor1", "fisher")


class ImportanceSums:
    """Σg and Σg² of one adapter, in fp32, filled by the backward of the ops of this package.

    While an op is given `sums`, its backward adds one gradient per *example* here and forms no
    gradient of A or B. Call `examples` before each forward to say which rows belong together.

    Args:
        lora_a: [r, K] the adapter's A, for shape and device.
        lora_b: [N, r] the adapter's B.
        zeros: the four sums to add to, in the order of the attributes, each contiguous and at an
            address that is a multiple of 16; None: they are made here.

    Attributes:
        a, a_squared: fp32 [r, K]. b, b_squared: fp32 [N, r].
        cu_seqlens, rows: of the examples set last; None and 0 before.
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor, zeros: Sequence[Tensor] | None = None):
        if zeros is None:
            like = (lora_a, lora_a, lora_b, lora_b)
            zeros = [torch.zeros_like(t, dtype=torch.float32) for t in like]
        self.a, self.a_squared, self.b, self.b_squared = zeros
        self.cu_seqlens: Tensor | None = None
        self.rows = 0

    def examples(self, cu_seqlens: Tensor) -> None:
        """Sets the examples of the forwards to come.

        Args:
            cu_seqlens: int32 [E+1]; example e owns rows cu_seqlens[e] up to cu_seqlens[e+1] of x
                with its leading dimensions flattened. A padded batch [B, T] has steps of T.

        Raises:
            TypeError: not int32.
            ValueError: not one-dimensional, or it does not rise from 0.
        """
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"ImportanceSums.examples: need int32, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(
                f"ImportanceSums.examples: need shape [E+1], got {list(cu_seqlens.shape)}"
            )
        if cu_seqlens.is_inference():  # nothing counts the writes to it
            bounds = cu_seqlens.tolist()
        else:
            bounds = _on_host(cu_seqlens, cu_seqlens._version)
        if bounds[0] != 0 or sorted(bounds) != bounds:
            raise ValueError(
                f"ImportanceSums.examples: cu_seqlens must rise from 0 to the number of rows of x; "
                f"got {bounds[:8]}{'...' if len(bounds) > 8 else ''} ending in {bounds[-1]}"
            )
        self.cu_seqlens, self.rows = cu_seqlens.to(self.a.device), bounds[-1]

    def add(
        self,
        cu_seqlens: Tensor,
        ds: Tensor,
        x: Tensor,
        keep: Tensor | None,
        dy: Tensor,
        s: Tensor,
        scale: float,
    ) -> None:
        """Adds each example's gradient and its square. The reference of the scoring kernels."""
        bounds = cu_seqlens.tolist()
        for start, stop in zip(bounds[:-1], bounds[1:]):
            rows = slice(start, stop)
            kept = None if keep is None else keep[rows]
            da = reference.lora_da(ds[rows], x[rows], kept).float()
            db = reference.lora_db(dy[rows], s[rows], scale).float()
            self.a += da
            self.a_squared.addcmul_(da, da)
            self.b += db
            self.b_squared.addcmul_(db, db)


@functools.lru_cache(maxsize=1)
def _on_host(cu_seqlens: Tensor, version: int) -> list[int]:
    """One copy from the device for all the layers that are told of the same examples."""
    return cu_seqlens.tolist()


def importance(
    parameter: Tensor, sum_g: Tensor, sum_g2: Tensor, examples: int, variant: str = "taylor2"
) -> Tensor:
    """The importance of every element of one matrix, fp32, shaped like it.

    Args:
        parameter: φ, any shape.
        sum_g, sum_g2: Σg and Σg² over the examples, same shape.
        examples: E, at least 1.
        variant: `taylor2` |ḡφ − ½F̂φ²|, `taylor1` |ḡφ|, `fisher` ½F̂φ².

    Raises:
        ValueError: no examples, or an unknown variant.
    """
    if examples < 1:
        raise ValueError(f"importance: need at least 1 example, got {examples}")
    phi = parameter.detach().float()
    first, second = sum_g * phi, 0.5 * sum_g2 * phi.square()
    match variant:
        case "taylor2":
            total = first - second
        case "taylor1":
            total = first
        case "fisher":
            total = second
        case _:
            raise ValueError(f"importance: variant {variant!r} is none of {', '.join(VARIANTS)}")
    return total.abs() / examples
