"""A CUDA graph of a function, and the tensors of its memory."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Graph:
    """A recorded function without arguments.

    Attributes:
        kept, lent: what it gave; the tensors lie where replays put them, and have that memory for
            themselves, or have not.
        replay: runs it, on the current stream.
    """

    def __init__(self, function: Callable[[], tuple[Sequence[Any], Sequence[Any]]], pool: Any):
        free, total = torch.cuda.mem_get_info()
        if free < total / 8:
            torch.cuda.empty_cache()  # while recording, nothing that is cached can be given back
        graph = torch.cuda.CUDAGraph()
        stream, now = _stream(), torch.cuda.current_stream()
        stream.wait_stream(now)
        collects = gc.isenabled()
        gc.disable()  # what it frees may not be freed while recording
        torch._C._cuda_clearCublasWorkspaces()  # else the graph uses one that others may free
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    kept, lent = function()
                finally:
                    graph.capture_end()
            self.kept = [t.detach() if is_tensor(t) else t for t in kept]
            self.lent = [view(t) if is_tensor(t) else t for t in lent]
            del kept, lent
        finally:
            torch._C._cuda_clearCublasWorkspaces()
            if collects:
                gc.enable()
        now.wait_stream(stream)
        self.replay = graph.replay


def new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def stream_now() -> tuple[int, int]:
    """The device, and its stream."""
    stream = torch.cuda.current_stream()
    return stream.device_index, stream.cuda_stream


def current_device() -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


def apart(outputs: Sequence[Any], inputs: Sequence[Tensor]) -> list[Any]:
    """Outputs with memory of their own."""
    theirs = {t.untyped_storage()._cdata for t in inputs}
    return [
        t.clone() if is_tensor(t) and t.untyped_storage()._cdata in theirs else t for t in outputs
    ]


def lies(t: Tensor) -> tuple[int, tuple[int, ...]]:
    return t.data_ptr(), t.stride()


def is_tensor(t: Any) -> bool:
    return isinstance(t, Tensor)


def empty_like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)


def copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Views of one new tensor for each dtype, as that is one kernel."""
    copies: dict[int, Tensor] = {}
    some = [t for t in tensors if t is not None]
    for dtype in {t.dtype for t in some}:
        same = [t for t in some if t.dtype is dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        copies.update(zip(map(id, same), torch._C._nn.unflatten_dense_tensors(flat, same)))
    return [None if t is None else copies[id(t)] for t in tensors]


class _Place:
    """Memory, as torch.as_tensor takes it."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2,
        }  # fmt: skip


def view(t: Tensor) -> Tensor:
    """The same memory, which it does not keep."""
    if t.numel() == 0:
        return empty_like(t)
    items = 1 + sum((n - 1) * step for n, step in zip(t.size(), t.stride()))
    memory = torch.as_tensor(_Place(t.data_ptr(), items * t.element_size()), device=t.device)
    return memory.view(t.dtype).as_strided(t.size(), t.stride())


_streams: dict[int, Any] = {}


def _stream() -> Any:
    """Where graphs are recorded, on the current device."""
    device = torch.cuda.current_device()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream()
    return _streams[device]
