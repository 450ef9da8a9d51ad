"""Stages on several processes: torchrun stage_ranks.py FOLDER CASE...

FOLDER/CASE.yaml is a run whose adapter is scored. To FOLDER/CASE.RANK goes what each stage said.
"""

import sys
from pathlib import Path

import torch
import trl
from launched import FSDP, AfterStep, add_to_trainers, spread

from lorapar import config as configuration
from lorapar import models, ranks, stages

STOP = 3  # steps; a checkpoint is written after the second
REPLICATED = {"FSDP_IGNORED_MODULES": ".*lora_[AB].*", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
FULL = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


class Stopped(Exception):
    pass


def stop() -> None:
    raise Stopped


def reward(prompts, completion_ids, **columns) -> list[float]:
    """Differs within each group."""
    return [(7 * len(prompt) + sum(ids)) % 5 / 4 for prompt, ids in zip(prompts, completion_ids)]


def made(self, prompt_ids, images, multimodal_fields, num_generations, **unused):
    """Completions that follow from the prompt and the place in its group."""
    place = [i % num_generations for i in range(len(prompt_ids))]
    return [[5 + sum(p) % 50 + i, 60 + 3 * i, 2] for p, i in zip(prompt_ids, place)], None


def stopped(config) -> None:
    """SFT that ends in the middle, with a checkpoint."""
    add_to_trainers(AfterStep(STOP, stop))
    try:
        stages.sft(config)
    except Stopped:
        return
    finally:
        add_to_trainers(None)
    raise AssertionError("it was not stopped")


def both(config) -> dict:
    trl.GRPOTrainer._generate_single_turn = made
    return {"sft": stages.sft(config), "rl": stages.rl(config)}


def generated(config) -> dict:
    """RL with completions of its own, and how many tokens the longest of each step has here."""
    longest = []

    def noted(*args, **options):
        ids, logprobs = _generate(*args, **options)
        longest.append(max(map(len, ids)))
        return ids, logprobs

    trl.GRPOTrainer._generate_single_turn = noted
    return {"rl": stages.rl(config, start="init"), "longest": longest}


def sft(config) -> dict:
    return {"sft": stages.sft(config)}


def stopped_and_resumed(config) -> dict:
    stopped(config)
    return sft(config)


_generate = trl.GRPOTrainer._generate_single_turn
LONG = {"ddp, long": ({}, sft), "fsdp, long": (FSDP, sft)}  # with a run of their own
CASES = {  # name → settings of FSDP, and what is done
    "ddp": ({}, both),
    "ddp, stopped": ({}, stopped),
    "ddp, resumed": ({}, sft),
    "fsdp": (FSDP, both),
    "fsdp, generated": (FSDP, generated),
    "fsdp, stopped": (FSDP, stopped_and_resumed),
    "fsdp, whole checkpoints": (FSDP | FULL, stopped_and_resumed),
    "fsdp, dropped": (FSDP, sft),
    "fsdp, replicated": (FSDP | REPLICATED, stopped_and_resumed),
    "fsdp, to go on alone": (FSDP, stopped),
    "fsdp, alone": (FSDP, sft),
}


def in_fp32() -> None:
    """Bases on a GPU too: what is compared is the order of adding, not rounding to 16 bits."""
    models.base_dtype = lambda: torch.float32


def main(folder: Path, *cases: str) -> None:
    in_fp32()
    for name in cases:  # one group serves them all
        fsdp, act = (CASES | LONG)[name]
        spread(**fsdp)
        said = act(configuration.load(folder / f"{name}.yaml"))
        torch.save(said, folder / f"{name}.{ranks.rank()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
