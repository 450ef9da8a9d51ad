"""The scoring pass: importance of every adapter element for System 1 and for System 2."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorapar import ranks
from lorapar.answers import split_answer
from lorapar.batches import Example
from lorapar.config import Config
from lorapar.data import SYSTEMS, Row, labels_file, load_labels, rows_of
from lorapar.errors import UserError
from lorapar.initialization import (
    ensure_initial,
    initial_digest,
    initial_settings,
    trainable_rank,
)
from lorapar.models import load_adapter, load_tokenizer
from lorapar.partitioning import cut, jaccard, select
from lorapar.progress import counter
from lorapar.runs import Run, file_digest, whole_file
from lorapar.sharding import shard_base
from lorapar.sums import Sums, accumulate_each, pieces, to_host
from lorapar.sums import accumulate as accumulate
from lorapar.template import Template, make_template

log = logging.getLogger("lorapar")


def score(config: Config, *, progress: Any = None) -> dict[str, Any]:
    """labels.jsonl and the initial adapter (made here) → importance.safetensors. Returns a summary.

    Each system's examples are scored in two random halves, whose overlap at θ is the null control.
    Started by torchrun or accelerate launch, the processes share the examples; the first writes.
    Under FSDP they share the base model too.

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
    if ranks.sharded():
        shard_base(model)
    tensors, halves, null, parts, bars = {}, {}, {}, [], []
    for system in SYSTEMS:
        bar = counter(progress, f"score {system}", len(examples[system]))
        mine = [part for part in (examples[system][::2], examples[system][1::2]) if part]
        halves[system] = [len(part) for part in mine]
        parts += mine
        bars += [bar] * len(mine)
    sums = iter(
        accumulate_each(
            model,
            parts,
            batch_size=config.score.batch_size,
            pad_token_id=tokenizer.pad_token_id,
            packed=config.score.packed,
            gradient_checkpointing=config.score.gradient_checkpointing,
            on_host=False,
            advance=lambda n, part: bars[part](n),
        )
    )
    for number, system in enumerate(SYSTEMS):
        mine = [*islice(sums, len(halves[system]))]
        null[system] = ranks.first(partial(_finish, tensors, model, mine, config, number))
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
    names = [f"{system}/{n}" for n in scores]
    tensors |= zip(names, to_host([*scores.values()]))
    if len(halves) < 2 or config.partition is None:
        return None
    where, rank, both = next(model.parameters()).device, trainable_rank(config), []
    for i, half in enumerate(halves):
        scores = _scores(model, half, config, len(SYSTEMS) * (1 + number) + i)
        _refuse_scores(scores, f"half of {system}")
        both.append({n: s.to(where) for n, s in cut(scores, rank).items()})
    return jaccard(*(list(select(s, config.partition).values()) for s in both))


def _scores(model: nn.Module, sums: Sums, config: Config, draw: int) -> dict[str, Tensor]:
    """Importance by the configured variant, on the model's device; `draw` tells one random order,
    which is made on the host, from another."""
    if config.score.variant != "random":
        return sums.made(model, config.score.variant)
    return shuffled(sums.scores(model, "taylor2"), config.seed + draw, trainable_rank(config))


def _refuse_scores(scores: dict[str, Tensor], name: str) -> None:
    flats = [torch.cat([s.flatten() for s in piece]) for piece in pieces([*scores.values()])]
    if not all(flat.isfinite().all() for flat in flats):
        bad = {n: int((~s.isfinite()).sum()) for n, s in scores.items()}
        bad = {n: count for n, count in bad.items() if count}
        shown = ", ".join(
            f"{n} ({count} of {scores[n].numel()})" for n, count in [*bad.items()][:3]
        )
        raise UserError(
            f"score: {sum(bad.values())} scores of {name} are NaN or Inf, in {len(bad)} "
            f"parameters: {shown}{', …' * (len(bad) > 3)}; look for NaN and Inf in the weights of "
            f"the model and of init/"
        )
    if not any(flat.any() for flat in flats):
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
        elif limit and len(e) > limit:
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
