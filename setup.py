"""Everything static is in pyproject.toml. This file finds the two package roots, and adds the
optional CUDA extension.

pip install .                                        Triton: no compiler, no import of torch
LORAPAR_CUDA=1 pip install --no-build-isolation .    lorapar_kernels._C too, or a reason why not
"""

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ARCHS = "8.0+PTX;9.0a"


def refuse(why: str) -> None:
    raise SystemExit(
        f"LORAPAR_CUDA=1 asks for the CUDA extension, but {why}, or leave LORAPAR_CUDA unset: the "
        f"Triton kernels need no build."
    )


def shared_cpp_library() -> list[str]:
    """The libstdc++ that torch is loaded with, for the linker. Some compilers have only an
    archive: a second copy from there, mixed with the shared one, crashes on a number in an
    error message."""
    maps = Path("/proc/self/maps")
    found = re.search(r"/\S*/libstdc\+\+\.so\.6\S*", maps.read_text()) if maps.exists() else None
    return [found[0]] if found else []


def cuda_extension() -> dict:
    if os.environ.get("LORAPAR_CUDA", "0") != "1":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension
    except ImportError as e:
        refuse(f"torch cannot be imported here ({e}). Pass --no-build-isolation")
    if torch.version.cuda is None:
        refuse(f"torch {torch.__version__} is a CPU build. Install a CUDA build of torch")
    nvcc = Path(CUDA_HOME or "/nowhere") / "bin" / "nvcc"
    if not nvcc.exists():
        refuse(f"there is no nvcc. Install the CUDA {torch.version.cuda} toolkit or set CUDA_HOME")
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None or found[1] != torch.version.cuda.partition(".")[0]:
        version = found and f"{found[1]}.{found[2]}"
        refuse(
            f"{nvcc} is of CUDA {version} and torch {torch.__version__} of CUDA "
            f"{torch.version.cuda}. Set CUDA_HOME to a toolkit of the same major version"
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHS)
    files = sorted((ROOT / "csrc").iterdir())
    sources = [p for p in files if p.suffix in (".cpp", ".cu") and p.name != "device_cpu.cpp"]

    class Build(BuildExtension):
        def run(self):
            super().run()
            for ext in self.extensions:  # read before the module is loaded
                record = Path(self.get_ext_fullpath(ext.name)).with_name("_built.json")
                python = sysconfig.get_python_version()
                record.write_text(json.dumps({"torch": torch.__version__, "python": python}))

    headers = []
    if not (Path(CUDA_HOME) / "include" / "cublasLt.h").exists():  # torch's own wheels have it
        found = Path(torch.__file__).parents[1].glob("nvidia/*/include/cublasLt.h")
        headers = [f"-idirafter{p.parent}" for p in found]
        if not headers:
            refuse("there is no cublasLt.h. Install the toolkit's cuBLAS")
    extension = CUDAExtension(  # libtorch_cuda brings cuBLASLt itself
        "lorapar_kernels._C",
        [str(p.relative_to(ROOT)) for p in sources],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": ["-O3", *headers], "nvcc": ["-O3", "-Xptxas", "-v"]},
        extra_link_args=shared_cpp_library(),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(
    packages=[*find_packages(include=["lorapar_kernels*"]), *find_packages("python")],
    package_dir={"lorapar": "python/lorapar"},
    package_data={
        "lorapar": ["prompts/*.txt", "templates/*.j2"],
        "lorapar_kernels": ["tuned/*.json"],
    },
    **cuda_extension(),
)
