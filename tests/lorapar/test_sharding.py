"""Scoring and evaluation by several processes are those of one, the base whole or sharded."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import several
import sharded_ranks
import torch
from conftest import DEVICE, make_lora, make_tiny_model
from parallel_ranks import biased
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lorapar import evaluation, importance, models, ranks
from lorapar.config import Config, Data, Eval, PartitionSettings, Score
from lorapar.importance import accumulate, load_scores
from lorapar.initialization import save_adapter, whole_adapter
from lorapar.partitioning import make_partition
from lorapar.patch import accelerate
from lorapar.sharding import is_sharded, shard_base
from lorapar_kernels.testing import assert_close

ROWS = [
    {"id": f"{system}-{i}", "question": f"What is {'1 + ' * i}{i}?",
     "answer": f"{i} + 1\n#### {i + 1}", "system": system}
    for system in ("system1", "system2")
    for i in range(7)
]  # fmt: skip
FEW = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs, or none"
)


@pytest.fixture
def config(tiny_folder, tmp_path, monkeypatch):
    """Labels, test rows and a trained adapter, in a folder for each way to run."""
    monkeypatch.setattr(models, "base_dtype", lambda: torch.float32)
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for folder in (run, *(f"{run}-{name}" for name in sharded_ranks.FOLDERS)):
        folder = Path(folder)
        folder.mkdir()
        shutil.copy(data, folder / "labels.jsonl")
        make_lora(make_tiny_model(), init_std=0.3).save_pretrained(folder / "sft")
    return Config(
        model=str(tiny_folder),
        data=Data(str(data), test=str(data), test_rows=7),
        adapter={"r": 2},
        score=Score(examples=5, batch_size=2),
        eval=Eval(batch_size=3, max_new_tokens=6),
        run_dir=str(run),
    )


def launched(out: str, config: str) -> list[dict]:
    """What each of two processes wrote, of which the second fails in the end."""
    _, said = several.ended(several.start(sharded_ranks.__file__, out, config))
    assert said.rstrip().endswith("UserError: no more"), said
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


def scores_of(run_dir: str):
    return load_scores(Path(run_dir) / "importance.safetensors")[:2]


def differing(one, other) -> tuple[int, int]:
    """How many elements two partitions see otherwise, of how many."""
    count = total = 0
    for kind in ("system1", "system2", "sft", "rl"):
        for n, mask in getattr(one, kind).items():
            count += int((mask != getattr(other, kind)[n]).sum())
            total += mask.numel()
    return count, total


@FEW
@pytest.mark.slow
def test_two_processes_are_as_one(config, tmp_path):
    whole = sharded_ranks.model()
    sums = {
        case: accumulate(whole, examples, **options)
        for case, (examples, options) in sharded_ranks.SCORED.items()
    }
    accelerate(whole)
    texts = sharded_ranks.generated(whole)
    assert len({len(t) for t in texts}) > 1, texts  # they end at different steps
    summary, results = importance.score(config), evaluation.evaluate(config)
    assert results.keys() == {"base", "sft"}
    assert results["base"]["samples"] != results["sft"]["samples"]
    alone = scores_of(config.run_dir)

    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    found = launched(str(tmp_path / "out"), str(file))
    for rank in found:
        for case, of in sums.items():
            for kind, (expected, got) in enumerate(zip((of.g, of.g_squared), rank[case])):
                for n, t in expected.items():
                    assert_close(f"{case}: {kind} of {n}", got[n], t)
        assert rank["plain generated"] == rank["generated"] == texts
        for name in sharded_ranks.FOLDERS:
            assert rank[name]["eval"] == results, name
            for key in ("examples", "skipped", "halves"):
                assert rank[name]["score"][key] == summary[key]
    assert sum(found[0]["done"]) == len(sharded_ranks.PROMPTS)
    for name in sharded_ranks.FOLDERS:
        folder = Path(f"{config.run_dir}-{name}")
        assert json.loads((folder / "eval.json").read_text()) == results
        assert (folder / "eval.json").read_text() == Path(config.run_dir, "eval.json").read_text()
        scores = scores_of(f"{config.run_dir}-{name}")
        for expected, got in zip(alone, scores):
            for n, t in expected.items():
                assert_close(f"{name}: {n}", got[n], t)
        settings = PartitionSettings(theta=0.9)
        count, total = differing(
            make_partition(*alone, settings), make_partition(*scores, settings)
        )
        print(f"{name}: {count} of {total} elements of the partition differ")
        assert count <= total // 1000


def test_a_group_of_one(config, monkeypatch):
    """As `accelerate launch` with FSDP starts it on one GPU: sharded, into one piece."""
    summary, results = importance.score(config), evaluation.evaluate(config)
    alone = scores_of(config.run_dir)
    flags = dict.fromkeys(("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"), "true")
    for name, value in {**several.launch(1), **flags, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    seen = []

    def watched(model):
        shard_base(model)
        seen.append(is_sharded(model))

    for module in (importance, evaluation):
        monkeypatch.setattr(module, "shard_base", watched)
    config = dataclasses.replace(config, run_dir=f"{config.run_dir}-plain")
    try:
        assert importance.score(config) == summary
        assert evaluation.evaluate(config) == results  # in the same group
    finally:
        ranks._leave()
    assert seen == [True] * 3
    for expected, got in zip(alone, scores_of(config.run_dir)):
        for n, t in expected.items():
            assert_close(n, got[n], t)


def test_biases_that_train_are_saved_from_shards(monkeypatch, tmp_path):
    """With `bias` of LoraConfig PEFT saves the base's too."""
    for name, value in {**several.launch(1), "ACCELERATE_USE_FSDP": "true", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    saved = []
    try:
        with ranks.group():
            for spread in (False, True):
                model = make_lora(biased().unload(), bias="lora_only", init_std=0.0).to(DEVICE)
                for name, p in model.named_parameters():
                    if "lora_" in name:
                        p.data.fill_(len(name) / 100)
                if spread:
                    for unit in (*model.base_model.model.model.layers, model):
                        fully_shard(unit, mesh=init_device_mesh(DEVICE, (1,)))
                whole = whole_adapter(model)
                assert (whole is not None) == spread
                save_adapter(model, tmp_path / str(spread), whole)
                saved.append(load_file(tmp_path / str(spread) / "adapter_model.safetensors"))
    finally:
        ranks._leave()
    one, other = saved
    assert sum(name.endswith("bias") for name in one) == 6 and one.keys() == other.keys()
    for name, t in one.items():
        assert torch.equal(t, other[name])


def test_a_handler_put_in_place_of_ours_is_left_alone(tmp_path):
    """As transformers puts one there to write a checkpoint at once."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time\n"
        "from lorapar import ranks\n"
        "with ranks.group():\n"
        "    signal.signal(signal.SIGTERM, lambda *unused: print('theirs', flush=True))\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(1)\n"
        "    print('went on', flush=True)\n"
    )
    for said in several.finish(several.start(script)):
        assert "theirs" in said and "went on" in said and "told to stop" not in said
