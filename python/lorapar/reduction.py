"""Gradients averaged over processes, the trainable elements alone, packed.

Under DDP, `reduce_packed` registers a communication hook: of each bucket only the elements that
train are sent. Under FSDP2 with the adapter left out of sharding, nobody averages its gradients;
`Replicas` does, in one message at the end of the last backward before a step.

Frozen elements are zero after either, whatever they were before.
"""

import hashlib
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from lorapar.errors import UserError
from lorapar.partitioning import adapter_parameters


class PackedReduction:
    """The state of `reduce_packed`'s hook: what trains, and where it lies in each bucket.

    Attributes:
        sent: how many elements each process sends a step.
        total: how many DDP would send without.
    """

    def __init__(self, group: Any):
        self.group = group
        self.sent = self.total = 0
        self._masks: dict[int, Tensor] = {}  # by the parameter's id
        self._buckets: dict[int, tuple[tuple[int, ...], Tensor | None]] = {}

    def train(self, parameters: list[nn.Parameter], masks: dict[int, Tensor]) -> None:
        """From now on these masks, by the parameter's id; without one a parameter trains whole."""
        self._masks = masks
        self._buckets.clear()
        self.total = sum(p.numel() for p in parameters)
        self.sent = sum(
            int(masks[id(p)].sum()) if id(p) in masks else p.numel() for p in parameters
        )

    def clear(self) -> None:
        """Reduces whole buckets again; DDP takes no hook back."""
        self._masks = {}
        self._buckets.clear()
        self.sent = self.total

    def positions(self, bucket: dist.GradBucket) -> Tensor | None:
        """Of the bucket's trainable elements, flat; None: all are. DDP may fill a bucket anew after
        the first step, so the answer is kept for the same parameters only."""
        parameters = bucket.parameters()
        content, number = tuple(map(id, parameters)), bucket.index()
        if number not in self._buckets or self._buckets[number][0] != content:
            masks = [self._masks.get(id(p)) for p in parameters]
            flat = [_in_memory_order(p, m) for p, m in zip(parameters, masks)]
            self._buckets[number] = (content, _positions(flat))
        return self._buckets[number][1]


_registered: WeakKeyDictionary[nn.Module, PackedReduction] = WeakKeyDictionary()


def reduce_packed(
    ddp_model: DistributedDataParallel, masks: Mapping[str, Tensor]
) -> PackedReduction:
    """Makes DDP send the trainable elements of each bucket only, and zero the others.

    Each element is divided by the world size, then summed, as DDP does it: with 2 processes the
    gradients are those of DDP bit for bit. With more, NCCL's order of adding depends on where an
    element lies in the message, and a world size that is no power of two rounds in the division, so
    the last bits may differ. Works with accumulation under `no_sync`, `gradient_as_bucket_view`,
    `static_graph`, `find_unused_parameters`. Call it before the first backward; again, on the same
    wrapper, it replaces the masks. Every process must call it.

    Args:
        ddp_model: the wrapper.
        masks: bool tensor by parameter name, of the wrapped module or of a `Partition`; True where
            trainable, shaped like the parameter. A parameter without one is reduced whole.

    Returns:
        The hook's state: elements sent; `clear()` reduces everything again.

    Raises:
        UserError: no DDP wrapper, one with a communication hook already, a mask for an unknown name
            or of another shape or dtype, or masks that differ between processes.
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        raise UserError(
            f"reduce_packed: needs a DistributedDataParallel, got {type(ddp_model).__name__}"
        )
    by_id = _masks_by_id(ddp_model, masks)
    if unlike := differing(dict(masks), ddp_model.process_group):
        raise UserError(
            f"reduce_packed: {len(unlike)} masks differ between processes, the first of them "
            f"{unlike[0]}; give every process the same partition"
        )
    state = _registered.get(ddp_model)
    if state is None:
        state = PackedReduction(ddp_model.process_group)
        try:
            ddp_model.register_comm_hook(state, packed_hook)
        except RuntimeError as e:
            raise UserError(
                f"reduce_packed: DDP takes one communication hook, and refused this one ({e}); "
                f"leave out the other (accelerate: DistributedDataParallelKwargs(comm_hook=...)), "
                f"or packed_reduce"
            ) from e
        _registered[ddp_model] = state
    state.train([p for p in ddp_model.parameters() if p.requires_grad], by_id)
    return state


def packed_hook(state: PackedReduction, bucket: dist.GradBucket) -> Future[Tensor]:
    """DDP's communication hook: the bucket with trainable elements averaged and others zero."""
    buffer, positions = bucket.buffer(), state.positions(bucket)
    if positions is None:
        return _averaged(buffer, state.group).then(lambda done: done.value()[0])
    packed = buffer.index_select(0, positions)
    buffer.zero_()
    if not positions.numel():
        done = Future(devices=[buffer.device] if buffer.is_cuda else None)
        done.set_result(buffer)
        return done

    def unpack(done: Future[list[Tensor]]) -> Tensor:
        return buffer.index_copy_(0, positions.long(), done.value()[0])

    return _averaged(packed, state.group).then(unpack)


