"""Generation from merged weights; afterwards the base weights are back, bit for bit.

PEFT's merge adds scale · B A to W in W's dtype and its unmerge subtracts it: in 16 bit W drifts
with every cycle. Here what the merge touches is kept and put back. A merged policy is the policy up
to the rounding of W + scale · B A; `merged_kl` measures how far off that is.
"""

import contextlib
import types
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lorapar.errors import UserError
from lorapar.served import Served, forget_copy

KEEPS = ("pinned", "gpu")


@contextlib.contextmanager
def merged_for_generation(model: nn.Module, *, keep: str = "pinned") -> Iterator[nn.Module]:
    """Merges the active adapters by PEFT's own merge, and takes them out again at the end.

    Nothing may be trained inside. Layers that PEFT cannot merge, and those whose base weight
    another module uses too, stay as they are and are named. A quantised base is quantised anew by
    the merge, so that its merged policy is another one: measure it by `merged_kl`.

    Args:
        model: a PEFT model, accelerated or not, whole on this process.
        keep: where the touched base weights wait: `pinned` (host memory) or `gpu` (where they are).
            The bytes are printed first. Weights that PEFT replaces, those of quantised bases, stay
            where they are.

    Yields:
        The model. In the end, also after an exception, its base weights, adapters and state are as
        they were before.

    Raises:
        UserError: the model is merged already, or its weights are sharded.
    """
    with _merged(model, keep, print):
        yield model


@torch.no_grad()
def merged_kl(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *,
    keep: str = "pinned",
) -> float:  # fmt: skip
    """Mean over tokens of KL(unmerged ‖ merged) in nats, printed and returned.

    Args:
        model: as in `merged_for_generation`, in the precision it generates in; dropout is off.
        input_ids: [B, T] sequences to measure on, prompts and completions.
        attention_mask: [B, T], 0 at padding; None: no padding.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [ids[kept.bool()][None] for ids, kept in zip(input_ids, mask)]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        before = [model(input_ids=ids).logits[0] for ids in rows]
        with _merged(model, keep, lambda text: None):
            after = [model(input_ids=ids).logits[0] for ids in rows]
    finally:
        for module, mode in modes.items():
            module.training = mode
    total = sum(map(_kl, before, after))
    tokens = sum(ids.numel() for ids in rows)
    print(
        f"KL(unmerged || merged): {total / tokens:.3g} nats a token, mean of {tokens}", flush=True
    )
    return total / tokens


def merge_rollouts(trainer: Any, *, keep: str = "pinned") -> None:
    """Makes a GRPOTrainer generate each batch from merged weights: once merged, once restored.

    Call it once the trainer is built. The bytes and `merged_kl` are printed at the first batch. The
    rollouts are the merged policy's, scored as the unmerged one's; dropout is not in them.
    `del trainer._generate` undoes it.

    Raises:
        UserError: no such trainer, or one that generates by vLLM, which merges by itself.
    """
    generate = getattr(trainer, "_generate", None)
    if not isinstance(generate, types.MethodType):
        kind = type(trainer).__name__
        raise UserError(
            f"merge_rollouts: {kind} has no _generate of its own to wrap; got it twice?"
        )
    if getattr(trainer, "use_vllm", False):
        raise UserError("merge_rollouts: vLLM gets merged weights from TRL already; leave it out")
    first = True

    def merged(*args: Any, **kwargs: Any) -> Any:
        nonlocal first
        with _merged(trainer.model, keep, print if first else lambda text: None):
            made = generate(*args, **kwargs)
        if first:
            first = False
            _first_kl(trainer, made[0], made[1], keep)
        return made

    trainer._generate = merged


def _first_kl(trainer: Any, prompts: list, completions: list, keep: str) -> None:
    if not all(completions):  # an empty one leaves nothing to compare
        return
    rows = [torch.tensor([*p, *c]) for p, c in zip(prompts, completions)]
    ids, mask = (
        nn.utils.rnn.pad_sequence(of, batch_first=True).to(trainer.accelerator.device)
        for of in (rows, [torch.ones_like(row) for row in rows])
    )
    merged_kl(trainer.model, ids, mask, keep=keep)


def _kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) summed over the rows of logits, in float64: it is a small difference."""
    total = 0.0
    for some in zip(p.split(64), q.split(64)):
        left, right = (t.double().log_softmax(-1) for t in some)
        total += (left.exp() * (left - right)).sum().item()
    return total


