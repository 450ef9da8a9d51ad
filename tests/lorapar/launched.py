"""`lorapar` in one of several processes: torchrun launched.py ARGUMENTS.

accelerate shards on GPUs alone; on a CPU what it asks is answered otherwise here.
With DIE=RANK:STEP in the environment, that process is killed after that training step; with FP32=1
the base is in fp32 on a GPU too.
"""

import os
import signal
import sys

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import TrainerCallback

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # as `accelerate launch` sets them
_prepare_backend = PartialState._prepare_backend


def spread(**fsdp: str) -> None:
    """From now on accelerate spreads models by FSDP 2 with these settings, or by DDP without."""
    for name in [n for n in os.environ if n.startswith("FSDP_")] + ["ACCELERATE_USE_FSDP"]:
        os.environ.pop(name, None)
    os.environ.update(fsdp)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._prepare_backend = _prepare_backend
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if fsdp and not torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *unused: ("gloo", DistributedType.MULTI_GPU)


class AfterStep(TrainerCallback):
    """Calls a function after one training step."""

    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def add_to_trainers(callback: TrainerCallback | None) -> None:
    """Every trainer of a stage gets the callback from now on."""
    from lorapar import stages
    from lorapar.callback import LoraParCallback

    class Attached(LoraParCallback):
        def attach(self, trainer):
            if callback is not None:
                trainer.add_callback(callback)
            return super().attach(trainer)

    stages.LoraParCallback = Attached


def main() -> None:
    from lorapar import cli, models

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        spread(**{n: v for n, v in os.environ.items() if n.startswith(("FSDP_", "ACCELERATE_USE"))})
    if os.environ.get("FP32"):
        models.base_dtype = lambda: torch.float32
    rank, _, step = os.environ.get("DIE", "").partition(":")
    if rank == os.environ["RANK"]:
        add_to_trainers(AfterStep(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL)))
    sys.argv[0] = "lorapar"
    cli.main()


if __name__ == "__main__":
    main()
