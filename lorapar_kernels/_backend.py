"""Which implementation serves an op. Nothing falls back in silence."""

import os

BACKENDS = ("reference",)


def backend() -> str:
    """The backend in use: `reference`, plain PyTorch on any device.

    Raises:
        RuntimeError: LORAPAR_BACKEND names a backend that this version does not have.
    """
    name = os.environ.get("LORAPAR_BACKEND", "reference")
    if name not in BACKENDS:
        raise RuntimeError(
            f"LORAPAR_BACKEND={name!r}, but lorapar_kernels has only {', '.join(BACKENDS)} in this "
            f"version; unset LORAPAR_BACKEND or name one of these"
        )
    return name
