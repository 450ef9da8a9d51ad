"""One of several processes that share scoring and evaluation: python sharded_ranks.py OUT CONFIG.

The launcher's variables say which. To OUT.RANK goes what each case gave; then rank 1 fails while
rank 0 waits for its shards. On GPUs each process has one, and NCCL; else they have the CPU, and
gloo.
"""

import dataclasses
import faulthandler
import os
import sys
from types import SimpleNamespace

import torch
from conftest import DEVICE, make_lora, make_tiny_model
from score_ranks import EXAMPLES

from lorapar import config as configuration
from lorapar import evaluation, importance, models, ranks
from lorapar.errors import UserError
from lorapar.importance import accumulate
from lorapar.patch import accelerate
from lorapar.sharding import shard_base

# Of five examples rank 1 of 2 has two: fewer batches, the last of them empty; of one, none.
SCORED = {
    "uneven": (EXAMPLES, {"batch_size": 1}),
    "packed": (EXAMPLES, {"batch_size": 2, "packed": True, "gradient_checkpointing": True}),
    "one example": (EXAMPLES[:1], {}),
}
PROMPTS = [[1, 7, 8, 9, 30], [1, 5, 9], [1, 40], [1, 11, 12, 13, 14, 15, 16], [1, 77, 3, 60]]
FOLDERS = ("plain", "sharded", "without")  # `without` RAM-efficient loading


def model():
    return make_lora(make_tiny_model(), init_std=0.3).to(DEVICE)


def ending() -> SimpleNamespace:
    """A tokenizer whose end is the third token of one completion: the ranks end at other steps."""
    made = model().generate(
        input_ids=torch.tensor([PROMPTS[2]], device=DEVICE), max_new_tokens=3, do_sample=False
    )
    decode = lambda ids, **options: str(ids.tolist())  # noqa: E731
    return SimpleNamespace(pad_token_id=0, eos_token_id=int(made[0, -1]), decode=decode)


def generated(model, **options) -> list[str]:
    return evaluation.generate(
        model, ending(), PROMPTS, max_new_tokens=12, batch_size=2, deal=True, **options
    )


def as_loaded(how: str):
    """The model as it is before it is sharded: on other ranks without weights, or with others."""
    made = model().cpu()
    if ranks.rank() > 0:
        if how == "meta":
            return made.to("meta")
        with torch.no_grad():
            for t in (*made.parameters(), *made.buffers()):
                t.fill_(float("nan"))
    return made


def sharded(how: str = "meta"):
    made = as_loaded(how)
    shard_base(made)
    return made


def run(config, folder: str) -> dict:
    """Both stages, in a folder of their own beside the configuration's."""
    config = dataclasses.replace(config, run_dir=f"{config.run_dir}-{folder}")
    return {"score": importance.score(config), "eval": evaluation.evaluate(config)}


def failing(count: int) -> None:
    raise UserError("no more")


def main(out: str, config: str) -> None:
    models.base_dtype = lambda: torch.float32  # on a GPU too: other batches, other roundings
    config, results, done = configuration.load(config), {}, []
    with ranks.group():
        whole = model()
        accelerate(whole)
        results["plain generated"] = generated(whole, advance=done.append)
        results["done"] = done
        results["plain"] = run(config, "plain")
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        for case, (examples, options) in SCORED.items():
            one = sharded("nan" if case == "packed" else "meta")
            sums = accumulate(one, examples, **options)
            results[case] = (sums.g, sums.g_squared)
        spread = sharded()
        accelerate(spread)
        results["generated"] = generated(spread)
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
        results["sharded"] = run(config, "sharded")
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        results["without"] = run(config, "without")
        torch.save(results, f"{out}.{ranks.rank()}")
        accumulate(sharded(), EXAMPLES, batch_size=1, advance=failing if ranks.rank() else print)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)  # one that hangs says where
    main(*sys.argv[1:])
