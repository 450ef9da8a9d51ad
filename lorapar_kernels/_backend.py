"""Which implementation serves an op. Nothing falls back in silence."""

import os

import torch
from triton import knobs

from lorapar_kernels import extension

BACKENDS = ("reference", "triton", "cuda")
INTERPRETED = bool(knobs.runtime.interpret)  # as at the import of the kernels


def backend(
    device: torch.device | str, dtype: torch.dtype = torch.float32, *, chosen: bool = True
) -> str:
    """The backend that serves x on `device`: `cuda` or `triton` on a GPU, else `reference`.

    LORAPAR_BACKEND names another. float64 is always served by `reference`.

    Args:
        chosen: whether the call is one for the extension (`extension.chosen`), where it is built.

    Raises:
        RuntimeError: LORAPAR_BACKEND names a backend that this version does not have, one that is
            not built, or one that cannot run on this device.
    """
    kind = torch.device(device).type
    default = "reference"
    if kind == "cuda":
        built = extension.available() and extension.device == kind
        default = "cuda" if built and chosen else "triton"
    name = os.environ.get("LORAPAR_BACKEND") or default
    if name not in BACKENDS:
        raise RuntimeError(
            f"LORAPAR_BACKEND={name!r}, but lorapar_kernels has only {', '.join(BACKENDS)} in this "
            f"version; unset LORAPAR_BACKEND or name one of these"
        )
    if name == "triton" and kind != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"LORAPAR_BACKEND=triton, but the tensors are on {kind}; move them to a GPU, unset "
            f"LORAPAR_BACKEND, or set TRITON_INTERPRET=1 to run the kernels interpreted"
        )
    if name == "cuda" and not extension.available():
        raise RuntimeError(
            f"LORAPAR_BACKEND=cuda, but there is no CUDA extension: {extension.why_not}; or unset "
            f"LORAPAR_BACKEND"
        )
    if name == "cuda" and kind != extension.device:
        raise RuntimeError(
            f"LORAPAR_BACKEND=cuda, but the tensors are on {kind}; move them to a GPU or unset "
            f"LORAPAR_BACKEND"
        )
    return "reference" if dtype == torch.float64 else name


def triton_serves(device: torch.device | str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether Triton's kernels serve what the extension has none for: selection, the optimiser."""
    if os.environ.get("LORAPAR_BACKEND") == "cuda":
        return torch.device(device).type == "cuda" and dtype != torch.float64
    return backend(device, dtype, chosen=False) == "triton"
