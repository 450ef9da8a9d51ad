"""Σg and Σg² of every adapter element over examples, collected in the backward."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorapar import ranks
from lorapar.batches import Example, batch_losses, deal, model_name, prove_apart
from lorapar.calls import SUMS
from lorapar.errors import UserError
from lorapar.groups import GROUP
from lorapar.partitioning import adapter_parameters, base_name
from lorapar.patch import accelerate, restore, why_left
from lorapar.served import Served
from lorapar.sharding import is_sharded, outermost_blocks
from lorapar_kernels import ImportanceSums, importance

T = TypeVar("T")
_COPY_BYTES = 2**26  # of scores that are made, or go to the host, at a time
_ALIGNED = 32  # elements, 128 bytes: the sums of a weight begin at a multiple


@dataclass
class Sums:
    """Σg and Σg² of one set of examples, by parameter name; `count` examples."""

    g: dict[str, Tensor]
    g_squared: dict[str, Tensor]
    count: int

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            {n: t + other.g[n] for n, t in self.g.items()},
            {n: t + other.g_squared[n] for n, t in self.g_squared.items()},
            self.count + other.count,
        )

    def scores(self, model: nn.Module, variant: str) -> dict[str, Tensor]:
        """Importance by parameter name, fp32 on the CPU; made on the model's device."""
        made = self.made(model, variant)
        return dict(zip(made, to_host([*made.values()])))

    def made(self, model: nn.Module, variant: str) -> dict[str, Tensor]:
        """The same on the model's device."""
        names, scores = [], []
        for piece in pieces([*adapter_parameters(model).items()], lambda item: item[1]):
            phi = torch.cat([p.detach().flatten() for _, p in piece])
            sums = (torch.cat([of[n].flatten().to(phi.device) for n, _ in piece])
                    for of in (self.g, self.g_squared))  # fmt: skip
            flat = importance(phi, *sums, self.count, variant)
            names += [n for n, _ in piece]
            scores += _like(flat, [p for _, p in piece])
        return dict(zip(names, scores))


def accumulate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    advance: Callable[[int], None] = lambda n: None,
    **options: Any,
) -> Sums:
    """`accumulate_each` of one part; `advance` is called with a number of examples alone."""
    return accumulate_each(model, [examples], advance=lambda n, part: advance(n), **options)[0]


def accumulate_each(
    model: nn.Module,
    parts: Sequence[Sequence[Example]],
    *,
    batch_size: int = 16,
    pad_token_id: int = 0,
    packed: bool = False,
    gradient_checkpointing: bool = False,
    on_host: bool = True,
    advance: Callable[[int, int], None] = lambda n, part: None,
) -> list[Sums]:
    """Σg and Σg² over the examples of each part, one gradient an example at any batch size.

    The loss of an example is the mean negative log-likelihood of its completion; dropout is off.
    The model comes back as it was: weights, gradients, flags, train mode and generator state.
    In a torch.distributed group every rank passes all examples, takes its share of them and gets
    the sums of all, which are added up once, at the end. Where the base is sharded each rank runs
    as many batches as any other; one that has none left runs an example with a gradient of zero,
    which changes no sum. A rank that fails tells the others, but for a sharded base, where they
    wait for its shards: there the failure goes up at once, and ends the group with this process.

    The sums of a part take 8 bytes an element of the adapter, on the device until the end: 0.6 GB
    for four parts of LLaMA-7B's at r=8. More parts at a time are faster on several ranks, whose
    shares get more alike.

    Args:
        model: a PEFT model with one active plain LoRA adapter, accelerated or not, its base whole
            or spread by `sharding.shard_base`.
        parts: at least one, of at least one example each, each with a completion.
        batch_size: at most so many examples a forward, padded on the right or packed; examples of
            like length stand together.
        pad_token_id: fills the padding.
        packed: the examples of a batch stand in one row, one behind the other. The model has to
            keep them apart by their `position_ids`; that is proved first.
        gradient_checkpointing: recompute each block in the backward, without keeping what is
            inside. A model with gradient checkpointing switched on does so anyway.
        on_host: copy the sums to the host; else they stay on the model's device.
        advance: called with the number of examples done, those of other ranks counted in, and the
            number of the part that they are of.

    Raises:
        UserError: no LoRA layers, a layer that cannot be served, an adapter whose A or B is zero,
            for which every score is zero; a model that mixes packed examples or has no blocks to
            checkpoint; another rank failed.
    """
    spread, found = is_sharded(model), []
    with nullcontext() if spread else ranks.together():
        _refuse_examples(parts, batch_size)
        modules = dict(model.named_modules())
        weights = _weights(model, modules)
        room = _Room(weights)
        shares = deal(parts, batch_size, ranks.world(), packed=packed)
        steps = [[*step] for step in zip_longest(*shares)]  # of all ranks
        with _scoring(model, modules, gradient_checkpointing) as attach:
            sums: list[ImportanceSums] = []

            def before(cu_seqlens: Tensor, rows: int) -> None:
                told = {where: cu_seqlens.to(where, non_blocking=True) for where in room.sizes}
                for one in sums:  # not by `examples`, which waits for the device
                    one.cu_seqlens, one.rows = told[one.a.device], rows

            def begin() -> None:
                buffers = room.zeros()
                found.append((buffers, room.cut(buffers)))
                sums[:] = attach(*found[-1][1])

            begin()
            if packed:
                prove_apart(model, [parts[0][0], parts[-1][-1]], before)
            for step in steps:
                mine = step[ranks.rank()]
                part, batch = mine or (len(found) - 1, [])
                while len(found) <= part:
                    begin()
                if batch or spread:
                    losses = batch_losses(
                        model, batch or parts[-1][-1:], pad_token_id, before, packed=packed
                    )
                    losses.backward(torch.full_like(losses, bool(batch)))
                for at, of in filter(None, step):
                    advance(len(of), at)
            while len(found) < len(parts):
                begin()
    made = []
    for part, (buffers, views) in zip(parts, found):
        for t in buffers.values():
            ranks.add_up(t)
        if on_host:
            views = room.cut({where: t.cpu() for where, t in buffers.items()})
        made.append(Sums(*views, len(part)))
    return made


