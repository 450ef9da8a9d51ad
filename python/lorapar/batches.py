"""Scoring examples in batches, padded or packed, and their losses."""

import bisect
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorapar.errors import UserError
from lorapar.patch import lora_layers
from lorapar.sharding import base_of, is_sharded


@dataclass(frozen=True)
class Example:
    """One scoring example in tokens; the loss is the mean over `completion`."""

    prompt: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


Batches = list[tuple[int, Sequence[Example]]]  # each with the number of the part that it is of


def deal(
    parts: Sequence[Sequence[Example]], batch_size: int, world: int, *, packed: bool = False
) -> list[Batches]:
    """Every rank's batches in the order of the parts, so that all ranks have about as much to do.

    A batch costs its tokens, padding included. It holds neighbours in length: every fourth example,
    say, would be padded to almost the longest of all. A part has as few batches as `batch_size`
    allows, or some more, so that all ranks get equally many, as far as there are examples; those of
    a part cost about the same. On one rank no part's batches depend on the other parts.
    """
    counts = [math.ceil(len(part) / batch_size) for part in parts]
    tokens = [sum(map(len, part)) for part in parts]
    while sum(counts) % world:
        splits = [i for i, part in enumerate(parts) if counts[i] < len(part)]
        if not splits:
            break
        counts[max(splits, key=lambda i: tokens[i] / counts[i])] += 1
    batches = [
        (i, batch)
        for i, (part, count) in enumerate(zip(parts, counts))
        for batch in _cut(part, batch_size, count, packed)
    ]
    costs = [_cost([len(e) for e in batch], packed) for _, batch in batches]
    most, shares, loads = math.ceil(len(batches) / world), [[] for _ in range(world)], [0] * world
    for i in sorted(range(len(batches)), key=costs.__getitem__, reverse=True):
        rank = min((r for r in range(world) if len(shares[r]) < most), key=loads.__getitem__)
        shares[rank].append(i)
        loads[rank] += costs[i]
    return [[batches[i] for i in sorted(share)] for share in shares]


def _cut(
    part: Sequence[Example], batch_size: int, count: int, packed: bool
) -> list[Sequence[Example]]:
    """At most `count` batches, the dearest of which is as cheap as it can be.

    The longest examples come first, so that what does not fit fails at once. Packed ones need no
    order.
    """
    order = part if packed else sorted(part, key=len, reverse=True)
    lengths = [len(e) for e in order]

    def bounds(limit: int) -> list[int]:
        found, cost = [0], 0
        for i, length in enumerate(lengths):
            start = found[-1]
            cost = cost + length if packed else (i + 1 - start) * lengths[start]
            if i > start and (cost > limit or i - start == batch_size):
                found.append(i)
                cost = length
        return [*found, len(lengths)]

    limits = range(max(lengths), len(lengths) * max(lengths) + 1)
    enough = bisect.bisect_left(limits, True, key=lambda limit: len(bounds(limit)) <= count + 1)
    return [order[i:j] for i, j in itertools.pairwise(bounds(limits[enough]))]


def _cost(lengths: list[int], packed: bool) -> int:
    return sum(lengths) if packed else len(lengths) * max(lengths)


