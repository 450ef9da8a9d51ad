"""lorapar_kernels._C for the CPU: csrc/*.cpp on CPU tensors, over the emulated kernels.

`emulated_module()` builds it once for all workers and loads it; it skips the test that asks where
that is impossible.
"""

import fcntl
import functools
import hashlib
import importlib.util
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulator.build import BUILD, CHECKS, CSRC, FLAGS, HERE, _object, _run, include_folder

from lorapar_kernels import extension

# They include no device code, so that a change of a kernel does not compile them anew.
HEADERS = [CSRC / f"{name}.h" for name in ("kernels", "device", "ops", "function", "bind")]
ON_A_GPU = {"device_cuda", "launch"}
TORCH = Path(torch.__file__).parent


@functools.cache
def emulated_module() -> ModuleType:
    compiler, cuda = shutil.which("g++"), include_folder()
    if compiler is None:
        pytest.skip("the emulated extension needs g++")
    if cuda is None:
        pytest.skip("the emulated extension needs CUDA's headers (cuda_runtime_api.h, cuda_bf16.h)")
    includes = [
        TORCH / "include", TORCH / "include/torch/csrc/api/include",
        Path(sysconfig.get_path("include")), cuda,
    ]  # fmt: skip
    if not (includes[2] / "Python.h").exists():
        pytest.skip("the emulated extension needs Python's headers (Python.h)")
    kernel = [*FLAGS, *CHECKS, f"-I{CSRC}", f"-I{HERE}", f"-isystem{cuda}"]
    host = ["-std=c++20", "-O0", "-g0", "-fPIC", "-Wall", "-DLORAPAR_EMULATE", f"-I{CSRC}"]
    host += [f"-isystem{folder}" for folder in includes]
    device = _text([*CSRC.glob("*.h"), *HERE.glob("*.h")])
    torch_is = torch.__version__.encode()
    work = [(host, _text(HEADERS) + torch_is, p) for p in sorted(CSRC.glob("*.cpp"))]
    work = [job for job in work if job[2].stem not in ON_A_GPU]
    work += [(kernel, device, p) for p in [*sorted(CSRC.glob("*.cu")), HERE / "emulator.cpp"]]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda job: _object(compiler, *job), work))
        folder = BUILD / hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        if not folder.exists():
            made = folder.with_suffix(".tmp")
            made.mkdir(exist_ok=True)
            libraries = [f"-L{TORCH / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
            _run([compiler, "-shared", *CHECKS, *objects, *libraries, "-o", made / "_C.so"])
            made.rename(folder)
    spec = importlib.util.spec_from_file_location("_C", folder / "_C.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension.register_fakes()
    return module


def _text(files: list[Path]) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(files))