class _Room:
    """Where the sums of all weights lie: Σg and Σg², fp32 [2, elements], one tensor a device."""

    def __init__(self, weights: dict[str, Tensor]):
        self.sizes: dict[torch.device, int] = {}  # elements
        self.places = {}  # name → device, shape, first element
        for name, t in weights.items():
            start = self.sizes.get(t.device, 0)
            self.places[name] = t.device, t.shape, start
            self.sizes[t.device] = start + math.ceil(t.numel() / _ALIGNED) * _ALIGNED

    def zeros(self) -> dict[torch.device, Tensor]:
        return {d: torch.zeros(2, n, dtype=torch.float32, device=d) for d, n in self.sizes.items()}

    def cut(
        self, buffers: dict[torch.device, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Σg and Σg² by name, in the shapes of the weights; no copies."""
        g, g_squared = {}, {}
        for name, (where, (rows, columns), start) in self.places.items():
            as_placed = partial(buffers[where].as_strided, (rows, columns), (columns, 1))
            g[name], g_squared[name] = as_placed(start), as_placed(start + self.sizes[where])
        return g, g_squared


def pieces(items: list[T], tensor: Callable[[T], Tensor] = lambda t: t) -> Iterator[list[T]]:
    """Neighbours whose tensors are of one dtype and device, some `_COPY_BYTES` at a time: hundreds
    of small copies or reductions would each wait for the device."""
    piece, size = [], 0
    for item, after in zip(items, [*items[1:], None]):
        piece.append(item)
        t, next_ = tensor(item), None if after is None else tensor(after)
        size += t.nbytes
        same = next_ is not None and (next_.device, next_.dtype) == (t.device, t.dtype)
        if size >= _COPY_BYTES or not same:
            yield piece
            piece, size = [], 0


def to_host(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the host."""
    found = []
    for piece in pieces(tensors):
        found += _like(torch.cat([t.flatten() for t in piece]).cpu(), piece)
    return found


def _like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """`flat` cut into the shapes of the tensors."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors)]


@contextmanager
def _scoring(
    model: nn.Module, modules: dict[str, nn.Module], gradient_checkpointing: bool = False
) -> Iterator[Callable[..., list[ImportanceSums]]]:
    """Serves every LoRA layer, in eval mode; then puts everything back.

    Yields a function that attaches to the layers the sums Σg and Σg² of the weights by name.
    """
    blocks = _blocks(model, modules.values(), gradient_checkpointing)
    layers = _lora_layers(modules)
    patched = any(isinstance(m, Served) for m in layers.values())
    if not patched:
        accelerate(model)
    left = {n: why_left(m) or _unpatched(m) for n, m in layers.items()}
    if left := {n: why for n, why in left.items() if why}:
        if not patched:
            restore(model)
        shown = "; ".join(f"{n}: {why}" for n, why in list(left.items())[:4])
        raise UserError(f"score: {len(left)} LoRA layers cannot be scored: {shown}")
    sides = {base_name(n): (layer, *_sides(layer)) for n, layer in layers.items()}
    adapter = [p for _, *pair in sides.values() for p in pair]
    training = [m for m in modules.values() if m.training]
    parameters = {p: None for m in modules.values() for p in m._parameters.values()}
    parameters.pop(None, None)
    flags = {p: p.requires_grad for p in (*parameters, *adapter)}
    forwards = {m: m.__dict__.get("forward") for m in blocks}

    def attach(g: dict[str, Tensor], g_squared: dict[str, Tensor]) -> list[ImportanceSums]:
        made = []
        for n, (layer, a, b) in sides.items():
            zeros = [of[f"{n}.lora_{s}.weight"] for s in "AB" for of in (g, g_squared)]
            layer.__dict__[SUMS] = ImportanceSums(a, b, zeros)
            made.append(layer.__dict__[SUMS])
        return made

    try:
        if training:
            model.eval()
        for p in {p for p, flag in flags.items() if flag}.difference(adapter):
            p.requires_grad_(False)
        for p in adapter:
            p.requires_grad_(True)
        for block in blocks:
            block.__dict__["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
        with torch.enable_grad():
            yield attach
    finally:
        for block, forward in forwards.items():
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward
        for layer in layers.values():
            layer.__dict__.pop(SUMS, None)
            if link := layer.__dict__.get(GROUP):
                link[0].pending = None  # an output that nobody took holds the sums
        for p, flag in flags.items():
            if p.requires_grad != flag:
                p.requires_grad_(flag)
        for module in training:
            module.training = True
        if not patched:
            restore(model)


def _lora_layers(modules: dict[str, nn.Module]) -> dict[str, LoraLayer]:
    return {n: m for n, m in modules.items() if isinstance(m, LoraLayer)}


def _sides(layer: LoraLayer) -> list[Tensor]:
    """The weights of A and B of adapter 'default', of a layer that has it."""
    return [of["default"].weight for of in (layer.lora_A, layer.lora_B) if "default" in of]


def _unpatched(layer: nn.Module) -> str | None:
    return None if isinstance(layer, Served) else "it is not patched; call accelerate again"


def _blocks(model: nn.Module, modules: Iterable[nn.Module], wanted: bool) -> list[nn.Module]:
    """The blocks to checkpoint: transformers itself does so in train mode only.

    Those that are switched on in the model, or else, if `wanted`, all; never one in another.
    """
    name = "gradient_checkpointing"  # not by getattr, which is slow where a module has none
    on = {m for m in modules if m.__dict__.get(name, getattr(type(m), name, False))}
    if not on and not wanted:
        return []
    blocks = outermost_blocks(model, lambda m: not on or m in on)
    if not blocks:
        raise UserError(
            f"score: {model_name(model)} has no GradientCheckpointingLayer of transformers, whose "
            f"forward could be recomputed; set score.gradient_checkpointing to false, and call "
            f"gradient_checkpointing_disable() if the model has it on"
        )
    return blocks


def _refuse_examples(parts: Sequence[Sequence[Example]], batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"score: batch_size must be at least 1, got {batch_size}")
    if not parts or not all(parts):
        raise UserError("score: got no examples; at least one is needed")
    for examples in parts:
        empty = [i for i, e in enumerate(examples) if not e.completion or len(e) < 2]
        if empty:
            raise UserError(f"score: examples {empty[:4]} have no completion tokens to score")


def _weights(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A and B of every layer by `adapter_parameters`' names.

    Raises:
        UserError: there are none, one is zero, or another adapter is active.
    """
    layers = _lora_layers(modules)
    weights = {
        f"{base_name(n)}.lora_{side}.weight": t
        for n, layer in layers.items()
        for side, t in zip("AB", _sides(layer))
    }
    if not weights:
        raise UserError(f"score: {type(model).__name__} has no LoRA layers named 'default'")
    where = next(iter(weights.values())).device
    largest = torch._foreach_norm([t.detach() for t in weights.values()], torch.inf)
    largest = torch.stack([norm.to(where) for norm in largest]).tolist()  # the device is asked once
    zero = [n for n, norm in zip(weights, largest) if norm == 0]
    if zero:
        shown = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
        raise UserError(
            f"score: {shown} are all zero, so every importance would be zero (gradient times "
            f"value); start from init: paper, paper_offset, pissa, olora or orthogonal"
        )
    active = {a for layer in layers.values() for a in layer.active_adapters}
    if active != {"default"}:
        raise UserError(f"score: adapters {sorted(active)} are active; activate 'default' alone")
    return weights
