"""What every kernel launch needs: the tensor's device, its dot precision, a second stream."""

import contextlib
import functools

import torch
from torch import Tensor


def on_device(t: Tensor):
    """Triton launches on the current device, not the tensor's."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def precision(dtype: torch.dtype) -> str:
    """input_precision of tl.dot: IEEE for fp32 unless torch itself may use TF32."""
    if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "ieee"
    return "tf32"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the card; 1 on a CPU, where Triton is interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of work that runs beside a GEMM, one a device."""
    return torch.cuda.Stream(device)
