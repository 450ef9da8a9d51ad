"""The scoring pass: importance of every adapter element for System 1 and for System 2."""

import inspect
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lorapar import ranks
from lorapar.answers import split_answer
from lorapar.calls import SUMS
from lorapar.config import Config
from lorapar.data import SYSTEMS, Row, labels_file, load_labels, rows_of
from lorapar.errors import UserError
from lorapar.groups import GROUP
from lorapar.initialization import (
    ensure_initial,
    initial_digest,
    initial_settings,
    trainable_rank,
)
from lorapar.models import load_adapter, load_tokenizer
from lorapar.partitioning import adapter_parameters, base_name, cut, jaccard, select
from lorapar.patch import accelerate, lora_layers, restore, why_left
from lorapar.progress import counter
from lorapar.runs import Run, file_digest, whole_file
from lorapar.served import Served
from lorapar.template import Template, make_template
from lorapar_kernels import ImportanceSums, importance

log = logging.getLogger("lorapar")
_COPY_BYTES = 2**26  # of sums that go to the host at a time


@dataclass(frozen=True)
class Example:
    """One scoring example in tokens; the loss is the mean over `completion`."""

    prompt: list[int]
    completion: list[int]


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
        """Importance by parameter name, fp32 on the CPU; made on the model's device, one by one."""
        made = {}
        for n, p in adapter_parameters(model).items():
            g, g_squared = self.g[n].to(p.device), self.g_squared[n].to(p.device)
            made[n] = importance(p, g, g_squared, self.count, variant).cpu()
        return made


def accumulate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    pad_token_id: int = 0,
    packed: bool = False,
    gradient_checkpointing: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> Sums:
    """Σg and Σg² over the examples, one gradient an example at any batch size.

    The loss of an example is the mean negative log-likelihood of its completion; dropout is off.
    The model comes back as it was: weights, gradients, flags, train mode and generator state.
    In a torch.distributed group every rank passes all examples, takes its share of them and gets
    the sums of all.

    Args:
        model: a PEFT model with one active plain LoRA adapter, accelerated or not.
        examples: at least one, each with a completion.
        batch_size: examples a forward, padded on the right or packed.
        pad_token_id: fills the padding.
        packed: the examples of a batch stand in one row, one behind the other. The model has to
            keep them apart by their `position_ids`; that is proved first.
        gradient_checkpointing: recompute each block in the backward, without keeping what is
            inside. A model with gradient checkpointing switched on does so anyway.
        advance: called with the number of examples done, those of other ranks counted in.

    Raises:
        UserError: no LoRA layers, a layer that cannot be served, an adapter whose A or B is zero,
            for which every score is zero; a model that mixes packed examples or has no blocks to
            checkpoint; another rank failed.
    """
    with ranks.together():
        _refuse_examples(examples, batch_size)
        _refuse_zero(model)
        active = {a for layer in lora_layers(model).values() for a in layer.active_adapters}
        if active != {"default"}:
            raise UserError(
                f"score: adapters {sorted(active)} are active; activate 'default' alone"
            )
        # Examples of one length stand together, so that little is padding; the longest come first,
        # so that what does not fit fails at once. Packed ones need no such order.
        order = examples if packed else sorted(examples, key=_length, reverse=True)
        world, mine = ranks.world(), order[ranks.rank() :: ranks.world()]
        with _scoring(model, gradient_checkpointing) as sums:

            def before(cu_seqlens: Tensor, rows: int) -> None:
                for one in sums.values():  # not by `examples`, which waits for the device
                    one.cu_seqlens, one.rows = cu_seqlens.to(one.a.device, non_blocking=True), rows

            if packed:
                _prove_apart(model, examples, before)
            for start in range(0, len(mine), batch_size):
                batch = mine[start : start + batch_size]
                batch_losses(model, batch, pad_token_id, before, packed=packed).sum().backward()
                done = min((start + len(batch)) * world, len(examples))
                advance(done - min(start * world, len(examples)))
    names = [f"{n}.lora_{side}.weight" for n in sums for side in "AB"]
    g = [t for one in sums.values() for t in (one.a, one.b)]
    g_squared = [t for one in sums.values() for t in (one.a_squared, one.b_squared)]
    for t in (*g, *g_squared):
        ranks.add_up(t)
    return Sums(dict(zip(names, _on_host(g))), dict(zip(names, _on_host(g_squared))), len(examples))


