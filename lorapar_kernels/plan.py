"""Calls of a layer whose parts were found before: the extension's, with one look at each part.

What a layer's call is made of takes Python longer to find than the GPU takes for the kernels. A
plan holds what was found, and the extension finds out in a µs whether all of it is as it was.
"""

from typing import Any, NamedTuple

from torch import Tensor

from lorapar_kernels import extension
from lorapar_kernels.mask import LoraMask


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
    """The layer's output, with autograd as in `lora_linear`, if all in the plan is as it was and
    the call is the extension's; else whether the former holds, as far as that was looked at.

    Args:
        state: the module's `__dict__`.
        x: [..., K].
    """
    if extension.module is None:
        return True
    return extension.module.planned(plan, state, x, extension.chosen)
