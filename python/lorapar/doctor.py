"""What is installed, what is used, and why not."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from lorapar_kernels import __version__
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
    rows += [("GPU", *_gpu()), ("backend", *_backend())]
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


def _backend() -> tuple[str, str]:
    try:
        name: Any = backend()
    except RuntimeError as e:
        return "none", f"needs attention: {e}"
    chosen = "LORAPAR_BACKEND" if "LORAPAR_BACKEND" in os.environ else "the only one so far"
    return name, f"{chosen}; plain PyTorch, no Triton or CUDA kernels in this version"
