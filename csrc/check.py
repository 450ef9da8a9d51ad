"""Compiles every kernel and checks the binding's syntax, without a GPU: `python csrc/check.py`.

Each .cu goes through nvcc for sm_80 and sm_90a, where there is one; its host code, which is the
same for both, once. A kernel that spills registers
fails, unless spills.txt has a line `FILE ARCHITECTURE BYTES reason` that allows as many bytes or
more. Each .cpp that the tests' emulated build does not compile as it is goes through g++
-fsyntax-only with the headers of the torch installed here; for a CPU build of torch, and where
cuBLASLt has no header, stubs/ stands in.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent
ARCHITECTURES = ("80", "90a")
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings"]


def spills(said: str) -> dict[str, int]:
    """Kernel → bytes that its registers spill, from what `ptxas -v` says. Only those that do."""
    found, kernel = {}, "?"
    for line in said.splitlines():
        if name := re.search(r"Function properties for (\S+)", line):
            kernel = name[1]
        if spilt := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if int(spilt[1]) + int(spilt[2]):
                found[kernel] = int(spilt[1]) + int(spilt[2])
    return found


def allowed(lines: str) -> dict[tuple[str, str], int]:
    """(file, architecture) → bytes that spills.txt allows a kernel of that file."""
    rows = [line.split(maxsplit=3) for line in lines.splitlines() if line and line[0] != "#"]
    for row in rows:
        if len(row) < 4:
            raise SystemExit(f"spills.txt: {' '.join(row)!r} has no reason; give a timing")
    return {(row[0], row[1]): int(row[2]) for row in rows}


def compile_kernels(file: Path, arch: str, may_spill: dict[tuple[str, str], int]) -> list[str]:
    """What is wrong with one file on one architecture."""
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    parts = "-c" if arch == ARCHITECTURES[0] else "-cubin"  # without its host code
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, code, parts, str(file), "-o", f"{folder}/out.o"]
        made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        return [f"{file.name} does not compile for sm_{arch}:\n{made.stderr}{made.stdout}"]
    limit = may_spill.get((file.name, f"sm_{arch}"), 0)
    return [
        f"{file.name} for sm_{arch}: {kernel} spills {count} bytes; spills.txt allows {limit}"
        for kernel, count in spills(made.stderr + made.stdout).items()
        if count > limit
    ]


def check_syntax(file: Path, cuda: Path) -> list[str]:
    """What g++ says of one file of the binding, in the build that it belongs to."""
    import torch

    include = Path(torch.__file__).parent / "include"
    folders = [
        include,
        include / "torch/csrc/api/include",
        Path(sysconfig.get_path("include")),
        cuda,
    ]
    flags = [flag for folder in folders for flag in ("-isystem", str(folder))]
    flags += ["-idirafter", str(CSRC / "stubs")]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", *flags, f"-I{CSRC}"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True)
    return [f"{file.name}:\n{done.stderr}"] if done.returncode else []


def is_for_a_gpu(file: Path) -> bool:
    return file.name in ("device_cuda.cpp", "launch.cpp") or "LORAPAR_EMULATE" in file.read_text()


def main() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("no nvcc: the CUDA kernels are not compiled here")
        return
    if shutil.which("g++") is None:
        sys.exit("no g++: the binding cannot be checked")
    toolkits = [Path(nvcc).resolve().parents[1], *sorted(Path("/usr/local").glob("cuda*"))]
    headers = [t / "include" for t in toolkits if (t / "include/cuda_runtime_api.h").exists()]
    if not headers:
        sys.exit("nvcc, but no cuda_runtime_api.h in /usr/local/cuda*: the binding is not checked")
    may_spill = allowed((CSRC / "spills.txt").read_text())
    kernels, binding = sorted(CSRC.glob("*.cu")), list(filter(is_for_a_gpu, CSRC.glob("*.cpp")))
    kernels.sort(key=lambda file: -file.stat().st_size)  # the longest first
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(compile_kernels, file, arch, may_spill)
            for file in kernels
            for arch in ARCHITECTURES
        ]
        jobs += [pool.submit(check_syntax, file, headers[0]) for file in binding]
        wrong = [line for job in jobs for line in job.result()]
    if wrong:
        sys.exit("\n".join(wrong))
    print(
        f"{len(kernels)} files for sm_80 and sm_90a, {len(binding)} of the binding: as they should"
    )


if __name__ == "__main__":
    main()