@contextlib.contextmanager
def _merged(model: nn.Module, keep: str, say: Any) -> Iterator[None]:
    if keep not in KEEPS:
        raise UserError(f"merged_for_generation: keep is one of {', '.join(KEEPS)}, got {keep!r}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    _check(model, layers)
    left = _cannot(model, layers)
    merging = {n: m for n, m in layers.items() if n not in left and _has_active(m)}
    saved = _Saved(list(merging.values()), keep)
    where = "host memory" if keep == "pinned" else "GPU memory"
    say(
        f"merged_for_generation: {len(merging)} layers, {saved.bytes / 2**20:,.1f} MiB of base "
        f"weights kept in {where}"
    )
    try:
        saved.take()
        for name, layer in merging.items():
            if not layer.merged and (reason := _merge(layer)):
                saved.put_back([layer])
                left[name] = reason
        for reason in dict.fromkeys(left.values()):
            names = [n for n, r in left.items() if r == reason]
            say(f"  not merged {', '.join(names)}: {reason}")
        yield
    finally:
        saved.put_back(list(merging.values()))


def _check(model: nn.Module, layers: dict[str, BaseTunerLayer]) -> None:
    if not layers:
        raise UserError(f"merged_for_generation: {type(model).__name__} has no PEFT layers")
    if merged := [n for n, layer in layers.items() if layer.merged]:
        raise UserError(
            f"merged_for_generation: already merged (by PEFT, or by this function, which does not "
            f"nest), {merged[0]} and {len(merged) - 1} others; unmerge first"
        )
    sharded = None
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        sharded = "FSDP"
    for p in model.parameters():
        if isinstance(p, DTensor):
            sharded = "FSDP or a tensor-parallel plan (it is a DTensor)"
        elif hasattr(p, "ds_id"):
            sharded = "DeepSpeed ZeRO-3"
    if sharded:
        raise UserError(
            f"merged_for_generation: the weights are sharded by {sharded}; no process has a whole "
            f"one to merge into or to put back. Generate unmerged, or by vLLM"
        )


def _cannot(model: nn.Module, layers: dict[str, BaseTunerLayer]) -> dict[str, str]:
    """layer → why it must not be merged."""
    owners = defaultdict(set)
    for parent in model.modules():
        for name, child in parent._modules.items():
            for key, p in () if child is None else child._parameters.items():
                if p is not None:
                    owners[_storage(p)].add((id(parent), name, key))
    found = {}
    for name, layer in layers.items():
        tensors = [t for _, _, t in _tensors(layer)]
        if any(t.is_meta for t in tensors):
            found[name] = "its base weight is offloaded"
        elif any(len(owners[_storage(t)]) > 1 for t in tensors):
            found[name] = "another module uses its base weight too, and would be changed with it"
    return found


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr() or id(t)
    except (NotImplementedError, RuntimeError):  # a tensor subclass without one
        return id(t)


def _has_active(layer: BaseTunerLayer) -> bool:
    if layer.disable_adapters:
        return False
    names = {n for kind in layer.adapter_layer_names for n in getattr(layer, kind, ())}
    return any(adapter in names for adapter in layer.active_adapters)


def _merge(layer: BaseTunerLayer) -> str | None:
    """Merges by PEFT's own method; the reason if that cannot."""
    device = next((p.device.type for p in layer.parameters()), "cpu")
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Merge lora module")
            layer.merge()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as e:
        return str(e).splitlines()[0] if str(e) else type(e).__name__
    return None


def _base_modules(layer: BaseTunerLayer) -> Iterator[nn.Module]:
    yield from layer.get_base_layer().modules()


def _tensors(layer: BaseTunerLayer) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in _base_modules(layer):
        for kind in (module._parameters, module._buffers):
            for name, t in kind.items():
                if t is not None:
                    yield module, name, t


def _written(t: Tensor) -> bool:
    """Whether a merge writes into t. Packed weights and tensor subclasses it replaces."""
    return type(t) in (nn.Parameter, Tensor) and t.is_floating_point()


class _Saved:
    """What merging changes in some layers: bits, the tensors themselves, and PEFT's state."""

    def __init__(self, layers: list[BaseTunerLayer], keep: str):
        self.keep, self.layers = keep, layers
        found = {id(t): t for layer in layers for _, _, t in _tensors(layer) if _written(t)}
        self.written = list(found.values())
        self.bytes = sum(t.numel() * t.element_size() for t in self.written)
        self.bits: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # id → tensor, its data, a copy
        self.state: dict[BaseTunerLayer, list] = {}

    @torch.no_grad()
    def take(self) -> None:
        for layer in self.layers:
            self.state[layer] = [*map(_state_of, _base_modules(layer)), _state_of(layer)]
        for t in self.written:
            pinned = self.keep == "pinned" and t.is_cuda
            if pinned:
                copy = torch.empty_like(t, device="cpu", pin_memory=True)
                copy.copy_(t.detach(), non_blocking=True)  # before the merge in the stream
            else:
                copy = t.detach().clone()
            self.bits[id(t)] = (t, t.data, copy)

    @torch.no_grad()
    def put_back(self, layers: list[BaseTunerLayer]) -> None:
        for layer in layers:
            for put in self.state.get(layer, ()):
                put()
            for _, _, t in _tensors(layer):
                if id(t) in self.bits:
                    _, data, copy = self.bits[id(t)]
                    data.copy_(copy, non_blocking=True)
                    if t.data_ptr() != data.data_ptr() or t.dtype != data.dtype:
                        t.data = data
            if isinstance(layer, Served):
                forget_copy(layer)


def _state_of(module: nn.Module):
    """A function that puts the module's tensors and what PEFT notes of a merge back.

    Only what a merge changes: modes, hooks and the rest are the caller's to change meanwhile.
    """
    kinds = [(kind, dict(kind)) for kind in (module._parameters, module._buffers)]
    tensors = [t for _, was in kinds for t in was.values() if t is not None]
    # bitsandbytes and torch.compile leave notes on a weight, and 8-bit layers have a state
    notes = [(t, dict(t.__dict__)) for t in tensors if getattr(t, "__dict__", None)]
    if hasattr(state := module.__dict__.get("state"), "__dict__"):
        notes.append((state, dict(state.__dict__)))
    tuner = isinstance(module, BaseTunerLayer)
    base = module._modules.get("base_layer") if tuner else None
    caches = dict(module._caches) if tuner and hasattr(module, "_caches") else None

    def put() -> None:
        for kind, was in kinds:
            for name in was:
                module.__dict__.pop(name, None)  # nn.MultiheadAttention's merged weight
            kind.clear()
            kind.update(was)
        for owner, was in notes:
            owner.__dict__.clear()
            owner.__dict__.update(was)
        if tuner:
            module.merged_adapters[:] = []
            if base is not None:
                module._modules["base_layer"] = base
        if caches is not None:
            module._caches.clear()
            module._caches.update(caches)

    return put