class Replicas:
    """Averages the gradients of what is whole on every process beside FSDP2's shards.

    FSDP2 reduces what it sharded and nothing else: parameters that a user left out
    (`fsdp_ignored_modules`) would drift apart. Here they are averaged over all processes, trainable
    elements and one flag a parameter in one message a dtype, at the end of a backward, before
    clipping; while accelerate accumulates (`GradientState.sync_gradients` False), not at all. Where
    nobody says so, in every backward, which gives the same. With reentrant checkpoints too.

    Args:
        model: its FSDP2 root; nothing in it unsharded, or it is sharded again.
        masks: bool tensor by parameter, True where trainable; without one it trains whole.

    Raises:
        UserError: the values differ between processes already.
    """

    def __init__(self, model: nn.Module, masks: Mapping[nn.Parameter, Tensor]):
        self.parameters = replicated(model)
        self._queued = False  # for the end of the backward that runs
        self._hooks: list[Any] = []
        self._check("before training", "seed every process alike, or load the adapter from a file")
        # transformers averages some itself, in models that it loaded in shards
        mine = [
            p
            for p in self.parameters.values()
            if not hasattr(p, "_replicated_grad_hook_registered")
        ]
        kinds: dict[tuple, list[nn.Parameter]] = {}
        for p in mine:
            kinds.setdefault((p.device, p.dtype), []).append(p)
        self._bundles = [_Bundle(same, masks) for same in kinds.values()]
        self.sent, self.total = sum(b.sent for b in self._bundles), sum(p.numel() for p in mine)
        if mine:
            # Not the root alone: a trainer may call what is within it.
            heard = [m for m in model.modules() if isinstance(m, FSDPModule)]
            self._hooks = [m.register_forward_hook(self._watch) for m in heard]

    def remove(self) -> None:
        """Ends the averaging."""
        while self._hooks:
            self._hooks.pop().remove()
        self._bundles.clear()

    def check(self) -> int:
        """How many parameters are the same on every process: all, or UserError names the others."""
        self._check("after training", "their gradients were not averaged, or something else wrote")
        return len(self.parameters)

    def average(self) -> None:
        """Averages what gradients there are now. Every process must call it."""
        for bundle in self._bundles:
            bundle.average()

    def _check(self, when: str, why: str) -> None:
        if unlike := differing(self.parameters):
            raise UserError(
                f"{len(unlike)} of {len(self.parameters)} parameters that FSDP2 leaves whole on "
                f"each process differ between processes {when}, the first of them {unlike[0]}; "
                f"{why}"
            )

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hears of a backward where it begins, at an output: a hook of a parameter may run in the
        backward that a reentrant checkpoint starts within it, which ends too early."""
        if not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() == -1:  # no recomputation
            self._queued = False  # a backward that raised left it set
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(self._backward_runs)

    def _backward_runs(self, *unused: Any) -> None:
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        self._queued = False
        if GradientState().sync_gradients:
            self.average()


class _Bundle:
    """Parameters of one dtype and device, whose gradients go in one message.

    A flag a parameter says who has a gradient: where another process has one, this one gets it too.
    """

    def __init__(self, parameters: list[nn.Parameter], masks: Mapping[nn.Parameter, Tensor]):
        self._parameters = parameters
        self._flags = torch.ones(len(parameters), dtype=parameters[0].dtype).to(
            parameters[0].device
        )
        every = torch.ones_like(self._flags, dtype=torch.bool)
        flat = [masks.get(p, torch.ones_like(p, dtype=torch.bool)) for p in parameters]
        self._positions = _positions([*(m.to(every.device).flatten() for m in flat), every])
        whole = sum(p.numel() for p in parameters) + len(parameters)
        self.sent = whole if self._positions is None else self._positions.numel()

    @torch.no_grad()
    def average(self) -> None:
        grads = [p.grad for p in self._parameters]
        missing = [i for i, g in enumerate(grads) if g is None]
        flags = self._flags
        if missing:
            flags = flags.clone()
            flags[missing] = 0
            grads = [
                torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, grads)
            ]
        flat = torch.cat([*(g.flatten() for g in grads), flags])
        if self._positions is None:
            _averaged(flat).wait()
        else:
            packed = flat.index_select(0, self._positions)
            _averaged(packed).wait()
            flat.zero_().index_copy_(0, self._positions.long(), packed)
        *averages, flags = flat.split([*(g.numel() for g in grads), len(grads)])
        torch._foreach_copy_(grads, [a.view(g.shape) for a, g in zip(averages, grads)])
        if missing:
            anywhere = flags.tolist()
            for i in missing:
                if anywhere[i]:
                    self._parameters[i].grad = grads[i]


def sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages the model or a part of it."""
    return any(isinstance(m, FSDPModule) for m in model.modules())


