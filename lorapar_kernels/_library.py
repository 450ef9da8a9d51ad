"""Registers the package's raw ops with PyTorch as ``torch.ops.lorapar.*``."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

_LIB = torch.library.Library("lorapar", "FRAGMENT")


def op(schema: str, *, fake: Callable) -> Callable:
    """Decorator: registers a launcher under `schema` and returns what calls it.

    An eager call on plain tensors goes to the launcher directly: the dispatcher would do nothing
    but unpack and pack its many lists. Compilers, the profiler, dispatch modes, tensor subclasses
    and tensors that the dispatcher has to resolve see the op.
    """

    def register(launcher: Callable) -> Callable:
        name = schema.partition("(")[0]
        _LIB.define(schema)
        _LIB.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lorapar::{name}", fake, lib=_LIB)
        registered = getattr(torch.ops.lorapar, name).default

        def call(*arguments):
            if (
                torch.compiler.is_compiling()
                or torch._C._len_torch_dispatch_stack()
                or torch.autograd._profiler_enabled()
            ):
                return registered(*arguments)
            return (launcher if _plain(arguments) else registered)(*arguments)

        return call

    return register


def _plain(arguments: Iterable) -> bool:
    """Whether each tensor among them is just memory: no subclass, no lazy view, no wrapper."""
    for t in arguments:
        if isinstance(t, Tensor):
            if type(t) is not Tensor and type(t) is not Parameter:
                return False
            if t.is_neg() or t._is_zerotensor() or torch._is_functional_tensor(t):
                return False
        elif isinstance(t, (list, tuple)) and not _plain(t):
            return False
    return True
