"""Accuracy on the test rows: greedy, left-padded, answers compared as numbers."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from lorapar import ranks
from lorapar.answers import SCORERS, correct
from lorapar.config import Config
from lorapar.data import SYSTEMS, Row, load_rows
from lorapar.errors import UserError, nearest
from lorapar.initialization import adapter_digest
from lorapar.models import load_adapter, load_base, load_tokenizer, model_digest
from lorapar.patch import accelerate
from lorapar.progress import counter
from lorapar.runs import Run, digest, write_text
from lorapar.sharding import is_sharded, shard_base
from lorapar.template import Template, make_template

STAGES = ("base", "sft", "rl")


def wilson(correct_count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson interval of a share."""
    if total == 0:
        return 0.0, 1.0
    p = correct_count / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def gain(
    before: dict[str, Any], after: dict[str, Any], z: float = 1.96
) -> tuple[float, float, float]:
    """Difference of two accuracies on the same rows, with its 95 % paired interval.

    The interval is Agresti and Min's (2005): half an observation more in each of the four cells of
    right and wrong, so that it has a width even where every row changed the same way.

    Args:
        before, after: results with `outcomes`, 0 or 1 by row in the same order.
    """
    pairs = list(zip(before["outcomes"], after["outcomes"], strict=True))
    n, won, lost = len(pairs) + 2, pairs.count((0, 1)) + 0.5, pairs.count((1, 0)) + 0.5
    centre = (won - lost) / n
    half = z * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    mean = (won - lost) / max(1, len(pairs))
    return mean, max(-1.0, centre - half), min(1.0, centre + half)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda n: None,
    sampling: Mapping[str, Any] | None = None,
    deal: bool = False,
) -> list[str]:
    """Completions of tokenised prompts, in order. Padding goes left and is masked.

    Greedy, unless `sampling` has settings of `GenerationConfig` that say otherwise.

    With `deal` every rank of a torch.distributed group passes all prompts, makes its share of the
    batches, which are those of one process, and gets all completions. Over a sharded base each
    rank generates as often as any other, and one that fails ends the group (see
    `importance.accumulate_each`).
    """
    model.eval()
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(sampling or {"do_sample": False}),
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    world, place = (ranks.world(), ranks.rank()) if deal else (1, 0)
    spread, made = is_sharded(model), {}
    with ranks.together() if deal and not spread else nullcontext():
        for start in range(0, len(batches), world):
            round_ = batches[start : start + world]
            mine = round_[place] if place < len(round_) else []
            if mine or spread:  # the shortest prompt for want of others
                texts = _complete(
                    model, tokenizer, [prompts[i] for i in mine or order[:1]], settings
                )
                made |= zip(mine, texts)
            advance(sum(map(len, round_)))
    found = {i: text for of in (ranks.of_all(made) if deal else [made]) for i, text in of.items()}
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def _complete(
    model: nn.Module, tokenizer: Any, batch: list[list[int]], settings: GenerationConfig
) -> list[str]:
    where, length = next(model.parameters()).device, max(map(len, batch))
    ids = torch.full((len(batch), length), tokenizer.pad_token_id)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention[row, length - len(prompt) :] = 1
    made = model.generate(
        input_ids=ids.to(where), attention_mask=attention.to(where), generation_config=settings
    )
    return [tokenizer.decode(one[length:], skip_special_tokens=True) for one in made]


def prompts_of(rows: Sequence[Row], shots: Sequence[Row], template: Template, tokenizer: Any):
    """Tokenised prompts, after worked examples if there are any."""

    def after(prefix: list[int], question: str) -> list[int]:
        ids = template.prompt_ids(tokenizer, question)
        repeated = (
            prefix and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        )
        return prefix + ids[1 if repeated else 0 :]

    prefix: list[int] = []
    for shot in shots:
        prefix = after(prefix, shot.question) + template.completion_ids(tokenizer, shot.answer)
    return [after(prefix, row.question) for row in rows]


