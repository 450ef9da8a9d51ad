"""Loading: base model, tokenizer, adapter. One precision policy for every stage."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorapar import ranks
from lorapar.config import Config
from lorapar.defaults import ADAPTER_DEFAULTS
from lorapar.errors import UserError, check_keys

log = logging.getLogger("lorapar")


def model_digest(name: str) -> str | None:
    """What tells a local model from another at the same path: names, sizes and the first MiB of its
    files. None for a name on the hub."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    h = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        h.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as f:
            h.update(f.read(1 << 20))
    return h.hexdigest()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def base_dtype() -> torch.dtype:
    """bf16 on a GPU that has it, fp32 on a CPU. Adapters are fp32 everywhere."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_base(config: Config) -> PreTrainedModel:
    """The base model on its device; on the CPU under FSDP, where whoever uses it spreads it.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=base_dtype())
    except (OSError, ValueError) as e:
        raise UserError(
            f"model: {config.model!r} cannot be loaded ({str(e).splitlines()[0][:200]}); expected "
            f"a folder with config.json and weights, or a model's name on the hub"
        ) from None
    return model if ranks.sharded() else model.to(device())


def load_tokenizer(config: Config) -> Any:
    """The tokenizer, padding on the left as generation needs; EOS pads where no pad token is."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
    except (OSError, ValueError) as e:
        raise UserError(
            f"model: no tokenizer at {config.model!r} ({str(e).splitlines()[0][:200]})"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer of {config.model!r} has no EOS token; one is needed")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lora_config(config: Config, **changes: Any) -> LoraConfig:
    """PEFT's configuration from the section `adapter` over our defaults."""
    check_keys("adapter", config.adapter, LoraConfig.__dataclass_fields__)
    return LoraConfig(**{**ADAPTER_DEFAULTS, **config.adapter, **changes})


def add_adapter(base: PreTrainedModel, settings: LoraConfig) -> PeftModel:
    """A PEFT model with fp32 adapters. UserError if nothing is targeted or PEFT refuses."""
    try:
        return get_peft_model(base, settings)
    except ValueError as e:
        raise UserError(f"adapter: {str(e).splitlines()[0]}") from None


def load_adapter(config: Config, path: Path, *, trainable: bool = False) -> PeftModel:
    """The base model with the adapter saved at `path`."""
    try:
        return PeftModel.from_pretrained(load_base(config), path, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(
            f"{path}: no adapter for {config.model!r}: {str(e).splitlines()[0]}"
        ) from None
