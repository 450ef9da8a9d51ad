"""The adapter a run starts from, saved as an ordinary PEFT adapter of the original base.

`paper` draws A and B from N(0, 0.01²), so the model moves a little before any training.
`paper_offset`, `pissa` and `olora` start exactly at the base model: the saved adapter has rank 2r,
A = [A₁; A₀], B = [B₁, −B₀] with A₁ = A₀ and B₁ = B₀ at first, and only the first r columns train.
`orthogonal` is PEFT's own, where B A = 0 although neither is zero.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel

from lorapar.config import Config
from lorapar.errors import UserError
from lorapar.models import add_adapter, load_base, lora_config
from lorapar.partitioning import adapter_parameters
from lorapar.runs import Run, file_digest, whole_folder

STD = 0.01
OFFSET_INITS = ("paper_offset", "pissa", "olora")
_RECORD = "lorapar.json"


def initial_adapter(config: Config) -> PeftModel:
    """The base model with the run's initial adapter; same seed, same bits on the same machine."""
    rank = lora_config(config).r
    if config.init == "paper":
        return _fill(_fresh(config), _normal(config, rank))
    if config.init == "orthogonal":
        torch.manual_seed(config.seed)
        return add_adapter(load_base(config), lora_config(config, init_lora_weights="orthogonal"))
    _refuse_patterns(config)
    if config.init == "paper_offset":
        start = _normal(config, rank)
    else:  # PEFT makes A and B (and changes the base, which is therefore loaded anew)
        torch.manual_seed(config.seed)
        made = add_adapter(load_base(config), lora_config(config, init_lora_weights=config.init))
        start = {n: p.detach().cpu().clone() for n, p in adapter_parameters(made).items()}
    return _fill(_fresh(config, double=True), {n: _with_offset(n, t) for n, t in start.items()})


def ensure_initial(config: Config) -> Path:
    """The folder `init/` of the run, made if it is missing or of other settings."""
    run = Run(config)
    settings = initial_settings(config)
    if run.stale("init", settings, {}) is None:
        return run.path("init")
    model = initial_adapter(config)
    offset = config.init in OFFSET_INITS
    rank = lora_config(config).r
    with whole_folder(run.path("init")) as folder:
        save_adapter(model, folder)
        (folder / _RECORD).write_text(
            json.dumps({"init": config.init, "trainable_rank": rank if offset else None})
        )
    run.finish("init", settings, {}, ["init"])
    return run.path("init")


def initial_settings(config: Config) -> dict:
    """What the initial adapter depends on."""
    return {
        "model": config.model,
        "adapter": config.adapter,
        "init": config.init,
        "seed": config.seed,
    }


def trainable_rank(config: Config) -> int | None:
    """How many leading rank columns train; None means all."""
    return lora_config(config).r if config.init in OFFSET_INITS else None


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Adapter weights and configuration alone, readable by PEFT without this package."""
    model.save_pretrained(folder, selected_adapters=["default"])


def adapter_digest(folder: Path) -> str:
    """sha256 of an adapter's weights."""
    return file_digest(folder / "adapter_model.safetensors")


def _fresh(config: Config, double: bool = False) -> PeftModel:
    changes = {"init_lora_weights": True}
    if double:  # rank 2r at the same scale
        settings = lora_config(config)
        factor = 2**0.5 if settings.use_rslora else 2
        changes |= {"r": 2 * settings.r, "lora_alpha": factor * settings.lora_alpha}
    torch.manual_seed(config.seed)
    return add_adapter(load_base(config), lora_config(config, **changes))


def _normal(config: Config, rank: int) -> dict[str, torch.Tensor]:
    """A and B ~ N(0, 0.01²) for every adapted layer, drawn on the CPU in the model's order."""
    generator = torch.Generator().manual_seed(config.seed)
    model = _fresh(config)
    return {
        n: torch.randn(p.shape, generator=generator) * STD
        for n, p in adapter_parameters(model).items()
    }


def _with_offset(name: str, t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t]) if ".lora_A." in name else torch.cat([t, -t], dim=1)


@torch.no_grad()
def _fill(model: PeftModel, values: dict[str, torch.Tensor]) -> PeftModel:
    for name, p in adapter_parameters(model).items():
        p.copy_(values[name])
    return model


def _refuse_patterns(config: Config) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        if config.adapter.get(key):
            raise UserError(
                f"adapter.{key} cannot be combined with init: {config.init}, which doubles the "
                f"rank; use init: paper or orthogonal"
            )