def _on_host(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the host: hundreds of small ones one by one would each wait for the device."""
    found, waiting, size = [], [], 0
    for t, next_ in zip(tensors, [*tensors[1:], None]):
        waiting.append(t)
        size += t.nbytes
        if size >= _COPY_BYTES or next_ is None or next_.device != t.device:
            flat = torch.cat([w.flatten() for w in waiting]).cpu()
            parts = flat.split([w.numel() for w in waiting])
            found += [part.view(w.shape) for part, w in zip(parts, waiting)]
            waiting, size = [], 0
    return found


@contextmanager
def _scoring(
    model: nn.Module, gradient_checkpointing: bool = False
) -> Iterator[dict[str, ImportanceSums]]:
    """Serves every LoRA layer, in eval mode with sums attached; then puts everything back."""
    blocks = _blocks(model, gradient_checkpointing)
    patched = any(isinstance(m, Served) for m in model.modules())
    if not patched:
        accelerate(model)
    layers = lora_layers(model)
    left = {n: why_left(m) or _unpatched(m) for n, m in layers.items()}
    if left := {n: why for n, why in left.items() if why}:
        if not patched:
            restore(model)
        shown = "; ".join(f"{n}: {why}" for n, why in list(left.items())[:4])
        raise UserError(f"score: {len(left)} LoRA layers cannot be scored: {shown}")
    training = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    forwards = {m: m.__dict__.get("forward") for m in blocks}
    try:
        model.eval()
        sums = {}
        for p in model.parameters():
            p.requires_grad_(False)
        for name, layer in layers.items():
            (adapter,) = layer.active_adapters
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            a.requires_grad_(True), b.requires_grad_(True)
            layer.__dict__[SUMS] = sums[base_name(name)] = ImportanceSums(a, b)
        for block in blocks:
            block.__dict__["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
        with torch.enable_grad():
            yield sums
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
            p.requires_grad_(flag)
        for module, mode in training.items():
            module.training = mode
        if not patched:
            restore(model)


def _unpatched(layer: nn.Module) -> str | None:
    return None if isinstance(layer, Served) else "it is not patched; call accelerate again"


def _blocks(model: nn.Module, wanted: bool) -> list[nn.Module]:
    """The blocks to checkpoint: transformers itself does so in train mode only.

    Those that are switched on in the model, or else, if `wanted`, all; never one in another.
    """
    on = {m for m in model.modules() if getattr(m, "gradient_checkpointing", False)}
    if not on and not wanted:
        return []
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for m in model.modules():  # from the outside in
        if isinstance(m, GradientCheckpointingLayer) and m not in inside and (not on or m in on):
            blocks.append(m)
            inside.update(m.modules())
    if not blocks:
        raise UserError(
            f"score: {_name(model)} has no GradientCheckpointingLayer of transformers, whose "
            f"forward could be recomputed; set score.gradient_checkpointing to false, and call "
            f"gradient_checkpointing_disable() if the model has it on"
        )
    return blocks


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
    logits = model(**inputs, **options, use_cache=False).logits
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
def _prove_apart(
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
        return model(**inputs, use_cache=False).logits[0].split([len(ids) for ids in tokens])

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
            f"score: {_name(model)} does not keep packed examples apart: {why}; set score.packed "
            f"to false"
        )


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _name(model: nn.Module) -> str:
    return type(_base(model)).__name__


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(_base(model).forward).parameters


def _head_has_lora(model: nn.Module) -> bool:
    """Then it is scored too, and has to see every row."""
    head = _base(model).get_output_embeddings()
    return head is not None and bool(lora_layers(head))


def _send(t: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for it."""
    if device.type == "cuda" and t.device.type == "cpu":  # not where the default device is a GPU
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def _length(e: Example) -> int:
    return len(e.prompt) + len(e.completion)


def _refuse_examples(examples: Sequence[Example], batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"score: batch_size must be at least 1, got {batch_size}")
    if not examples:
        raise UserError("score: got no examples; at least one is needed")
    empty = [i for i, e in enumerate(examples) if not e.completion or _length(e) < 2]
    if empty:
        raise UserError(f"score: examples {empty[:4]} have no completion tokens to score")


def _refuse_zero(model: nn.Module) -> None:
    parameters = adapter_parameters(model)
    if not parameters:
        raise UserError(f"score: {type(model).__name__} has no LoRA layers named 'default'")
    where = next(iter(parameters.values())).device
    largest = torch._foreach_norm([p.detach() for p in parameters.values()], torch.inf)
    largest = torch.stack([norm.to(where) for norm in largest]).tolist()  # the device is asked once
    zero = [n for n, norm in zip(parameters, largest) if norm == 0]
    if zero:
        shown = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
        raise UserError(
            f"score: {shown} are all zero, so every importance would be zero (gradient times "
            f"value); start from init: paper, paper_offset, pissa, olora or orthogonal"
        )


def score(config: Config, *, progress: Any = None) -> dict[str, Any]:
    """labels.jsonl and the initial adapter (made here) → importance.safetensors. Returns a summary.

    Each system's examples are scored in two random halves, whose overlap at θ is the null control.
    Started by torchrun or accelerate launch, the processes share the examples; the first writes.

    Raises:
        UserError: no labels yet, an empty system, no row that can be scored, scores that are NaN,
            Inf or all zero.
    """
    with ranks.group():
        return _score(config, progress if ranks.rank() == 0 else None)


def _score(config: Config, progress: Any) -> dict[str, Any]:
    from lorapar import lineage

    run, template = Run(config), make_template(config.template)
    with ranks.together():
        labels_file(run)
        lineage.check(config, "score")
    folder = ranks.first(partial(ensure_initial, config))
    examples, skipped = {}, {}
    with ranks.together():
        settings, inputs = settings_and_inputs(config)
        labels = labels_file(run)
        rows = load_labels(labels)
        tokenizer = load_tokenizer(config)
        model = load_adapter(config, folder)
        for number, system in enumerate(SYSTEMS):
            order = in_random_order(rows_of(rows, system, labels), config, number)
            examples[system], skipped[system] = usable(
                order, template, tokenizer, model, config.score.examples, f"score {system}"
            )
    tensors, halves, null = {}, {}, {}
    for number, system in enumerate(SYSTEMS):
        advance = counter(progress, f"score {system}", len(examples[system]))
        parts = [part for part in (examples[system][::2], examples[system][1::2]) if part]
        halves[system] = [len(part) for part in parts]
        sums = [
            accumulate(
                model,
                part,
                batch_size=config.score.batch_size,
                pad_token_id=tokenizer.pad_token_id,
                packed=config.score.packed,
                gradient_checkpointing=config.score.gradient_checkpointing,
                advance=advance,
            )
            for part in parts
        ]
        null[system] = ranks.first(partial(_finish, tensors, model, sums, config, number))
    summary = {
        "examples": {system: len(examples[system]) for system in SYSTEMS},
        "skipped": skipped,
        "halves": halves,
        "null_jaccard": null,
    }
    rule = {} if config.partition is None else vars(config.partition)
    meta = {
        **summary,
        "variant": config.score.variant,
        "init": config.init,
        "seed": config.seed,
        "trainable_rank": trainable_rank(config),
        "null_jaccard": {
            **null,
            **{key: rule.get(key) for key in ("theta", "granularity", "per_layer")},
        },
        **inputs,
    }

    def write() -> None:
        with whole_file(run.path("importance.safetensors")) as temporary:
            save_file(tensors, temporary, metadata={"lorapar": json.dumps(meta)})
        run.finish("score", settings, inputs, ["importance.safetensors"])

    ranks.first(write)
    return summary


def _finish(
    tensors: dict[str, Tensor],
    model: nn.Module,
    halves: list[Sums],
    config: Config,
    number: int,
) -> float | None:
    """Adds one system's scores to `tensors`; returns its null control.

    Raises:
        UserError: scores that are NaN, Inf or all zero.
    """
    system = SYSTEMS[number]
    scores = _scores(model, halves[0] + halves[1] if halves[1:] else halves[0], config, number)
    _refuse_scores(scores, system)
    tensors |= {f"{system}/{n}": s for n, s in scores.items()}
    if len(halves) < 2 or config.partition is None:
        return None
    where, rank, both = next(model.parameters()).device, trainable_rank(config), []
    for i, half in enumerate(halves):
        scores = _scores(model, half, config, len(SYSTEMS) * (1 + number) + i)
        _refuse_scores(scores, f"half of {system}")
        both.append({n: s.to(where) for n, s in cut(scores, rank).items()})
    return jaccard(*(list(select(s, config.partition).values()) for s in both))


def _scores(model: nn.Module, sums: Sums, config: Config, draw: int) -> dict[str, Tensor]:
    """Importance by the configured variant; `draw` tells one random order from another."""
    if config.score.variant != "random":
        return sums.scores(model, config.score.variant)
    return shuffled(sums.scores(model, "taylor2"), config.seed + draw, trainable_rank(config))


def _refuse_scores(scores: dict[str, Tensor], name: str) -> None:
    bad = {n: int((~s.isfinite()).sum()) for n, s in scores.items()}
    if bad := {n: count for n, count in bad.items() if count}:
        shown = ", ".join(
            f"{n} ({count} of {scores[n].numel()})" for n, count in [*bad.items()][:3]
        )
        raise UserError(
            f"score: {sum(bad.values())} scores of {name} are NaN or Inf, in {len(bad)} "
            f"parameters: {shown}{', …' * (len(bad) > 3)}; look for NaN and Inf in the weights of "
            f"the model and of init/"
        )
    if not any(s.any() for s in scores.values()):
        raise UserError(f"score: all scores of {name} are zero; no share of them can be taken")


def settings_and_inputs(config: Config) -> tuple[dict, dict[str, str]]:
    """What the scoring stage depends on."""
    run = Run(config)
    settings = {
        **initial_settings(config),
        "score": {"examples": config.score.examples, "variant": config.score.variant},
        "template": config.template,
    }
    labels = labels_file(run)
    return settings, {labels.name: file_digest(labels), "init": initial_digest(config)}


def in_random_order(rows: list[Row], config: Config, number: int) -> list[Row]:
    """The rows of system `number` as they are drawn for scoring."""
    generator = torch.Generator().manual_seed(config.seed + number)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def encode(
    rows: Sequence[Row], template: Template, tokenizer: Any, model: nn.Module
) -> list[Example]:
    """Rows in tokens, without those that cannot be scored. UserError if none can."""
    return usable(rows, template, tokenizer, model, len(rows), "score")[0]


def usable(
    rows: Sequence[Row],
    template: Template,
    tokenizer: Any,
    model: nn.Module,
    count: int,
    name: str,
) -> tuple[list[Example], dict[str, int]]:
    """The first `count` rows that can be scored, in tokens, and how many were skipped by reason.

    Skipped and said: `too_long`, beyond the model's context; `no_answer`, without answer tokens.

    Raises:
        UserError: no row can be scored. `name` stands before the message.
    """
    settings = getattr(model.config, "get_text_config", lambda: model.config)()
    limit = getattr(settings, "max_position_embeddings", None)
    examples, skipped = [], {"too_long": [], "no_answer": []}
    for row in rows:
        if len(examples) == count:
            break
        e = Example(
            template.prompt_ids(tokenizer, row.question),
            template.completion_ids(tokenizer, row.answer),
        )
        if (
            len(e.completion) < 2 or not split_answer(row.answer)[1]
        ):  # EOS or a template's text alone
            skipped["no_answer"].append(row.id)
        elif limit and _length(e) > limit:
            skipped["too_long"].append(row.id)
        else:
            examples.append(e)
    words = {
        "too_long": f"longer than the model's context of {limit} tokens",
        "no_answer": "without answer tokens",
    }
    said = ", ".join(
        f"{len(ids)} {words[why]} (row {', '.join(ids[:3])}{', …' * (len(ids) > 3)})"
        for why, ids in skipped.items()
        if ids
    )
    if not examples:
        raise UserError(
            f"{name}: none of {len(rows)} rows can be scored: {said}; change the data or the "
            f"template"
        )
    if said and ranks.rank() == 0:
        log.warning("%s: skipped %s", name, said)
    return examples, {why: len(ids) for why, ids in skipped.items()}


def shuffled(scores: dict[str, Tensor], seed: int, rank: int | None = None) -> dict[str, Tensor]:
    """The same scores on random elements: a random mask of the same size at every θ.

    Elements of rank columns from `rank` on, an offset's, stay where they are.
    """
    out = {n: s.clone() for n, s in scores.items()}
    inside = cut(out, rank)
    flat = torch.cat([s.flatten() for s in inside.values()])
    flat = flat[torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(seed))]
    for s, part in zip(inside.values(), flat.split([s.numel() for s in inside.values()])):
        s.copy_(part.view(s.shape))
    return out


def load_scores(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Scores of System 1 and of System 2 by parameter name, and the file's metadata."""
    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads((f.metadata() or {}).get("lorapar", "{}"))
            keys = sorted(f.keys())
            one, two = (
                {k.partition("/")[2]: f.get_tensor(k) for k in keys if k.startswith(f"{s}/")}
                for s in SYSTEMS
            )
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not readable scores ({e}); rerun `lorapar score`") from None
    if not one or not two or not meta:
        raise UserError(f"{path}: not scores made by lorapar; rerun `lorapar score`")
    return one, two, meta
