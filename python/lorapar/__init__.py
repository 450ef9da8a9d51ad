"""LoRA-PAR on PEFT and TRL: accelerate, label, score, partition, sft, rl, evaluate, report."""

from lorapar_kernels import __version__

# name → module; loaded on first use, so that `import lorapar` stays light.
_EXPORTS = {
    "BucketCollator": "buckets",
    "Config": "config",
    "LoraParCallback": "callback",
    "Partition": "partitioning",
    "Report": "patch",
    "UserError": "errors",
    "accelerate": "patch",
    "evaluate": "evaluation",
    "label": "labels",
    "load_config": "config",
    "merge_rollouts": "generation",
    "merged_for_generation": "generation",
    "merged_kl": "generation",
    "partition": "partitioning",
    "report": "reporting",
    "restore": "patch",
    "rl": "stages",
    "run": "pipeline",
    "score": "importance",
    "sft": "stages",
}

__all__ = ["__version__", *sorted(_EXPORTS)]  # noqa: PLE0604


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lorapar' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"lorapar.{_EXPORTS[name]}")
    return getattr(module, "load" if name == "load_config" else name)


def __dir__():
    return __all__
