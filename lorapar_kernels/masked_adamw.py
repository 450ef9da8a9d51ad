"""AdamW over the trainable elements of each parameter, and over nothing else.

A frozen element has no moments and is never written: decay and momentum cannot move it. The
formula is in `adamw`; on a GPU all parameters of a group are updated by one launch.
"""

import copy
import hashlib
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lorapar_kernels import adamw
from lorapar_kernels._backend import triton_serves
from lorapar_kernels.bits import count_bits, pack_bits, unpack_bits

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MaskedAdamW(Optimizer):
    """AdamW whose state exists for trainable elements alone, packed.

    Args:
        named_params: (name, parameter) pairs, or dicts with such pairs under `params` and options
            of their own, as torch's optimisers take them. Parameters sharded by FSDP2 (DTensor)
            are updated shard by shard.
        masks: bool tensor by parameter name, True where trainable, shaped like the whole parameter.
            A parameter without an entry is trained whole.
        lr, betas, eps, weight_decay, maximize: as `torch.optim.AdamW`.

    State: per parameter `step` and, flat in fp32 in the order of the trainable elements (float64
    for a float64 parameter), `exp_avg` and `exp_avg_sq`: 8 bytes a trainable element, and one bit
    an element for the mask. Each group lists under `masks` what its state belongs to;
    `load_state_dict` refuses another mask.

    Checkpoints: a rank holds the moments of its shards, `state_dict` those of whole parameters, in
    row-major order, on however many ranks it is called and loaded. Where a parameter is sharded all
    ranks call it together. So torch's `get_optimizer_state_dict` and accelerate's
    `save_fsdp_optimizer` save all of it, with full and with sharded state dicts.

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
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"MaskedAdamW: the mask of {name} must be bool, got {mask.dtype}")
        # Bits on the host: what a parameter needs of them is made when its shard is known.
        self._masks = {n: _Mask(pack_bits(m).cpu(), m.shape) for n, m in masks.items()}
        self._plans: dict[int, _Plan] = {}
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"maximize": maximize}
        _check_options(options | {"amsgrad": amsgrad})
        super().__init__(named_params, options)
        known = {name for group in self.param_groups for name in group["param_names"]}
        if unknown := sorted(set(masks) - known):
            raise ValueError(
                f"MaskedAdamW: masks for {len(unknown)} names that are no parameter here: "
                f"{', '.join(unknown[:4])}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masks": self._masks, "_plans": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of (name, parameter) pairs, as torch does, and records its masks.

        Raises:
            ValueError, TypeError: as the constructor; no group is added then.
        """
        _check_options(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if "param_names" not in group:
                raise ValueError(
                    "MaskedAdamW: parameters need names, to find their masks; pass "
                    "model.named_parameters() instead of model.parameters()"
                )
            group["masks"] = [
                _describe(name, p, self._masks.get(name))
                for name, p in zip(group["param_names"], group["params"])
            ]
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every trainable element that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            plan = self._plans.get(number)
            if plan is None or not plan.fits(group["params"]):
                plan = self._plans[number] = _Plan(group, self._masks, self.state)
            plan.step(group, self.state)
        return loss

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state, the moments those of whole parameters.

        If a parameter is sharded this is a collective: all ranks call it, each gets the same. It
        has an entry for every parameter then, with step 0 if nothing was trained of it, since torch
        wants one to load it.
        """
        told = super().state_dict()
        for saved in told["param_groups"]:  # torch's checkpoints are read into it, in place
            saved["masks"] = copy.deepcopy(saved["masks"])
        everything = [p for group in self.param_groups for p in group["params"]]
        if not any(self.state.values()) or not any(map(_is_sharded, everything)):
            return told
        state = dict(told["state"])
        for group, saved in zip(self.param_groups, told["param_groups"]):
            for key, name, p in zip(saved["params"], group["param_names"], group["params"]):
                state[key] = _gather(p, self._masks.get(name), self.state.get(p))
        return told | {"state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state made with the same masks, on any number of ranks; each takes its part.

        Raises:
            ValueError: the state was made with other masks, parameters or shapes, or has not the
                moments of whole parameters; it says which.
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
        keys = [key for saved in groups for key in saved["params"]]
        everything = [p for group in self.param_groups for p in group["params"]]
        names = [name for group in self.param_groups for name in group["param_names"]]
        owners = {
            key: (name, p, mask["trainable"])
            for key, name, p, mask in zip(keys, names, everything, mine)
        }
        state = {}
        for key, saved in state_dict["state"].items():
            if key not in owners:
                raise ValueError(f"MaskedAdamW: the state's groups list no parameter {key}")
            name, p, trainable = owners[key]
            if saved and trainable:
                _check_whole(name, p, trainable, saved)
                state[key] = _cut(p, self._masks.get(name), saved)
        super().load_state_dict(state_dict | {"state": state})
        for key, own in state.items():  # torch cast the moments of 16-bit parameters
            self.state[owners[key][1]] = own
        self._plans.clear()  # the next step looks at what was loaded


class _Mask(NamedTuple):
    bits: Tensor  # uint8, on the host
    shape: torch.Size


class _Entry(NamedTuple):
    """A parameter with trainable elements on this rank."""

    p: Tensor
    bits: Tensor  # uint8 on the host, of this rank's shard
    count: int
    sharded: bool

    def local(self, t: Tensor) -> Tensor:
        return t._local_tensor if self.sharded else t


class _Plan:
    """How one group's parameters are updated: fused where a kernel serves, else one by one."""

    def __init__(self, group: dict[str, Any], masks: dict[str, _Mask], state: dict):
        self.params = list(group["params"])
        entries = [_entry(p, masks.get(n)) for n, p in zip(group["param_names"], self.params)]
        # Nothing here, something on another rank: only its step is counted, as it is there.
        trainable = [mask["trainable"] for mask in group["masks"]]
        self.absent = [e for e, n in zip(entries, trainable) if n and not e.count]
        self.plain, fused = [], {}
        for one in (e for e in entries if e.count):
            local = one.local(one.p)
            if triton_serves(local.device, local.dtype) and local.is_contiguous():
                fused.setdefault((local.device, local.dtype), []).append(one)
            else:
                self.plain.append(one)
        self.fused = [
            (some, adamw.Fused([e.local(e.p) for e in some], [e.bits for e in some]))
            for some in fused.values()
        ]
        self.moments: list[Any] = [None] * len(self.fused)  # their addresses in the last step

    def fits(self, params: list[Tensor]) -> bool:
        """Whether these are still its parameters (FSDP2 puts others in their place), of the kind
        that it was made for (a model may be moved or cast)."""
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        for entries, fused in self.fused:
            for one in entries:
                p = one.local(one.p)
                same = p.dtype is fused.dtype and p.device == fused.device
                if not same or not p.is_contiguous():
                    return False
        return True

    def step(self, group: dict[str, Any], state: dict) -> None:
        for one in self.absent:
            if one.p.grad is not None:
                _advance(one, state)
        for one in self.plain:
            if (grad := one.p.grad) is not None:
                _check_state(one, state)
                own, p, grad = _advance(one, state), one.local(one.p), one.local(_dense(grad))
                mask = unpack_bits(one.bits, p.shape).to(p.device)
                f = adamw.factors(group, own["step"])
                adamw.update(p, grad, own["exp_avg"], own["exp_avg_sq"], mask, f)
        for i, (entries, fused) in enumerate(self.fused):
            moments = self._step_fused(entries, fused, group, state, self.moments[i])
            self.moments[i] = moments

    @staticmethod
    def _step_fused(
        entries: list[_Entry], fused: adamw.Fused, group: dict, state: dict, known: Any
    ) -> tuple[list[int], list[int]]:
        """One step; the addresses of its moments. Some hundred turns of its loop are most of a
        step's time on the host. Addresses are read anew each time, since others may move parameters
        and state; moments at other addresses than `known` are looked at before they are used."""
        gs, ps, ms, vs = rows = [[0] * len(entries) for _ in "gpmv"]
        kept, due = [], {}  # gradients that are copies; step → its parameters
        for i, one in enumerate(entries):
            p = one.p
            if (grad := p.grad) is None:
                continue
            own = _advance(one, state)
            if one.sharded:
                p, grad = p._local_tensor, grad._local_tensor
            if grad.dtype is not p.dtype or not _dense(grad).is_contiguous():
                grad = grad.to(p.dtype).contiguous()
                kept.append(grad)
            gs[i], ps[i] = grad.data_ptr(), p.data_ptr()
            ms[i], vs[i] = own["exp_avg"].data_ptr(), own["exp_avg_sq"].data_ptr()
            due.setdefault(own["step"], []).append(i)
        if (ms, vs) != known:
            for one in entries:
                _check_state(one, state)
        for step, some in due.items():  # one, unless some had no gradient in an earlier step
            if len(due) > 1:
                rows[0] = [0] * len(entries)
                for i in some:
                    rows[0][i] = gs[i]
            fused.update(rows, adamw.factors(group, step))
        return ms, vs


def _entry(p: Tensor, mask: _Mask | None) -> _Entry:
    if mask is not None and not _is_sharded(p):
        return _Entry(p, mask.bits, int(count_bits(mask.bits).sum()), False)
    flags = _flags_here(p, mask)
    return _Entry(p, pack_bits(flags).cpu(), int(flags.sum()), _is_sharded(p))


def _is_sharded(p: Tensor) -> bool:
    if type(p) in (Parameter, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


def _here(p: Tensor) -> Tensor:
    return p._local_tensor if _is_sharded(p) else p


def _part(whole: Tensor, p: Tensor) -> Tensor:
    """What this rank's shard of p has of a tensor shaped like p; nothing is communicated."""
    if not _is_sharded(p):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()


def _flags(p: Tensor, mask: _Mask | None) -> Tensor:
    """Which elements of the whole parameter are trainable: bool, on the host."""
    if mask is None:
        return torch.ones(p.shape, dtype=torch.bool)
    return unpack_bits(mask.bits, mask.shape)


def _flags_here(p: Tensor, mask: _Mask | None) -> Tensor:
    """The same of this rank's shard; where no mask has to be cut, on the host."""
    if mask is None:
        return torch.ones(_here(p).shape, dtype=torch.bool)
    return _part(_flags(p, mask), p)


def _gather(p: Tensor, mask: _Mask | None, own: dict[str, Any] | None) -> dict[str, Any]:
    """A parameter's state with the moments of the whole of it, by one collective if it is sharded.
    They are laid out like the parameter for it, so that any way to shard will do."""
    if own and not _is_sharded(p):
        return own
    local = _here(p)
    both = torch.zeros(*local.shape, 2, dtype=_wide(p), device=local.device)
    if own:
        here = _flags_here(p, mask).to(local.device)
        both[here] = torch.stack([own[key] for key in _MOMENTS], -1)
    if _is_sharded(p):
        from torch.distributed.tensor import DTensor

        shape = torch.Size((*p.shape, 2))
        stride = torch.empty(shape, device="meta").stride()
        both = DTensor.from_local(
            both, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride
        )
        both = both.full_tensor().to(local.device)
    moments = both[_flags(p, mask).to(local.device)].unbind(-1)
    step = own["step"] if own else 0
    return {"step": step} | {key: t.contiguous() for key, t in zip(_MOMENTS, moments)}


def _cut(p: Tensor, mask: _Mask | None, saved: dict[str, Any]) -> dict[str, Any]:
    """A copy of a parameter's state that has the moments of this rank's shard."""
    own = {"step": int(saved["step"])}
    for key in _MOMENTS:
        packed = saved[key]
        if _is_sharded(p):
            flags = _flags(p, mask).to(packed.device)
            whole = torch.zeros(p.shape, dtype=packed.dtype, device=packed.device)
            part = _part(whole.masked_scatter_(flags, packed), p)
            packed = part[_flags_here(p, mask).to(part.device)]
        own[key] = packed.to(p.device, copy=True)
    return own


def _check_whole(name: str, p: Tensor, trainable: int, saved: dict[str, Any]) -> None:
    for key in _MOMENTS:
        if saved[key].shape != (trainable,):
            raise ValueError(
                f"MaskedAdamW: the state of {name} {list(p.shape)} has {saved[key].numel()} "
                f"moments in {key}, {trainable} elements of the whole parameter are trainable; it "
                f"may be one rank's part of a state"
            )


def _advance(one: _Entry, state: dict) -> dict[str, Any]:
    """The parameter's state, its step counted."""
    own = state[one.p]
    if not own:
        p = one.local(one.p)
        own["step"] = 0
        for key in _MOMENTS:
            own[key] = torch.zeros(one.count, dtype=_wide(p), device=p.device)
    own["step"] += 1
    return own


def _dense(grad: Tensor) -> Tensor:
    if grad.layout is not torch.strided:
        raise RuntimeError("MaskedAdamW: sparse gradients are not supported")
    return grad


def _check_state(one: _Entry, state: dict) -> None:
    """A kernel gets addresses: what stands there has to be what it takes for it."""
    p = one.local(one.p)
    for key, t in state.get(one.p, {}).items():
        if key == "step":
            continue
        if t.shape != (one.count,) or not t.is_contiguous():
            raise ValueError(
                f"MaskedAdamW: the state of a parameter {list(one.p.shape)} has {t.numel()} "
                f"moments in {key}, {one.count} are trainable here; it was put there by something "
                f"else than load_state_dict, which cuts a state as its parameter is"
            )
        if t.dtype != _wide(p) or t.device != p.device:
            raise ValueError(
                f"MaskedAdamW: {key} of a parameter {list(one.p.shape)} is {t.dtype} on "
                f"{t.device}, it must be {_wide(p)} on {p.device}; move the state with the model"
            )


def _wide(p: Tensor) -> torch.dtype:
    """Of the moments."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _describe(name: str, p: Tensor, mask: _Mask | None) -> dict[str, Any]:
    if mask is not None and mask.shape != p.shape:
        raise ValueError(
            f"MaskedAdamW: the mask of {name} is {list(mask.shape)}, the parameter {list(p.shape)}"
        )
    told = {"name": name, "shape": list(p.shape), "trainable": p.numel(), "sha256": "all"}
    if mask is not None:
        digest = hashlib.sha256(bytes(mask.bits.untyped_storage())).hexdigest()
        told |= {"trainable": int(count_bits(mask.bits).sum()), "sha256": digest}
    return told


def _check_options(options: dict[str, Any]) -> None:
    """Raises for what a group's options, where given, may not be."""
    if options.get("amsgrad"):
        raise TypeError("MaskedAdamW: amsgrad is not offered; leave it False")
    for name in ("lr", "eps", "weight_decay"):
        _check_range(name, options.get(name, 0.0), float("inf"))
    for beta in options.get("betas", ()):
        _check_range("betas", beta, 1.0)


def _check_range(name: str, value: float, high: float) -> None:
    if not 0.0 <= float(value) < high:
        raise ValueError(f"MaskedAdamW: {name} must lie in [0.0, {high}), got {value}")
