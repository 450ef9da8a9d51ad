"""The scoring pass: importance of every adapter element for System 1 and for System 2."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorapar.config import Config
from lorapar.data import SYSTEMS, Row, load_labels, rows_of
from lorapar.errors import UserError
from lorapar.initialization import (
    ensure_initial,
    initial_digest,
    initial_settings,
    trainable_rank,
)
from lorapar.models import load_adapter, load_tokenizer
from lorapar.partitioning import adapter_parameters, base_name, cut, jaccard
from lorapar.patch import SUMS, Linear, accelerate, lora_layers, restore, why_not
from lorapar.progress import counter
from lorapar.runs import Run, file_digest, whole_file
from lorapar.template import Template, make_template
from lorapar_kernels import ImportanceSums, importance, select_by_mass


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
        """Importance by parameter name, fp32 on the CPU."""
        return {
            n: importance(p.cpu(), self.g[n], self.g_squared[n], self.count, variant)
            for n, p in adapter_parameters(model).items()
        }


def accumulate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    pad_token_id: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> Sums:
    """Σg and Σg² over the examples, one gradient an example at any batch size.

    The loss of an example is the mean negative log-likelihood of its completion; dropout is off.
    The model comes back as it was: weights, gradients, flags, train mode and generator state.

    Args:
        model: a PEFT model with one active plain LoRA adapter, accelerated or not.
        examples: at least one, each with a completion.
        batch_size: examples a forward, padded on the right.
        pad_token_id: fills the padding.
        advance: called with the number of examples done.

    Raises:
        UserError: no LoRA layers, a layer that cannot be served, or an adapter whose A or B is
            zero, for which every score is zero.
    """
    if not examples:
        raise UserError("score: got no examples; at least one is needed")
    if empty := [i for i, e in enumerate(examples) if not e.completion]:
        raise UserError(f"score: examples {empty[:4]} have no completion tokens to score")
    _refuse_zero(model)
    active = {a for layer in lora_layers(model).values() for a in layer.active_adapters}
    if active != {"default"}:
        raise UserError(f"score: adapters {sorted(active)} are active; activate 'default' alone")
    with _scoring(model) as sums:

        def before(cu_seqlens: Tensor) -> None:
            for one in sums.values():
                one.examples(cu_seqlens)

        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            batch_losses(model, batch, pad_token_id, before).sum().backward()
            advance(len(batch))
    g, g_squared = {}, {}
    for name, one in sums.items():
        for side, total, squares in (
            ("lora_A", one.a, one.a_squared),
            ("lora_B", one.b, one.b_squared),
        ):
            g[f"{name}.{side}.weight"] = total.cpu()
            g_squared[f"{name}.{side}.weight"] = squares.cpu()
    return Sums(g, g_squared, len(examples))


@contextmanager
def _scoring(model: nn.Module) -> Iterator[dict[str, ImportanceSums]]:
    """Serves every LoRA layer, in eval mode with sums attached; then puts everything back."""
    patched = any(type(m) is Linear for m in model.modules())
    if not patched:
        accelerate(model)
    layers = lora_layers(model)
    left = {n: why_not(m) if type(m) is Linear else report_reason(m) for n, m in layers.items()}
    if left := {n: why for n, why in left.items() if why}:
        if not patched:
            restore(model)
        shown = "; ".join(f"{n}: {why}" for n, why in list(left.items())[:4])
        raise UserError(f"score: {len(left)} LoRA layers cannot be scored: {shown}")
    training = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
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
        with torch.enable_grad():
            yield sums
    finally:
        for layer in layers.values():
            layer.__dict__.pop(SUMS, None)
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for module, mode in training.items():
            module.training = mode
        if not patched:
            restore(model)


def report_reason(layer: nn.Module) -> str:
    return f"it is a {type(layer).__name__}, not a plain lora.Linear"


def batch_losses(
    model: nn.Module,
    batch: Sequence[Example],
    pad_token_id: int,
    before: Callable[[Tensor], None] = lambda cu_seqlens: None,
) -> Tensor:
    """Each example's mean loss over its completion, fp32 [examples]. Right padding reaches none.

    `before` is told the examples' rows, int32 [examples + 1], before the forward.
    """
    where = next(model.parameters()).device
    length = max(len(e.prompt) + len(e.completion) for e in batch)
    ids = torch.full((len(batch), length), pad_token_id)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, e in enumerate(batch):
        stop = len(e.prompt) + len(e.completion)
        ids[i, :stop] = torch.tensor([*e.prompt, *e.completion])
        attention[i, :stop] = 1
        labels[i, len(e.prompt) : stop] = ids[i, len(e.prompt) : stop]
    before(torch.arange(0, (len(batch) + 1) * length, length, dtype=torch.int32, device=where))
    logits = model(
        input_ids=ids.to(where), attention_mask=attention.to(where), use_cache=False
    ).logits
    targets = labels[:, 1:].to(where)
    nll = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
    )
    return nll.view(len(batch), -1).sum(1) / (targets != -100).sum(1)


def _refuse_zero(model: nn.Module) -> None:
    parameters = adapter_parameters(model)
    if not parameters:
        raise UserError(f"score: {type(model).__name__} has no LoRA layers named 'default'")
    zero = [n for n, p in parameters.items() if not p.detach().any()]
    if zero:
        shown = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
        raise UserError(
            f"score: {shown} are all zero, so every importance would be zero (gradient times "
            f"value); start from init: paper, paper_offset, pissa, olora or orthogonal"
        )


def score(config: Config, *, progress: Any = None) -> dict[str, Any]:
    """labels.jsonl and the initial adapter (made here) → importance.safetensors. Returns a summary.

    Each system's examples are scored in two random halves, whose overlap at θ is the null control.

    Raises:
        UserError: no labels yet, an empty system, examples longer than the context.
    """
    from lorapar import lineage

    run, template = Run(config), make_template(config.template)
    run.need("labels.jsonl", "label")
    lineage.check(config, "score")
    folder = ensure_initial(config)
    settings, inputs = settings_and_inputs(config)
    rows = load_labels(run.path("labels.jsonl"))
    tokenizer = load_tokenizer(config)
    model = load_adapter(config, folder)
    variant = "taylor2" if config.score.variant == "random" else config.score.variant
    tensors, counts, null = {}, {}, {}
    for number, system in enumerate(SYSTEMS):
        chosen = sample(rows_of(rows, system, run.path("labels.jsonl")), config, number)
        examples = encode(chosen, template, tokenizer, model)
        advance = counter(progress, f"score {system}", len(examples))
        halves = [
            accumulate(
                model,
                part,
                batch_size=config.score.batch_size,
                pad_token_id=tokenizer.pad_token_id,
                advance=advance,
            )
            for part in (examples[::2], examples[1::2])
            if part
        ]
        total = halves[0] + halves[1] if len(halves) == 2 else halves[0]
        scores = total.scores(model, variant)
        if config.score.variant == "random":
            scores = shuffled(scores, config.seed + number, trainable_rank(config))
        tensors |= {f"{system}/{n}": s for n, s in scores.items()}
        counts[system] = total.count
        null[system] = _null(model, halves, variant, config)
    meta = {
        "examples": counts,
        "variant": config.score.variant,
        "init": config.init,
        "seed": config.seed,
        "trainable_rank": trainable_rank(config),
        "null_jaccard": {**null, "theta": config.partition.theta if config.partition else None},
        **inputs,
    }
    with whole_file(run.path("importance.safetensors")) as temporary:
        save_file(tensors, temporary, metadata={"lorapar": json.dumps(meta)})
    run.finish("score", settings, inputs, ["importance.safetensors"])
    return {"examples": counts, "null_jaccard": null}


def settings_and_inputs(config: Config) -> tuple[dict, dict[str, str]]:
    """What the scoring stage depends on."""
    run = Run(config)
    settings = {
        **initial_settings(config),
        "score": {"examples": config.score.examples, "variant": config.score.variant},
        "template": config.template,
    }
    labels = run.need("labels.jsonl", "label")
    return settings, {"labels.jsonl": file_digest(labels), "init": initial_digest(config)}


def sample(rows: list[Row], config: Config, number: int) -> list[Row]:
    """`score.examples` random rows, or all of them in random order if there are fewer."""
    generator = torch.Generator().manual_seed(config.seed + number)
    order = torch.randperm(len(rows), generator=generator)[: config.score.examples]
    return [rows[i] for i in order.tolist()]


def encode(
    rows: Sequence[Row], template: Template, tokenizer: Any, model: nn.Module
) -> list[Example]:
    """Rows in tokens. UserError for one longer than the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    examples = []
    for row in rows:
        e = Example(
            template.prompt_ids(tokenizer, row.question),
            template.completion_ids(tokenizer, row.answer),
        )
        length = len(e.prompt) + len(e.completion)
        if limit and length > limit:
            raise UserError(
                f"score: row {row.id} has {length} tokens, the model's context is {limit}; remove "
                f"the row from the data"
            )
        examples.append(e)
    return examples


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


def _null(model: nn.Module, halves: list[Sums], variant: str, config: Config) -> float | None:
    if len(halves) < 2 or config.partition is None:
        return None
    masks = []
    for half in halves:
        scores = cut(half.scores(model, variant), trainable_rank(config))
        masks.append(select_by_mass(list(scores.values()), config.partition.theta))
    return jaccard(*masks)
