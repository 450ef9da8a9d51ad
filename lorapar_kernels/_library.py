"""Registers the package's raw ops with PyTorch as ``torch.ops.lorapar.*``."""

from collections.abc import Callable

import torch

_LIB = torch.library.Library("lorapar", "FRAGMENT")


def op(schema: str, *, fake: Callable) -> Callable:
    """Decorator: registers a launcher under `schema` and returns the op that calls it."""

    def register(launcher: Callable) -> Callable:
        name = schema.partition("(")[0]
        _LIB.define(schema)
        _LIB.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lorapar::{name}", fake, lib=_LIB)
        return getattr(torch.ops.lorapar, name).default

    return register
