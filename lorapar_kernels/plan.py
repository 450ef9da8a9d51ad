"""Calls of a layer whose parts were found before: the extension's, with one look at each part.

What a layer's call is made of takes Python longer to find than the GPU takes for the kernels. A
plan holds what was found, and the extension finds out in a µs whether all of it is as it was.
"""

from typing import Any, NamedTuple

from torch import Tensor

from lorapar_kernels import extension
from lorapar_kernels.mask import LoraMask


class Slot:
    """Where a module keeps its plan: one object for as long as the module is served."""

    __slots__ = ("plan",)

    def __init__(self):
        self.plan: Plan | None = None


class Plan(NamedTuple):
    """What a module's calls are made of. csrc/plan.cpp reads it by position.

    A dict of None stands for the module's own `__dict__`, which must not be held: the plan is kept
    in there. For a list in place of a dict: its only item.
    """

    same: tuple  # dict, key, value, ...: dict[key] is value
    absent: tuple  # dict, key, ...: it is not in there
    empty: tuple  # dict, key, ...: dict[key] is a container with nothing in it
    types: tuple  # object, type, ...: of that very type
    alone: tuple  # dict, key, ...: not in there either, where decode.cu does not serve
    base: dict[str, Any]  # the `_parameters` of the base layer; weights are looked up in each call
    a: dict[str, Any]
    b: dict[str, Any]
    scale: float
    mask: LoraMask | None
    dropout_p: float


def planned(plan: Plan, state: dict[str, Any], x: Tensor) -> Tensor | bool:
    """A layer's call, with autograd as in `lora_linear`.

    Args:
        state: the module's `__dict__`.
        x: [..., K].

    Returns:
        [..., N] if all in the plan is as it was and the call is the extension's; False if something
        has changed; else True, also where a look at x was enough.
    """
    if extension.module is None:
        return True
    return extension.module.planned(plan, state, x, extension.chosen)