def measure(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    template: Template,
    config: Config,
    shots: Sequence[Row] = (),
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Counts, accuracy and interval for all rows and for each system that rows name.

    The ranks of a group share the rows; each gets the result of all, which is that of one process.
    """
    prompts = prompts_of(rows, shots, template, tokenizer)
    completions = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=config.eval.max_new_tokens,
        batch_size=config.eval.batch_size,
        advance=advance,
        deal=True,
    )
    hits = [
        int(correct(text, row.answer, template.marker, config.eval.scorer))
        for text, row in zip(completions, rows)
    ]
    result = {"all": _result(hits)}
    for system in SYSTEMS:
        chosen = [hit for hit, row in zip(hits, rows) if row.system == system]
        if chosen:
            result[system] = _result(chosen)
    result["samples"] = [
        {"id": row.id, "completion": text, "correct": bool(hit)}
        for row, text, hit in list(zip(rows, completions, hits))[:: max(1, len(rows) // 10)]
    ]
    return result


def evaluate(
    config: Config, *, stages: Sequence[str] = STAGES, progress: Any = None
) -> dict[str, Any]:
    """Base model and finished stages on the test rows → eval.json. Returns its content.

    A stage is measured anew only if its adapter, the test rows or the settings changed. Started by
    torchrun or accelerate launch, the processes share the rows, and under FSDP the base model too;
    the first writes.

    Raises:
        UserError: no test data, or an unknown stage or scorer.
    """
    with ranks.group():
        return _evaluate(config, stages, progress if ranks.rank() == 0 else None)


def _evaluate(config: Config, stages: Sequence[str], progress: Any) -> dict[str, Any]:
    with ranks.together():
        run, template = Run(config), make_template(config.template)
        for stage in stages:
            if stage not in STAGES:
                raise UserError(f"eval: stage {stage!r} is unknown{nearest(stage, STAGES)}")
        check_settings(config)
    with ranks.together():
        rows = load_rows(config.data, "test")
        shots = load_rows(config.data, "train")[: config.eval.shots] if config.eval.shots else []
        tokenizer = load_tokenizer(config)
    used = [*shots, *rows]
    path, of_rows = run.path("eval.json"), digest([vars(row) for row in used])
    results = ranks.first(partial(_read, path))
    for stage, result in list(results.items()):  # measured on other rows, or with other settings
        if result.get("rows") != of_rows:
            del results[stage]
    keys = ranks.first(partial(_keys, config, stages, used))
    for stage, key in keys.items():
        if key is None:
            results.pop(stage, None)
            continue
        if results.get(stage, {}).get("key") == key:
            continue
        model = _load(config, None if stage == "base" else run.path(stage))
        advance = counter(progress, f"evaluate {stage}", len(rows))
        results[stage] = measure(model, tokenizer, rows, template, config, shots, advance)
        del model  # before the next is loaded
        results[stage] |= {"key": key, "rows": of_rows}
        ranks.first(partial(write_text, path, json.dumps(results, indent=1)))
    settings = {"eval": config.eval, "template": config.template}
    ranks.first(partial(run.finish, "eval", settings, {}, ["eval.json"]))
    return results


def _keys(config: Config, stages: Sequence[str], rows: Sequence[Row]) -> dict[str, str | None]:
    """`eval_key` by stage; None for one that is not finished."""
    keys: dict[str, str | None] = {}
    for stage in stages:
        folder = None if stage == "base" else Run(config).path(stage)
        there = folder is None or (folder / "adapter_config.json").exists()
        keys[stage] = eval_key(config, rows, folder) if there else None
    return keys


def _load(config: Config, folder: Path | None) -> nn.Module:
    """The base model, or the adapter in the folder on it; spread over the ranks under FSDP."""
    with ranks.together():
        model = load_base(config) if folder is None else load_adapter(config, folder)
    if ranks.sharded():
        shard_base(model)
    if folder is not None:
        accelerate(model)
    return model


def check_settings(config: Config) -> None:
    """Raises UserError for a scorer that does not exist."""
    if config.eval.scorer not in SCORERS:
        raise UserError(
            f"eval.scorer {config.eval.scorer!r} is unknown{nearest(config.eval.scorer, SCORERS)}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}; delete it and run `lorapar eval`") from None


def eval_key(config: Config, rows: Sequence[Row], folder: Path | None) -> str:
    """What one stage's result depends on."""
    adapter = adapter_digest(folder) if folder else None
    model = [config.model, model_digest(config.model)]
    return digest([model, adapter, config.eval, config.template, [vars(row) for row in rows]])


def _result(hits: list[int]) -> dict[str, Any]:
    low, high = wilson(sum(hits), len(hits))
    return {
        "correct": sum(hits),
        "total": len(hits),
        "accuracy": sum(hits) / len(hits),
        "low": low,
        "high": high,
        "outcomes": hits,
    }
