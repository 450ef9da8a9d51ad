"""AdamW over the trainable elements of each parameter, and over nothing else.

For a trainable element p with gradient g at step t (decoupled weight decay, Loshchilov & Hutter):

    p ← p · (1 − lr · weight_decay)
    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
    p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)

A frozen element has no m, no v, is never read and never written: decay and momentum cannot move it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MaskedAdamW(Optimizer):
    """AdamW whose state exists for trainable elements alone, packed.

    Args:
        named_params: (name, parameter) pairs, or dicts with such pairs under `params` and options
            of their own, as torch's optimisers take them.
        masks: bool tensor by parameter name, True where trainable, shaped like the parameter. A
            parameter without an entry is trained whole.
        lr, betas, eps, weight_decay, maximize: as `torch.optim.AdamW`.

    State: per parameter `step` and, flat in fp32 in the order of the trainable elements (float64
    for a float64 parameter), `exp_avg` and `exp_avg_sq`. Each group lists under `masks` what its
    state belongs to; `load_state_dict` refuses another mask.

    Raises:
        ValueError: parameters without names, a mask for an unknown name or of another shape,
            arguments out of range.
        TypeError: a mask that is not bool, or `amsgrad`, which is not offered.
    """

    def __init__(
        self,
        named_params: Iterable,
        masks: Mapping[str, Tensor],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        maximize: bool = False,
        amsgrad: bool = False,
    ):
        if amsgrad:
            raise TypeError("MaskedAdamW: amsgrad is not offered; leave it False")
        _check_range("lr", lr, 0.0, float("inf"))
        _check_range("eps", eps, 0.0, float("inf"))
        _check_range("weight_decay", weight_decay, 0.0, float("inf"))
        for beta in betas:
            _check_range("betas", beta, 0.0, 1.0)
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"MaskedAdamW: the mask of {name} must be bool, got {mask.dtype}")
        self._masks = dict(masks)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(named_params, defaults | {"maximize": maximize})
        known = {name for group in self.param_groups for name in group["param_names"]}
        if unknown := sorted(set(masks) - known):
            raise ValueError(
                f"MaskedAdamW: masks for {len(unknown)} names that are no parameter here: "
                f"{', '.join(unknown[:4])}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masks": self._masks}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of (name, parameter) pairs, as torch does, and records its masks."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "param_names" not in group:
            self.param_groups.pop()
            raise ValueError(
                "MaskedAdamW: parameters need names, to find their masks; pass "
                "model.named_parameters() instead of model.parameters()"
            )
        group["masks"] = [
            _describe(name, p, self._masks.get(name))
            for name, p in zip(group["param_names"], group["params"])
        ]

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every trainable element that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"]):
                if p.grad is not None:
                    self._update(group, p, self._mask_of(name, p))
        return loss

    def _mask_of(self, name: str, p: Tensor) -> Tensor | None:
        mask = self._masks.get(name)
        if mask is not None and mask.device != p.device:
            mask = self._masks[name] = mask.to(p.device)
        return mask

    def _update(self, group: dict[str, Any], p: Tensor, mask: Tensor | None) -> None:
        grad = p.grad.flatten() if mask is None else p.grad[mask]
        if grad.numel() == 0:
            return
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        grad = grad.to(wide)
        if group["maximize"]:
            grad = -grad
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
        state["step"] += 1
        step, (beta1, beta2), lr = state["step"].item(), group["betas"], float(group["lr"])

        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        new = (p.flatten() if mask is None else p[mask]).to(wide)
        new.mul_(1 - lr * group["weight_decay"])
        new.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
        if mask is None:
            p.copy_(new.view(p.shape))
        else:
            p.masked_scatter_(mask, new.to(p.dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state made with the same masks.

        Raises:
            ValueError: the state was made with other masks, parameters or shapes; it says which.
        """
        groups = state_dict["param_groups"]
        mine = [mask for group in self.param_groups for mask in group["masks"]]
        theirs = [mask for group in groups for mask in group.get("masks", [])]
        if len(mine) != len(theirs):
            raise ValueError(
                f"MaskedAdamW: the state has {len(theirs)} masked parameters, this optimiser "
                f"{len(mine)}; it was made by another optimiser or for another adapter"
            )
        for ours, saved in zip(mine, theirs):
            if ours != saved:
                raise ValueError(
                    f"MaskedAdamW: the state was made with another mask: {saved['name']} "
                    f"{saved['shape']} with {saved['trainable']} trainable elements, here "
                    f"{ours['name']} {ours['shape']} with {ours['trainable']}; a new stage needs a "
                    f"new optimiser, a resumed one the partition it started with"
                )
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype; moments of 16-bit parameters stay fp32.
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            p = parameters[index]
            for key in ("exp_avg", "exp_avg_sq"):
                self.state[p][key] = saved[key].to(p.device, copy=True)


def _describe(name: str, p: Tensor, mask: Tensor | None) -> dict[str, Any]:
    if mask is not None and mask.shape != p.shape:
        raise ValueError(
            f"MaskedAdamW: the mask of {name} is {list(mask.shape)}, the parameter {list(p.shape)}"
        )
    digest = "all" if mask is None else hashlib.sha256(mask.cpu().numpy().tobytes()).hexdigest()
    trainable = p.numel() if mask is None else int(mask.sum())
    return {"name": name, "shape": list(p.shape), "trainable": trainable, "sha256": digest}


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= float(value) < high:
        raise ValueError(f"MaskedAdamW: {name} must lie in [{low}, {high}), got {value}")
