"""Scores → System 1 only, System 2 only, shared; and what each stage may train.

One global cut per system over the whole adapter (all layers, A and B together); `per_layer` cuts
each layer by itself, which is not the paper's rule. A stage trains its own elements plus the top
share of the shared ones, by count, ranked by the stage's own score.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorapar.config import Config, PartitionSettings
from lorapar.errors import UserError
from lorapar.runs import Run, file_digest, whole_file
from lorapar_kernels import LoraMask, select_by_mass, select_top
from lorapar_kernels.bits import pack_bits, unpack_bits

STAGES = ("sft", "rl")
_SETS = ("system1", "system2", *STAGES)


@dataclass(frozen=True)
class Partition:
    """Bool masks by parameter name in the base model: `model.layers.0...q_proj.lora_A.weight`.

    system1, system2: what each system's mass keeps. sft, rl: what each stage may train.
    meta: θ, α, β, init, seed, hashes; with drop_unselected also the live columns by layer.
    """

    system1: dict[str, Tensor]
    system2: dict[str, Tensor]
    sft: dict[str, Tensor]
    rl: dict[str, Tensor]
    meta: dict[str, Any]

    def masks(self, stage: str | None) -> dict[str, Tensor]:
        """Trainable elements of a stage, `sft` or `rl`."""
        if stage not in STAGES:
            raise UserError(f"stage must be sft or rl, got {stage!r}")
        return getattr(self, stage)

    def active_share(self, stage: str) -> float:
        """Share of the adapter's elements that a stage trains (an offset's columns not counted)."""
        flat = _flat(list(self.trainable(self.masks(stage)).values()))
        return int(flat.sum()) / flat.numel()

    def trainable(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masks without an initial offset's columns, which belong to no system and no stage."""
        return cut(masks, self.meta.get("trainable_rank"))

    def jaccard(self) -> float:
        """Overlap of the two systems' sets: |shared| / |either|."""
        return jaccard(list(self.system1.values()), list(self.system2.values()))

    def counts(self) -> dict[str, int]:
        """Elements that are System 1 only, System 2 only, shared, in neither; and all of them."""
        one, two = (
            _flat(list(self.trainable(masks).values())) for masks in (self.system1, self.system2)
        )
        both, either = int((one & two).sum()), int((one | two).sum())
        return {
            "system1_only": int(one.sum()) - both,
            "system2_only": int(two.sum()) - both,
            "shared": both,
            "neither": one.numel() - either,
            "all": one.numel(),
        }

    def check_model(self, model: nn.Module, adapter: str = "default") -> None:
        """Raises UserError unless names and shapes are those of the model's adapter."""
        shapes = {n: list(p.shape) for n, p in adapter_parameters(model, adapter).items()}
        wrong = [f"{n}: only in the partition" for n in self.sft if n not in shapes]
        wrong += [f"{n}: only in the model" for n in shapes if n not in self.sft]
        wrong += [
            f"{n}: {list(self.sft[n].shape)} in the partition, {shape} in the model"
            for n, shape in shapes.items()
            if n in self.sft and list(self.sft[n].shape) != shape
        ]
        if wrong:
            shown = "\n  ".join(wrong[:8]) + (f"\n  and {len(wrong) - 8} more" * (len(wrong) > 8))
            raise UserError(f"the partition is of another model or adapter:\n  {shown}")

    def layer_masks(self, model: nn.Module, stage: str | None) -> dict[str, LoraMask]:
        """`LoraMask` by module name of the model."""
        masks, layers = self.masks(stage), {}
        live = self.meta.get("live")
        for name, _ in model.named_modules():
            key = base_name(name)
            if f"{key}.lora_A.weight" in masks:
                columns = torch.tensor(live[key], dtype=torch.bool) if live else None
                layers[name] = LoraMask(
                    masks[f"{key}.lora_A.weight"], masks[f"{key}.lora_B.weight"], live=columns
                )
        return layers

    def save(self, path: Path) -> None:
        """Writes packed bits with names, shapes and `meta`, whole or not at all."""
        tensors, shapes = {}, {}
        for kind in _SETS:
            for name, mask in getattr(self, kind).items():
                tensors[f"{kind}/{name}"] = pack_bits(mask).cpu()
                shapes[name] = list(mask.shape)
        meta = {"lorapar": json.dumps({"format": 1, "shapes": shapes, **self.meta})}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=meta)

    @classmethod
    def load(cls, path: str | Path) -> "Partition":
        """Reads what `save` wrote. UserError if it is no such file."""
        try:
            with safe_open(path, framework="pt") as f:
                meta = json.loads((f.metadata() or {}).get("lorapar", "{}"))
                shapes = meta.pop("shapes", None)
                if shapes is None or meta.pop("format", None) != 1:
                    raise UserError(f"{path}: not a partition made by this version of lorapar")
                sets = {
                    kind: {
                        n: unpack_bits(f.get_tensor(f"{kind}/{n}"), s) for n, s in shapes.items()
                    }
                    for kind in _SETS
                }
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{path}: not a readable partition ({e}); rerun `lorapar partition`"
            ) from None
        return cls(**sets, meta=meta)


