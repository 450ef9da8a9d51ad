"""How every kernel is launched, and what each launch needs to know."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_COMPILED: dict[tuple, Any] = {}
_MAX_COMPILED = 65536  # numbers hold M, which may take many values


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """The first line of every kernel: waits until what the kernels before it on the stream wrote is
    there, since with programmatic dependent launch it starts when their last programs end."""
    if PDL:
        tl.extra.cuda.gdc_wait()


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own costs 5 µs a call."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of two, n itself if it is one."""
    return 1 << (n - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """input_precision of tl.dot: IEEE for fp32 unless torch itself may use TF32."""
    if dtype != torch.float32:
        return "tf32"  # says nothing about 16 bit
    allowed = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if allowed is None:
        allowed = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "tf32" if allowed == "tf32" else "ieee"


def cublas(x: Tensor, columns: int) -> bool:
    """Whether cuBLAS is at the floor for a product of x [M, K] with `columns` rank columns: from
    128 on (26 to 32 µs at M 8192, K 4096 on an H100, where a Triton kernel takes 33 to 41)."""
    return columns >= 128 and x.is_cuda and x.element_size() == 2


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the card; 1 on a CPU, where Triton is interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def starts_early(device_index: int) -> bool:
    """Whether the card has programmatic dependent launch: from Hopper on."""
    return torch.cuda.get_device_capability(device_index)[0] >= 9


def side_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream of work that runs beside a GEMM of the stream `main`."""
    return _side_stream(main.device, main.cuda_stream)


@functools.cache
def _side_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def launch(
    kernel: JITFunction, grid: tuple[int, ...], like: Tensor,
    tensors: tuple[Any, ...], numbers: tuple[float, ...], **meta: Any,
) -> None:  # fmt: skip
    """kernel[grid](*tensors, *numbers, **meta, PDL=…) on `like`'s device.

    A call with the types, alignments, numbers and constants of an earlier one goes to the compiled
    kernel directly, past Triton's binder, which is most of a launch's cost on the host.

    Args:
        tensors: tensors, tensor descriptors or None. numbers: int or float. meta: every constexpr
            parameter but PDL, which all stand last, num_warps and num_stages.
    """
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel[grid](*tensors, *numbers, **meta, PDL=False)
        return
    index = like.device.index
    if index != torch._C._cuda_getDevice():  # Triton launches on the current device
        with torch.cuda.device(index):
            return launch(kernel, grid, like, tensors, numbers, **meta)
    meta["PDL"] = meta["launch_pdl"] = starts_early(index)
    kinds, raw = [], []
    for t in tensors:
        if isinstance(t, Tensor):
            pointer = t.data_ptr()
            kinds += (t.dtype, pointer & 15 == 0)
            raw.append(pointer)
        else:
            kinds.append(None if t is None else (t.base.dtype, *t.block_shape))
            raw.append(t)
    key = (kernel, index, numbers, *kinds, *meta.items())
    found = _COMPILED.get(key)
    if found is None:
        compiled = kernel[grid](*tensors, *numbers, **meta)
        constants = [meta[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
        if len(_COMPILED) >= _MAX_COMPILED:
            _COMPILED.clear()
        _COMPILED[key] = compiled, constants
        return
    compiled, constants = found
    stream = driver.active.get_current_stream(index)
    compiled[(*grid, 1, 1)](*raw, *numbers, *constants, stream=stream)
