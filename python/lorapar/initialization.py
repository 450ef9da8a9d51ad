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
from torch.distributed.tensor import DTensor

from lorapar.config import Config
from lorapar.errors import UserError
from lorapar.models import add_adapter, load_base, lora_config, model_digest
from lorapar.partitioning import adapter_parameters, cut
from lorapar.runs import Run, file_digest, whole_folder

STD = 0.01
OFFSET_INITS = ("paper_offset", "pissa", "olora")
_RECORD = "lorapar.json"


def initial_adapter(config: Config) -> PeftModel:
    """The base model with the run's initial adapter; same seed, same bits on the same machine."""
    rank = lora_config(config).r
    torch.manual_seed(config.seed)
    if config.init == "orthogonal":
        return add_adapter(load_base(config), lora_config(config, init_lora_weights="orthogonal"))
    if config.init == "paper":
        model = add_adapter(load_base(config), lora_config(config))
        return _fill(model, _normal(config, model, None))
    _refuse_patterns(config)
    start = {} if config.init == "paper_offset" else _decomposed(config)
    settings = lora_config(config)  # rank 2r at the same scale
    factor = 2**0.5 if settings.use_rslora else 2
    doubled = {"r": 2 * rank, "lora_alpha": factor * settings.lora_alpha}
    model = add_adapter(load_base(config), lora_config(config, **doubled))
    start = start or _normal(config, model, rank)
    return _fill(model, {n: _with_offset(n, t) for n, t in start.items()})


def _decomposed(config: Config) -> dict[str, torch.Tensor]:
    """A and B as PEFT makes them from W. It changes the base too, which is therefore dropped."""
    made = add_adapter(load_base(config), lora_config(config, init_lora_weights=config.init))
    return {n: p.detach().cpu().clone() for n, p in adapter_parameters(made).items()}


def _normal(config: Config, model: PeftModel, rank: int | None) -> dict[str, torch.Tensor]:
    """A and B ~ N(0, 0.01²) of the first `rank` columns, drawn on the CPU in the model's order."""
    generator = torch.Generator().manual_seed(config.seed)
    shapes = cut({n: p.detach() for n, p in adapter_parameters(model).items()}, rank)
    return {n: torch.randn(t.shape, generator=generator) * STD for n, t in shapes.items()}


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


def initial_digest(config: Config) -> str:
    """sha256 of the initial adapter. UserError if it is missing or of other settings."""
    run = Run(config)
    folder = run.need("init", "score" if config.partition is not None else "sft")
    run.check("init", initial_settings(config), {})
    return adapter_digest(folder)


def initial_settings(config: Config) -> dict:
    """What the initial adapter depends on."""
    return {
        "model": config.model,
        "model_digest": model_digest(config.model),
        "adapter": config.adapter,
        "init": config.init,
        "seed": config.seed,
    }


def trainable_rank(config: Config) -> int | None:
    """How many leading rank columns train; None means all."""
    return lora_config(config).r if config.init in OFFSET_INITS else None


def save_adapter(
    model: PeftModel, folder: Path, whole: dict[str, torch.Tensor] | None = None
) -> None:
    """Adapter weights and configuration alone, readable by PEFT without this package.

    `whole` has the weights of a model whose own are shards.
    """
    options = {} if whole is None else {"state_dict": whole}
    model.save_pretrained(folder, selected_adapters=["default"], **options)


def whole_adapter(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """Under FSDP, what PEFT saves of the adapter, whole and on the host; else None.

    All ranks call it together.
    """
    state = model.state_dict()  # biases for `bias` of LoraConfig
    saved = {n: t for n, t in state.items() if ".default" in n or n.endswith("bias")}
    if not any(isinstance(t, DTensor) for t in saved.values()):
        return None
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).cpu() for n, t in saved.items()}


def adapter_digest(folder: Path) -> str:
    """sha256 of an adapter's weights."""
    return file_digest(folder / "adapter_model.safetensors")


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