def make_partition(
    scores1: dict[str, Tensor],
    scores2: dict[str, Tensor],
    settings: PartitionSettings,
    meta: dict[str, Any] | None = None,
) -> Partition:
    """Both systems' sets and both stages' masks from the scores of one adapter.

    Args:
        scores1, scores2: importance for System 1 and System 2 by parameter name, same shapes.
        settings: θ, the shared fractions, element or column granularity, one cut or one a layer.
        meta: kept in the file.

    Raises:
        UserError: the two have other names or shapes.
        ValueError: scores that cannot be selected from (lorapar_kernels.select_by_mass).
    """
    if {n: s.shape for n, s in scores1.items()} != {n: s.shape for n, s in scores2.items()}:
        raise UserError("partition: the two systems' scores are of different adapters")
    by_column = settings.granularity == "column"
    one, two = (columns(s) if by_column else s for s in (scores1, scores2))
    two = {name: two[name] for name in one}
    names, scores = list(one), [list(s.values()) for s in (one, two)]
    kept = [_flat(_select(s, settings)) for s in (one, two)]
    shared = kept[0] & kept[1]
    stages = [
        own & ~shared | _flat(select_top(s, _like(shared, s), fraction, names=names))
        for own, s, fraction in zip(kept, scores, (settings.shared_in_sft, settings.shared_in_rl))
    ]
    named = [dict(zip(names, _like(flat, scores[0]))) for flat in (*kept, *stages)]
    meta = dict(meta or {})
    if by_column:
        if settings.drop_unselected:
            meta["live"] = {n: (named[0][n] | named[1][n]).tolist() for n in one}
        named = [spread(masks, scores1) for masks in named]
    return Partition(*named, meta=meta)


def select(scores: dict[str, Tensor], settings: PartitionSettings) -> dict[str, Tensor]:
    """One system's set by parameter name, as `make_partition` chooses it."""
    if settings.granularity != "column":
        return dict(zip(scores, _select(scores, settings)))
    by_layer = columns(scores)
    return spread(dict(zip(by_layer, _select(by_layer, settings))), scores)


def _select(scores: dict[str, Tensor], settings: PartitionSettings) -> list[Tensor]:
    """One system's set, in the order of `scores`: one cut for all, or one for each layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, s in scores.items():
        layer = name.partition(".lora_")[0] if settings.per_layer else ""
        layers.setdefault(layer, {})[name] = s
    kept, empty = {}, []
    for of in layers.values():
        if (
            settings.per_layer
            and 0.0 < settings.theta < 1.0
            and not any(map(torch.any, of.values()))
        ):
            masks = [torch.zeros_like(s, dtype=torch.bool) for s in of.values()]
            empty.append(of)
        else:
            masks = select_by_mass(list(of.values()), settings.theta, names=list(of))
        kept |= zip(of, masks)
    if empty and len(empty) == len(layers):
        raise ValueError("per_layer: all scores of all layers are zero, so no share can be taken")
    return [kept[name] for name in scores]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """`flat` cut into the shapes of the tensors."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors)]


def columns(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Importance of rank columns by layer, [r]: row k of A plus column k of B."""
    layers = [n.removesuffix(".lora_A.weight") for n in scores if n.endswith(".lora_A.weight")]
    return {
        n: scores[f"{n}.lora_A.weight"].sum(1) + scores[f"{n}.lora_B.weight"].sum(0) for n in layers
    }


def spread(masks: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Column masks [r] by layer as element masks by parameter."""
    out = {}
    for name, scores in like.items():
        layer, _, side = name.removesuffix(".weight").rpartition(".")
        mask = masks[layer]
        out[name] = (mask[:, None] if side == "lora_A" else mask[None, :]).expand(scores.shape)
    return {n: m.contiguous() for n, m in out.items()}


def everything(model: nn.Module, trainable_rank: int | None = None) -> Partition:
    """A partition that trains the whole adapter, but for columns from `trainable_rank` on."""
    ones = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in adapter_parameters(model).items()}
    masks = freeze_offset(ones, trainable_rank)
    return Partition(masks, masks, masks, masks, meta={"trainable_rank": trainable_rank})


