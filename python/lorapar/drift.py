"""Whether an optimiser moves elements whose gradient is zero, found by trying it.

Weight decay does, and so do methods that compute an element's update from others (Muon
orthogonalises the whole matrix) or keep state too coarse to hold a zero (some 8-bit ones). No
class is known by name: a fresh optimiser of the same class and options takes a few steps on a
dummy that is frozen where the real parameter is.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_STEPS = 3  # momentum and second moments take part from the second on
_SIDE = 4096  # elements of the dummy's longer side; 8-bit methods need 4096 in all
_NOT_OPTIONS = ("params", "param_names", "initial_lr")


@dataclass(frozen=True)
class Drift:
    """What an optimiser would do to frozen elements.

    optimizer: its class name.
    frozen: how many elements are frozen.
    decay: weight decay moves them; where that could not be tried, whether there is any.
    method: the method itself moves them, without weight decay.
    unknown: why it could not be tried; empty where it was.
    """

    optimizer: str
    frozen: int
    decay: bool
    method: bool = False
    unknown: str = ""

    def __str__(self) -> str:
        if self.unknown:
            return (
                f"whether {self.optimizer} would move {self.frozen} frozen elements could not be "
                f"tried ({self.unknown}); weight decay is {'on' if self.decay else 'off'}"
            )
        why = ["weight decay"] * self.decay
        if self.method:
            why.append("the method itself, whose update is not zero where the gradient is")
        return f"{self.optimizer} would move {self.frozen} frozen elements: {' and '.join(why)}"


def drift(optimizer: Optimizer, masks: Mapping[Tensor, Tensor]) -> Drift | None:
    """What `optimizer` would do to frozen elements, at the highest learning rate known for them.

    Args:
        optimizer: the one in use, without wrappers. It is left alone, and so is torch's random
            state.
        masks: for each masked parameter, a bool tensor of its (global) shape, True where it trains.

    Returns:
        None if frozen elements keep their bits. Else which of weight decay and method moves them,
        or why it could not be tried.
    """
    name, groups = type(optimizer).__name__, getattr(optimizer, "param_groups", [])
    frozen = sum(int((~mask).sum()) for mask in masks.values())
    if not frozen:
        return None
    decay = method = tried = False
    try:
        for group in groups:
            sample = _sample(group, masks)
            if sample is None:
                continue
            start = _values(*sample)
            with_decay = without = _after_steps(optimizer, group, *sample, {})
            if _decays(optimizer, group):
                without = _after_steps(optimizer, group, *sample, {"weight_decay": 0.0})
            still = ~sample[1]
            decay |= bool(moved(with_decay, without)[still].any())
            method |= bool(moved(without, start)[still].any())
            tried = True
    except Exception as e:  # any class: its constructor and its step may want anything
        why = f"{type(e).__name__}: {e}"
    else:
        if tried:
            return Drift(name, frozen, decay, method) if decay or method else None
        why = "none of them is in its parameters"
    return Drift(name, frozen, any(_decays(optimizer, g) for g in groups), unknown=why)


def moved(now: Tensor, start: Tensor) -> Tensor:
    """bool, where the bits differ; -0.0 and 0.0 do, two equal NaNs do not."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[now.element_size()]
    return now.contiguous().view(kind) != start.to(now.dtype).contiguous().view(kind)


def _decays(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    defaults = getattr(optimizer, "defaults", {})
    return float(group.get("weight_decay", defaults.get("weight_decay")) or 0) != 0


def _sample(group: dict[str, Any], masks: Mapping[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The group's parameter with the most frozen elements, trainable ones beside them if there
    are any, and its mask, at most _SIDE long; None if nothing here is frozen."""
    best, most = None, (False, 0)
    for p in group["params"]:
        if p not in masks:
            continue
        mask = masks[p][:_SIDE, :_SIDE]
        rank = bool(mask.any()), int((~mask).sum())
        if rank[1] and rank > most:
            best, most = (p, mask.to(p.device)), rank
    return best


def _values(p: Tensor, mask: Tensor, seed: int = 0, scale: float = 0.02) -> Tensor:
    """Random values of the mask's shape, in the parameter's dtype and place."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(mask.shape, generator=generator) * scale
    return values.to(p.device, p.dtype)


def _after_steps(
    optimizer: Optimizer, group: dict[str, Any], p: Tensor, mask: Tensor, changes: dict[str, Any]
) -> Tensor:
    """A dummy parameter after some steps of a fresh optimiser with the group's options."""
    dummy = torch.nn.Parameter(_values(p, mask))
    with torch.random.fork_rng([p.device] * (p.device.type != "cpu"), device_type=p.device.type):
        made = type(optimizer)([_options(group) | changes | {"params": [dummy]}], **_own(optimizer))
        for step in range(_STEPS):
            dummy.grad = _values(p, mask, seed=step + 1, scale=1.0) * mask
            made.step()
    if mask.any() and not moved(dummy.detach(), _values(p, mask))[mask].any():
        raise RuntimeError("trainable elements did not move either")
    return dummy.detach()


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options, at the rate its schedule starts from: a warm-up begins at zero."""
    options = {
        k: v.clone() if isinstance(v, Tensor) else v
        for k, v in group.items()
        if k not in _NOT_OPTIONS
    }
    if options.get("lr") is not None:
        options["lr"] = max(float(options["lr"]), float(group.get("initial_lr", 0.0)))
    return options


def _own(optimizer: Optimizer) -> dict[str, Any]:
    """Constructor arguments: the groups' defaults, and plain ones that the instance keeps."""
    given = {k: v for k, v in vars(optimizer).items() if _plain(v)} | optimizer.defaults
    accepted = inspect.signature(type(optimizer)).parameters
    return {k: v for k, v in given.items() if k in accepted and k != "params"}


def _plain(value: Any) -> bool:
    """A number, a name, or a record of them (bitsandbytes keeps `optim_bits` in one): nothing
    through which the dummy could reach the model or another optimiser."""
    plain, record = (bool, int, float, str), getattr(value, "__dict__", None)
    return isinstance(value, plain) or (
        bool(record) and all(isinstance(v, plain) for v in record.values())
    )
