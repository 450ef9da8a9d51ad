"""The optional CUDA/C++ extension `_C` (csrc/): found, checked, and which calls it serves.

Its ops have the schemas of ours, under `torch.ops.lorapar_cuda`. Its reason is the host's time: one
Python call a layer or group, with the autograd node in C++. Without it the Triton backend serves.
"""

import importlib.util
import json
import os
import platform
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lorapar_kernels import fused

PROJECTIONS = 8  # of one call, at most (csrc/kernels.h)
# Where the extension is the faster one, by benchmarks/bench_backends.py: by the GPU's time, which
# alone counts in compiled graphs, and in eager calls, where the host binds a little further.
GRAPH_ROWS, EAGER_ROWS = 1024, 2048
GRAPH_RANK, EAGER_RANK = 64, 128  # its kernels take 64 rank columns at a time
GROUP_WORK = 2**38  # rows · K · ΣN of an eager group

module: ModuleType | None = None
device = "cuda"  # of the tensors that `module` takes; tests emulate the kernels on "cpu"
why_not = ""  # why there is no module


def chosen(rows: int, K: int, N: int, itemsize: int, projections: int, rank: int) -> bool:
    """Whether a call is the extension's where LORAPAR_BACKEND names no backend. N is ΣN_i."""
    if itemsize != 2 or projections > PROJECTIONS:
        return False
    if torch.compiler.is_compiling():
        return rows <= GRAPH_ROWS and rank <= GRAPH_RANK
    if rank > EAGER_RANK:
        return rows <= GRAPH_ROWS
    return rows <= EAGER_ROWS or (projections > 1 and rows * K * N <= GROUP_WORK)


def available() -> bool:
    """Whether the extension is built, for this torch, and loaded."""
    return module is not None


def serves() -> bool:
    """Whether it may serve a call at all, as the environment has it."""
    return module is not None and os.environ.get("LORAPAR_BACKEND", "") in ("", "cuda")


def linear(*arguments: Any) -> Any:
    """y of `lora_linear`, or None where the call is not the extension's."""
    return module.linear(_choice(), *arguments)


def add(*arguments: Any) -> Any:
    """y of `lora_add`, or None."""
    return module.add(_choice(), *arguments)


def group(*arguments: Any) -> Any:
    """The outputs of `lora_linear_group`, or None."""
    return module.group(_choice(), *arguments)


def _choice() -> Any:
    return None if os.environ.get("LORAPAR_BACKEND") else chosen


def built_for() -> dict[str, str]:
    """What an extension built here and now is for: it runs with nothing else."""
    return {"torch": torch.__version__, "python": platform.python_version().rpartition(".")[0]}


def load() -> None:
    """Loads the module that setup.py built, if it was for this torch; else sets `why_not`."""
    global module, why_not
    spec = importlib.util.find_spec("lorapar_kernels._C")
    record = Path(__file__).with_name("_built.json")
    if spec is None and not record.exists():
        why_not = (
            "it is not built; LORAPAR_CUDA=1 pip install --no-build-isolation . builds it, where "
            "nvcc and a CUDA build of torch are"
        )
        return
    was = json.loads(record.read_text()) if record.exists() else {}
    now = built_for()
    differ = [f"{k} {was.get(k, 'unknown')}, here is {now[k]}" for k in now if was.get(k) != now[k]]
    try:
        if differ:  # importing it could crash
            raise ImportError(f"it was built for {' and '.join(differ)}")
        from lorapar_kernels import _C
    except ImportError as e:
        why_not = (
            f"{e}; build it again: LORAPAR_CUDA=1 pip install --no-build-isolation --force-"
            f"reinstall --no-deps ."
        )
        warnings.warn(f"lorapar_kernels: the CUDA extension is left out: {why_not}", stacklevel=2)
        return
    register_fakes()
    module, why_not = _C, ""


def register_fakes() -> None:
    """Tells tracers the shapes of the module's raw ops: those of ours."""
    fakes = {
        "lora_forward": fused._forward_fake,
        "lora_backward": fused._backward_fake,
        "lora_backward_sums": fused._sums_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"lorapar_cuda::{name}", fake)


load()