def replicated(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in a model under FSDP2 without being sharded, by name."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward may have left whole what is sharded
    return {
        n: p for n, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)
    }


def differing(tensors: Mapping[str, Tensor], group: Any = None) -> list[str]:
    """The names whose bits are not the same on all processes of the group, on each of them."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, {n: _digest(t) for n, t in tensors.items()}, group=group)
    names = dict.fromkeys(n for digests in found for n in digests)
    return [n for n in names if len({digests.get(n) for digests in found}) > 1]


def _digest(t: Tensor) -> str:
    flat = t.detach().cpu().flatten().view(torch.uint8)
    return f"{tuple(t.shape)} {t.dtype} {hashlib.sha256(flat.numpy()).hexdigest()}"


def _averaged(t: Tensor, group: Any = None) -> Future[list[Tensor]]:
    """Divided first, so that 16 bits do not overflow, then summed in place."""
    t.div_(dist.get_world_size(group))
    return dist.all_reduce(t, group=group, async_op=True).get_future()


def _positions(masks: list[Tensor]) -> Tensor | None:
    """Where the concatenated flat masks are True, or None for everywhere."""
    flat = torch.cat(masks)
    if flat.all():
        return None
    found = flat.nonzero().flatten()
    return found.int() if flat.numel() < 2**31 else found


def _in_memory_order(p: nn.Parameter, mask: Tensor | None) -> Tensor:
    """The mask flat, its elements where DDP's bucket has the gradient's: as they lie in memory if
    the parameter is dense, else in order."""
    out = torch.empty_like(p, dtype=torch.bool)
    if out.stride() != p.stride():
        out = torch.empty(p.shape, dtype=torch.bool, device=p.device)
    if mask is None:
        out.fill_(True)
    else:
        out.copy_(mask)
    return out.as_strided((out.numel(),), (1,))


def _masks_by_id(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[int, Tensor]:
    known = adapter_parameters(model) | dict(model.module.named_parameters())
    problems, found = [], {}
    for name, mask in masks.items():
        p = known.get(name)
        if p is None:
            problems.append(f"{name}: no such parameter")
        elif mask.dtype != torch.bool or mask.shape != p.shape:
            problems.append(
                f"{name}: needs bool {list(p.shape)}, got {mask.dtype} {list(mask.shape)}"
            )
        else:
            found[id(p)] = mask
    if problems:
        more = f"\n  and {len(problems) - 8} more" * (len(problems) > 8)
        raise UserError(
            "reduce_packed: the masks do not fit the model:\n  " + "\n  ".join(problems[:8]) + more
        )
    return found
