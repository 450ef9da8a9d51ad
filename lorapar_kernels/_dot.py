"""Sums of products over blocks, as every kernel makes them that takes fp32."""

import triton
import triton.language as tl


@triton.jit
def add_dot(total, a, b, PRECISION: tl.constexpr):
    """total + a b, fp32.

    fp32 operands have no wider accumulator, so each block is summed apart: the error then grows
    with the block's length and the number of blocks, not with their product, as in cuBLAS.
    """
    if PRECISION == "ieee":
        # Means nothing for fp32, but Triton merges the addition into the product without it.
        apart: tl.constexpr = a.shape[1]
        total += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=apart)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total