def batch_losses(
    model: nn.Module,
    batch: Sequence[Example],
    pad_token_id: int,
    before: Callable[[Tensor, int], None] = lambda cu_seqlens, rows: None,
    *,
    packed: bool = False,
) -> Tensor:
    """Each example's mean loss over its completion, fp32 [examples]. Right padding reaches none.

    `before` is told the examples' bounds, int32 [examples + 1] on the model's device, and the
    number of rows, before the forward. Nothing here waits for the device.
    """
    where, tokens = next(model.parameters()).device, [[*e.prompt, *e.completion] for e in batch]
    inputs, bounds = _packed(tokens) if packed else _padded(tokens, pad_token_id)
    # The logits that count: in which row of the batch, at which place, and the token to come.
    rows, places, targets, counts = [], [], [], []
    for i, (e, ids) in enumerate(zip(batch, tokens)):
        start = max(len(e.prompt), 1)  # nothing comes before the first token
        shift = bounds[i] - 1 if packed else -1
        rows += [0 if packed else i] * (len(ids) - start)
        places += range(shift + start, shift + len(ids))
        targets += ids[start:]
        counts.append(len(ids) - start)
    width, options = inputs["input_ids"].shape[1], {}
    if _takes(model, "logits_to_keep") and not _head_has_lora(model):
        kept = sorted(set(places))
        at = {place: i for i, place in enumerate(kept)}
        places, width = [at[place] for place in places], len(kept)
        options["logits_to_keep"] = _send(torch.tensor(kept), where)
    flat = _send(torch.tensor([row * width + p for row, p in zip(rows, places)]), where)
    before(_send(torch.tensor(bounds, dtype=torch.int32), where), bounds[-1])
    inputs = {name: _send(t, where) for name, t in inputs.items()}
    logits = forward(model, **inputs, **options)
    nll = nn.functional.cross_entropy(
        logits.flatten(0, 1)[flat].float(), _send(torch.tensor(targets), where), reduction="none"
    )
    return torch.stack([part.mean() for part in nll.split(counts)])


def _padded(tokens: list[list[int]], pad_token_id: int) -> tuple[dict[str, Tensor], list[int]]:
    """Inputs [examples, longest] and the examples' bounds in the flattened batch."""
    length = max(map(len, tokens))
    ids = torch.full((len(tokens), length), pad_token_id)
    attention = torch.zeros_like(ids)
    for i, one in enumerate(tokens):
        ids[i, : len(one)] = torch.tensor(one)
        attention[i, : len(one)] = 1
    bounds = list(range(0, (len(tokens) + 1) * length, length))
    return {"input_ids": ids, "attention_mask": attention}, bounds


def _packed(tokens: list[list[int]]) -> tuple[dict[str, Tensor], list[int]]:
    """Inputs [1, all tokens] whose positions start anew with each example, and the bounds."""
    ids = torch.tensor([t for one in tokens for t in one])
    positions = torch.cat([torch.arange(len(one)) for one in tokens])
    bounds = list(itertools.accumulate(map(len, tokens), initial=0))
    return {"input_ids": ids[None], "position_ids": positions[None]}, bounds


@torch.no_grad()
def prove_apart(
    model: nn.Module, examples: Sequence[Example], before: Callable[[Tensor, int], None]
) -> None:
    """UserError unless two packed examples leave each other's logits alone, bit for bit."""
    where = next(model.parameters()).device
    pair = [[*e.prompt, *e.completion] for e in (examples[0], examples[-1])]
    pair = [ids[:length] for ids, length in zip(pair, (6, 8))]

    def logits(*tokens: list[int]) -> Sequence[Tensor]:
        inputs, bounds = _packed(list(tokens))
        before(torch.tensor(bounds, dtype=torch.int32, device=where), bounds[-1])
        inputs = {name: t.to(where) for name, t in inputs.items()}
        return forward(model, **inputs)[0].split([len(ids) for ids in tokens])

    one, two = pair
    others = [[t - 1 if t else 1 for t in ids] for ids in pair]
    try:
        first, second = logits(one, two)
        apart = torch.equal(logits(others[0], two)[1], second)
        apart = apart and torch.equal(logits(one, others[1])[0], first)
        why = "the logits of one change with the tokens of another"
    except TypeError as e:
        apart, why = False, f"its forward takes no position_ids ({e})"
    if not apart:
        raise UserError(
            f"score: {model_name(model)} does not keep packed examples apart: {why}; set "
            f"score.packed to false"
        )


def forward(model: nn.Module, **inputs: object) -> Tensor:
    """The model's logits."""
    called = base_of(model) if is_sharded(model) else model
    return called(**inputs, use_cache=False).logits


def model_name(model: nn.Module) -> str:
    return type(base_of(model)).__name__


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(base_of(model).forward).parameters


def _head_has_lora(model: nn.Module) -> bool:
    """Then it is scored too, and has to see every row."""
    head = base_of(model).get_output_embeddings()
    return head is not None and bool(lora_layers(head))


def _send(t: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for it."""
    if device.type == "cuda" and t.device.type == "cpu":  # not where the default device is a GPU
        t = t.pin_memory()
    return t.to(device, non_blocking=True)
