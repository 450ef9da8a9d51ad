"""Which implementation serves an op. Nothing falls back in silence."""

import os

import torch
from triton import knobs

BACKENDS = ("reference", "triton")
INTERPRETED = bool(knobs.runtime.interpret)  # as at the import of the kernels


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that serves x on `device`: `triton` on a GPU, else `reference`.

    LORAPAR_BACKEND names another. float64 is always served by `reference`.

    Raises:
        RuntimeError: LORAPAR_BACKEND names a backend that this version does not have, or one that
            cannot run on this device.
    """
    kind = torch.device(device).type
    name = os.environ.get("LORAPAR_BACKEND") or ("triton" if kind == "cuda" else "reference")
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
    return "reference" if dtype == torch.float64 else name
