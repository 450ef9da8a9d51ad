"""One of several scoring processes: torchrun score_ranks.py OUT CONFIG.

Writes the sums of every case, how a failure on another rank ends, and the stage's summary.
"""

import dataclasses
import sys

import torch
import torch.distributed as dist
from conftest import make_lora, make_tiny_model

from lorapar import config as configuration
from lorapar import importance
from lorapar.importance import Example, accumulate, accumulate_each

EXAMPLES = [Example([1, *range(5, 5 + n)], [*range(40, 50 - n), 2]) for n in range(5)]
BROKEN = [EXAMPLES[0], Example([1], [10**6]), *EXAMPLES[1:]]  # no such token, on rank 1 of 2
CASES = {  # parts and options
    "padded": ([EXAMPLES], {"batch_size": 2}),
    "packed": ([EXAMPLES], {"batch_size": 16, "packed": True, "gradient_checkpointing": True}),
    "one example": ([EXAMPLES[:1]], {}),
    "parts": ([EXAMPLES[:3], EXAMPLES], {"batch_size": 2}),
    "parts of one": ([EXAMPLES[:1], EXAMPLES[1:2], EXAMPLES[3:4]], {}),
}


def model():
    return make_lora(make_tiny_model(), init_std=0.3)


def sums_of(case: str) -> list[importance.Sums]:
    parts, options = CASES[case]
    done = [0] * len(parts)

    def advance(n: int, part: int) -> None:
        done[part] += n

    sums = accumulate_each(model(), parts, advance=advance, **options)
    assert done == [len(part) for part in parts], done
    return sums


def main(out: str, config: str) -> None:
    dist.init_process_group("gloo")
    results = {case: [dataclasses.asdict(s) for s in sums_of(case)] for case in CASES}
    try:
        accumulate(model(), BROKEN)
    except Exception as e:
        results["broken"] = f"{type(e).__name__}: {e}"
    results["summary"] = importance.score(configuration.load(config))
    torch.save(results, f"{out}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
