"""What is installed, what is used, and why not."""

import importlib.metadata
import os
import platform

import torch

from lorapar_kernels import __version__, _tuned, extension
from lorapar_kernels._backend import backend

# The one place where versions are compared: package → oldest supported.
REQUIRED = {"torch": "2.11", "triton": "3.6"}
TRAINING = {
    "peft": "0.20",
    "transformers": "5.17",
    "trl": "1.16",
    "datasets": "3",
    "safetensors": "0.4",
}


def doctor() -> list[tuple[str, str, str]]:
    """(what, found, remark) rows; a remark that starts with `needs` is a problem."""
    rows = [
        ("lorapar-kernels", __version__, ""),
        ("python", platform.python_version(), _remark(platform.python_version(), "3.11")),
    ]
    for name, oldest in {**REQUIRED, **TRAINING}.items():
        rows.append((name, *_package(name, oldest)))
    rows += [("GPU", *_gpu()), ("CUDA extension", *_extension()), *_backends()]
    return rows


def _package(name: str, oldest: str) -> tuple[str, str]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed", f"needs {name}>={oldest}: pip install 'lorapar-kernels[train]'"
    return version, _remark(version, oldest)


def _remark(version: str, oldest: str) -> str:
    from packaging.version import Version

    return "" if Version(version) >= Version(oldest) else f"needs {oldest} or newer"


def _gpu() -> tuple[str, str]:
    if not torch.cuda.is_available():
        build = "CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda} build"
        return "none", f"torch is a {build}; everything runs on the CPU, slowly"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})", ""


def _extension() -> tuple[str, str]:
    if extension.available():
        return "built", (
            f"for torch {torch.__version__}; serves 16 bit, eager calls of up to "
            f"{extension.EAGER_ROWS:,} rows (groups of more), compiled ones of "
            f"{extension.GRAPH_ROWS:,}"
        )
    broken = extension.why_not.startswith("it was built for")
    return "left out" if broken else "none", ("needs attention: " * broken) + extension.why_not


def _backends() -> list[tuple[str, str, str]]:
    """What serves CUDA and CPU tensors, and whether launch configurations were measured here."""
    named = os.environ.get("LORAPAR_BACKEND")
    rows = []
    for kind in ("cuda", "cpu"):
        what = f"backend, {kind.upper()} tensors"
        try:
            name = backend(kind)
        except RuntimeError as e:
            # A CPU that cannot run the kernels is no fault of a machine with a GPU.
            wanted = kind == "cuda" or not torch.cuda.is_available()
            rows.append((what, "none", f"needs attention: {e}" if wanted else str(e)))
            continue
        why = f"LORAPAR_BACKEND={named}" if named else f"the default for {kind.upper()}"
        means = {
            "reference": "plain PyTorch",
            "triton": "Triton kernels and cuBLAS",
            "cuda": "the CUDA extension" + (", and Triton for large work" * (not named)),
        }[name]
        if kind == "cuda" and not torch.cuda.is_available():
            means += ", but no GPU here"
        elif kind == "cpu" and name == "triton":
            means = "kernels interpreted, for tests"
        rows.append((what, name, f"{why}; {means}; float64: reference"))
    return [*rows, ("launch configurations", *_launches())]


def _launches() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "none", "no GPU to measure"
    gpu = torch.cuda.get_device_name()
    if _tuned.file_of(gpu).exists():
        return "measured", _tuned.file_of(gpu).name
    return "default", f"none measured for {gpu}; a safe default serves every shape"