def freeze_offset(masks: dict[str, Tensor], trainable_rank: int | None) -> dict[str, Tensor]:
    """The masks without rank columns from `trainable_rank` on: an offset, never trained."""
    if trainable_rank is None:
        return masks
    out = {}
    for name, mask in masks.items():
        mask = mask.clone()
        if ".lora_A." in name:
            mask[trainable_rank:] = False
        else:
            mask[:, trainable_rank:] = False
        out[name] = mask
    return out


def jaccard(one: list[Tensor], two: list[Tensor]) -> float:
    """|both| / |either| over lists of bool tensors; 1 where both are empty."""
    one, two = _flat(one), _flat(two)
    either = int((one | two).sum())
    return int((one & two).sum()) / either if either else 1.0


def adapter_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """lora_A and lora_B weights by their name in the base model, in the model's order."""
    found = {}
    for name, p in model.named_parameters():
        for side in ("lora_A", "lora_B"):
            middle = f".{side}.{adapter}.weight"
            if name.endswith(middle):
                found[f"{base_name(name.removesuffix(middle))}.{side}.weight"] = p
    return found


def base_name(module_name: str) -> str:
    """The module's name in the base model: without PEFT's, DDP's and torch.compile's wrappers."""
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        module_name = module_name.removeprefix(prefix)
    return module_name


def settings_and_inputs(config: Config) -> tuple[dict, dict[str, str]]:
    """What the partition stage depends on."""
    path = Run(config).need("importance.safetensors", "score")
    settings = {"partition": config.partition}
    return settings, {"importance.safetensors": file_digest(path)}


def partition(config: Config) -> dict[str, Any]:
    """importance.safetensors → partition.safetensors. Returns the summary for a table.

    Raises:
        UserError: no scores yet, or scores that are stale.
    """
    from lorapar import lineage
    from lorapar.importance import load_scores
    from lorapar.models import device

    if config.partition is None:
        raise UserError("partition: masks are off (partition: null); nothing to do")
    run = Run(config)
    settings, inputs = settings_and_inputs(config)
    lineage.check(config, "partition")
    scores1, scores2, meta = load_scores(run.path("importance.safetensors"))
    meta |= {"partition": vars(config.partition), **inputs}
    rank, where = meta.get("trainable_rank"), device()
    both = ({n: s.to(where) for n, s in cut(of, rank).items()} for of in (scores1, scores2))
    try:
        made = make_partition(*both, config.partition, meta)
    except ValueError as e:
        raise UserError(f"{run.path('importance.safetensors')}: {e}") from None
    made = _padded(made, scores1)
    made.save(run.path("partition.safetensors"))
    run.finish("partition", settings, inputs, ["partition.safetensors"])
    return summary(made)


def summary(made: Partition) -> dict[str, Any]:
    """Shares and overlap, with the null control where it was measured at this θ."""
    null, settings = made.meta.get("null_jaccard", {}), made.meta["partition"]
    rule = ("theta", "granularity", "per_layer")
    same = all(null.get(key) == settings.get(key) for key in rule)
    told = {"rule": "one cut a layer, not the paper's"} if settings.get("per_layer") else {}
    return {
        **told,
        **made.counts(),
        "active_sft": made.active_share("sft"),
        "active_rl": made.active_share("rl"),
        "jaccard": made.jaccard(),
        "null_jaccard": {s: null[s] for s in ("system1", "system2")} if same else None,
    }


def cut(tensors: dict[str, Tensor], rank: int | None) -> dict[str, Tensor]:
    """The first `rank` rank columns of each tensor, by parameter name; all of them for None."""
    if rank is None:
        return tensors
    return {n: t[:rank] if ".lora_A." in n else t[:, :rank] for n, t in tensors.items()}


def _padded(made: Partition, like: dict[str, Tensor]) -> Partition:
    """Masks of the trainable columns in the adapter's full shape; the rest is frozen, and live."""
    grown = []
    for kind in _SETS:
        masks = {}
        for name, mask in getattr(made, kind).items():
            full = torch.zeros(like[name].shape, dtype=torch.bool)
            full[tuple(slice(n) for n in mask.shape)] = mask.cpu()
            masks[name] = full
        grown.append(masks)
    if live := made.meta.get("live"):
        for layer, flags in live.items():
            flags += [True] * (like[f"{layer}.lora_A.weight"].shape[0] - len(flags))
    return Partition(*grown, meta=made.meta)
