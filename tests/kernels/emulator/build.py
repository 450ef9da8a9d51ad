"""Builds CUDA kernels of csrc/ for the CPU (see emulator.h) and calls them through ctypes.

`emulated("shrink")` compiles csrc/shrink.cu and, beside this file, shrink.cpp, which gives its
functions C names; it skips the test that asks where there is no compiler or CUDA has no headers.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
REPO = HERE.parents[2]
CSRC = REPO / "csrc"
BUILD = REPO / "build" / "emulated"
FLAGS = "-std=c++17 -O2 -fno-strict-aliasing -fPIC -Wall -Werror -Wno-unknown-pragmas".split()
FLAGS.append("-DLORAPAR_EMULATE")
CHECKS = ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]  # LORAPAR_EMULATE_FLAGS

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # kernels.h: Type


class Matrix(ctypes.Structure):
    """kernels.h: Matrix and Output, which have one layout."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


def matrix(t: Tensor | None) -> Matrix:
    """Of a tensor [rows, columns], which the caller keeps."""
    if t is None:
        return Matrix(None, 0)
    assert t.dim() == 2 and (t.stride(1) == 1 or t.shape[1] <= 1)
    return Matrix(t.data_ptr(), t.stride(0))


def pointer(t: Tensor | None) -> int | None:
    """Of a contiguous tensor, which the caller keeps."""
    assert t is None or t.is_contiguous()
    return None if t is None else t.data_ptr()


def array(kind: type, of: list) -> ctypes.Array:
    return (kind * len(of))(*of)


@functools.cache
def include_folder() -> Path | None:
    """Where CUDA's headers are."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        roots.append(Path(nvcc).resolve().parents[1])
    folders = [Path(root) / "include" for root in roots if root]
    folders += sorted(Path("/usr/local").glob("cuda-*/include"), reverse=True)
    found = (f for f in folders if (f / "cuda_runtime_api.h").exists())
    return next((f for f in found if (f / "cuda_bf16.h").exists()), None)


@functools.cache
def emulated(*names: str) -> ctypes.CDLL:
    """The library of these kernels: csrc/NAME.cu with tests/kernels/emulator/NAME.cpp."""
    compiler, include = shutil.which("g++"), include_folder()
    if compiler is None:
        pytest.skip("emulated kernels need g++")
    if include is None:
        pytest.skip("emulated kernels need CUDA's headers (cuda_runtime_api.h, cuda_bf16.h)")
    sources = [HERE / "emulator.cpp"]
    for name in names:
        sources += [CSRC / f"{name}.cu", HERE / f"{name}.cpp"]
    checks = os.environ.get("LORAPAR_EMULATE_FLAGS")
    flags = FLAGS + (CHECKS if checks is None else checks.split())
    flags += [f"-I{CSRC}", f"-I{HERE}", f"-isystem{include}"]
    headers = b"".join(p.read_bytes() for p in sorted([*CSRC.glob("*.h"), *HERE.glob("*.h")]))
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # workers of one session build once
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [_object(compiler, flags, headers, source) for source in sources]
        key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        library = BUILD / f"{'-'.join(names)}-{key}.so"
        if not library.exists():
            _run([compiler, "-shared", *flags, *objects, "-o", library])
    return ctypes.CDLL(str(library))


def _object(compiler: str, flags: list[str], headers: bytes, source: Path) -> Path:
    text = headers + source.read_bytes() + " ".join(map(str, flags)).encode()
    out = BUILD / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.o"
    if not out.exists():
        _run([compiler, *flags, "-c", "-x", "c++", source, "-o", out])
    return out


def _run(command: list) -> None:
    out = Path(command[-1])
    command[-1] = out.with_suffix(f".{os.getpid()}")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{out.stem} does not compile\n{done.stderr}", pytrace=False)
    command[-1].rename(out)
