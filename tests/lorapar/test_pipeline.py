"""The whole road on a tiny random model: files, resume, refusals, baselines."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import several
import torch
from conftest import ARITHMETIC, beyond
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorapar import config as configuration
from lorapar import pipeline, stages
from lorapar.errors import UserError
from lorapar.exporting import export
from lorapar.partitioning import Partition

FILES = (
    "config.yaml votes.jsonl labels.jsonl importance.safetensors partition.safetensors "
    "sft rl adapter eval.json report.html"
).split()
SETTINGS = {
    "data": {"train_rows": 60, "test_rows": 8},
    "adapter": {"r": 2},
    "score": {"examples": 6, "batch_size": 4},
    "sft": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
    "rl": {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "disable_dropout": True,
    },
    "eval": {"max_new_tokens": 4},
}


def write_config(folder, model, **changes):
    """A YAML file as a user would write it, relative paths included."""
    import yaml

    raw = {"model": str(model), "run_dir": str(folder / "run"), **SETTINGS}
    raw["data"] = {"train": str(ARITHMETIC / "train.jsonl"), "test": str(ARITHMETIC / "test.jsonl")}
    raw["data"] |= SETTINGS["data"]
    for section, values in (("sft", SETTINGS["sft"]), ("rl", SETTINGS["rl"])):
        raw[section] = {**values, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    raw |= changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def config(tiny_folder, tmp_path):
    return configuration.load(write_config(tmp_path, tiny_folder))


def names(folder):
    """Everything in the run folder, hidden leftovers included."""
    return sorted(p.name for p in folder.iterdir())


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Log(list):
    """Records which stages ran and which were kept; stops the run after one of them."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after

    def __call__(self, name, skipped, summary):
        self.append((name, skipped))
        if name == self.stop_after:
            raise KeyboardInterrupt


def test_every_stage_writes_its_files(config, tmp_path):
    log = Log()
    results = pipeline.run(config, done=log)
    run = tmp_path / "run"
    assert [name for name, _ in log] == "label score partition sft rl eval report".split()
    assert not any(skipped for _, skipped in log)
    assert set(FILES) <= set(names(run))
    assert not [n for n in names(run) if n.startswith(".")]  # no checkpoints left behind
    assert "no longer fit" not in (run / "report.html").read_text()
    assert set(results) == {"base", "sft", "rl"}
    assert results["base"]["all"]["total"] == 8

    # adapter/ is the last stage's, an ordinary PEFT adapter with nothing of ours in it
    assert sha(run / "adapter/adapter_model.safetensors") == sha(
        run / "rl/adapter_model.safetensors"
    )
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config.model), run / "adapter"
    )
    assert torch.isfinite(stock(input_ids=torch.tensor([[1, 5, 9]])).logits).all()

    # frozen elements: the same bits before and after each stage, over all three adapters
    partition = Partition.load(run / "partition.safetensors")
    init, sft, rl = (
        load_file(run / s / "adapter_model.safetensors") for s in ("init", "sft", "rl")
    )
    for stage, before, after in (("sft", init, sft), ("rl", sft, rl)):
        moved = 0
        for name, mask in partition.masks(stage).items():
            one, two = (t[f"base_model.model.{name}"] for t in (before, after))
            assert torch.equal(one[~mask], two[~mask])
            moved += int((one != two).sum())
        assert moved > 0

    # a second run keeps everything
    log = Log()
    before = {n: (run / n).stat().st_mtime_ns for n in ("labels.jsonl", "partition.safetensors")}
    assert pipeline.run(config, done=log) == json.loads((run / "eval.json").read_text())
    assert [n for n, skipped in log if skipped] == "label score partition sft rl".split()
    assert before == {n: (run / n).stat().st_mtime_ns for n in before}


def test_stale_inputs_are_refused_with_what_to_rerun(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, done=Log(stop_after="partition"))
    other = dataclasses.replace(config, partition=dataclasses.replace(config.partition, theta=0.5))
    message = (
        r"partition.safetensors does not fit this configuration: it was made with partition.theta "
        r"0.9, the configuration says 0.5; rerun `lorapar partition .*run`"
    )
    for act in (lambda: stages.sft(other), lambda: pipeline.run(other)):
        with pytest.raises(UserError, match=message):
            act()
    labels = tmp_path / "run" / "labels.jsonl"
    labels.write_text(labels.read_text() + "\n")
    with pytest.raises(UserError, match="labels.jsonl has changed since it was written"):
        pipeline.run(config)


def changed(config, section, **values):
    new = getattr(config, section) | values if isinstance(getattr(config, section), dict) else (
        dataclasses.replace(getattr(config, section), **values)
    )  # fmt: skip
    return dataclasses.replace(config, **{section: new})


def test_the_chain_holds_when_stages_are_run_one_by_one(config, tmp_path):
    from lorapar import importance, partitioning

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, done=Log(stop_after="sft"))
    before = (tmp_path / "run" / "config.yaml").read_text()

    # a stage above has other settings
    for act, other, message in (
        (stages.rl, changed(config, "sft", max_steps=1), "made with sft.max_steps 2"),
        (stages.sft, changed(config, "score", examples=3), "made with score.examples 6"),
        (importance.score, changed(config, "data", train_rows=50), "made with data.train_rows 60"),
        (partitioning.partition, dataclasses.replace(config, seed=7), "made with seed 41"),
        (stages.rl, dataclasses.replace(config, init="pissa"), "made with init 'paper'"),
    ):
        with pytest.raises(UserError, match=message):
            act(other)
    assert (tmp_path / "run" / "config.yaml").read_text() == before  # a refusal writes nothing

    # a stage above was run again
    other = changed(config, "partition", theta=0.3)
    partitioning.partition(other)
    with pytest.raises(UserError, match="sft does not fit .* another partition.safetensors; rerun"):
        stages.rl(other)
    importance.score(changed(config, "score", examples=3))
    with pytest.raises(UserError, match="partition.safetensors does not fit .* another importance"):
        stages.sft(changed(other, "score", examples=3))


def test_settings_that_change_no_result_are_not_held_against_a_stage(config):
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, done=Log(stop_after="sft"))
    teachers = [dataclasses.replace(t, concurrency=9) for t in config.labels.teachers]
    other = changed(config, "labels", teachers=tuple(teachers))
    other = changed(changed(other, "sft", logging_steps=5), "score", batch_size=2)
    log = Log(stop_after="sft")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(other, done=log)
    assert all(skipped for _, skipped in log)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("rl", {"num_generation": 4}, "rl: unknown key 'num_generation'"),
        ("rewards", ("corect_answer",), "'corect_answer' is unknown"),
        ("rewards", (5,), "rewards: expected a name"),
        ("template", "gsm9k", "template 'gsm9k' is unknown"),
        ("eval", {"scorer": "exact"}, "eval.scorer 'exact' is unknown"),
        ("adapter", {"lora_alfa": 1}, "adapter: unknown key 'lora_alfa'"),
        ("data", {"test": "gone.jsonl"}, "gone.jsonl is no file"),
    ],
)
def test_mistakes_of_late_stages_are_found_before_the_first(
    section, values, message, config, tmp_path
):
    if isinstance(values, dict):
        wrong = changed(config, section, **values)
    else:
        wrong = dataclasses.replace(config, **{section: values})
    with pytest.raises(UserError, match=message):
        pipeline.run(wrong)
    assert not (tmp_path / "run").exists()


def test_labels_of_ones_own_are_kept(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = (ARITHMETIC / "test.jsonl").read_text()  # labelled by construction
    (run / "labels.jsonl").write_text(rows)
    log = Log(stop_after="sft")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, done=log)
    assert log[0] == ("label", True) and (run / "labels.jsonl").read_text() == rows
    assert not (run / "votes.jsonl").exists()


def test_labels_of_ones_own_may_be_parquet(config, tmp_path):
    for name in ("jsonl", "parquet"):
        run = tmp_path / name
        run.mkdir()
        (run / "labels.jsonl").write_text((ARITHMETIC / "test.jsonl").read_text())
        one = dataclasses.replace(config, run_dir=str(run))
        if name == "parquet":
            export(one)
            (run / "labels.jsonl").unlink()
        log = Log(stop_after="sft")
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(one, done=log)
        assert log[0] == ("label", True) and not (run / "votes.jsonl").exists()
    for file in ("partition.safetensors", "sft/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / name / file) for name in ("jsonl", "parquet"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    with (tmp_path / "parquet/labels.parquet").open("ab") as f:
        f.write(b" ")
    with pytest.raises(UserError, match="another labels.parquet"):
        stages.rl(one)


def test_missing_inputs_say_what_to_run(config):
    from lorapar import importance, partitioning

    for act, missing, command in (
        (importance.score, "labels.jsonl", "label"),
        (partitioning.partition, "importance.safetensors", "score"),
        (stages.sft, "labels.jsonl", "label"),
    ):
        with pytest.raises(UserError, match=rf"{missing} is missing; run `lorapar {command}"):
            act(config)


def test_labels_select_the_data(config, tmp_path):
    """D1: System 1 rows alone reach SFT, System 2 rows alone reach RL, unless all are asked for."""
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, done=Log(stop_after="label"))
    labels = [json.loads(x) for x in (tmp_path / "run/labels.jsonl").read_text().splitlines()]
    for stage, system in (("sft", "system1"), ("rl", "system2")):
        want = {r["question"] for r in labels if r["system"] == system}
        got = {r.question for r in stages._rows(config, stage)}
        assert got == want and 0 < len(want) < len(labels)
        everything = dataclasses.replace(
            config, data=dataclasses.replace(config.data, select="all")
        )
        assert len(stages._rows(everything, stage)) == len(labels)


def test_dropout_really_applies_in_sft(config, monkeypatch):
    """D4: lora_dropout reaches the forward of the training steps."""
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, done=Log(stop_after="partition"))
    import lorapar.groups
    import lorapar.served

    seen = []

    def watch(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, **k: seen.append(k["dropout_p"]) or real(*a, **k)
        )

    watch(lorapar.served, "lora_linear")
    watch(lorapar.groups, "lora_linear_group")
    stages.sft(config)
    assert set(seen) == {0.05}
    written = json.loads(
        (configuration.Path(config.run_dir) / "sft/adapter_config.json").read_text()
    )
    assert written["lora_dropout"] == 0.05


def test_kl_is_against_the_sft_adapter_and_the_optimiser_is_fresh(config, monkeypatch):
    """D7: the reference is the policy that RL starts from. No moment survives from SFT."""
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, done=Log(stop_after="sft"))
    seen = {}
    real = stages.GRPOTrainer.train

    def train(self, *args, **kwargs):
        state = {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n}
        seen["same"] = all(
            torch.equal(p, state[n.replace(".default.", ".ref.")])
            for n, p in state.items()
            if ".default." in n
        )
        seen["optimizer"] = self.optimizer
        return real(self, *args, **kwargs)

    monkeypatch.setattr(stages.GRPOTrainer, "train", train)
    stages.rl(config)
    assert seen == {"same": True, "optimizer": None}
    summary = json.loads((configuration.Path(config.run_dir) / "rl/log_history.json").read_text())
    assert summary[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_no_wrapper_of_a_former_stage_is_left(config, monkeypatch):
    """D6: each stage loads its model anew, in one precision."""
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, done=Log(stop_after="sft"))
    seen, real = [], stages._trainer
    monkeypatch.setattr(
        stages,
        "_trainer",
        lambda c, s, model, *rest: seen.append(model) or real(c, s, model, *rest),
    )
    forward = {}
    monkeypatch.setattr(
        stages.GRPOTrainer, "train", lambda self, **k: forward.update(vars(self.model)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        stages.rl(config)
    assert "forward" not in forward and "_original_forward" not in forward
    assert {p.dtype for n, p in seen[0].named_parameters() if "lora_" in n} == {torch.float32}


def test_masks_off_is_plain_lora_and_rl(config, tmp_path):
    pipeline.run(config, done=(log := Log(stop_after=None)))
    plain = pipeline.without_masks(config)
    assert plain.run_dir == f"{config.run_dir}-no-masks"
    assert (tmp_path / "run-no-masks/votes.jsonl").exists()  # the teachers are not asked twice
    log = Log()
    pipeline.run(plain, done=log)
    assert [n for n, _ in log] == "label sft rl eval report".split()
    assert "no longer fit" not in (tmp_path / "run-no-masks/report.html").read_text()
    summary = json.loads((tmp_path / "run-no-masks/sft/summary.json").read_text())
    assert summary["active_share"] == 1.0
    assert sha(tmp_path / "run/labels.jsonl") == sha(tmp_path / "run-no-masks/labels.jsonl")


@pytest.mark.parametrize("init", beyond(["pissa"], ["paper_offset", "pissa"]))
def test_an_offset_init_keeps_its_offset(init, tiny_folder, tmp_path):
    config = configuration.load(write_config(tmp_path, tiny_folder, init=init))
    pipeline.run(config)
    plain = pipeline.without_masks(config)
    pipeline.run(plain)
    for run in (tmp_path / "run", tmp_path / "run-no-masks"):
        first, last = (load_file(run / s / "adapter_model.safetensors") for s in ("init", "rl"))
        for name in first:
            half = (slice(2, None),) if "lora_A" in name else (slice(None), slice(2, None))
            assert torch.equal(first[name][half], last[name][half])
    partition = Partition.load(tmp_path / "run/partition.safetensors")
    assert not any(m[2:].any() for n, m in partition.sft.items() if "lora_A" in n)


def test_rl_first(config, tmp_path):
    log = Log()
    pipeline.run(config, order=("rl", "sft"), done=log)
    assert [n for n, _ in log] == "label score partition rl sft eval report".split()
    run = tmp_path / "run"
    assert sha(run / "adapter/adapter_model.safetensors") == sha(
        run / "sft/adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="order must be sft,rl or rl,sft, got rl,rl"):
        pipeline.run(config, order=("rl", "rl"))


def test_columns_with_drop_unselected(tiny_folder, tmp_path):
    settings = {"theta": 0.6, "granularity": "column", "drop_unselected": True}
    config = configuration.load(write_config(tmp_path, tiny_folder, partition=settings))
    pipeline.run(config)
    partition = Partition.load(tmp_path / "run/partition.safetensors")
    last = load_file(tmp_path / "run/rl/adapter_model.safetensors")
    dead = 0
    for layer, flags in partition.meta["live"].items():
        b = last[f"base_model.model.{layer}.lora_B.weight"]
        assert not b[:, ~torch.tensor(flags)].any() and b[:, torch.tensor(flags)].any(0).all()
        dead += flags.count(False)
    assert dead > 0
    summary = json.loads((tmp_path / "run/sft/summary.json").read_text())
    assert summary["dropped_columns"] == dead and summary["loss_after_drop"] > 0


def test_bad_data_leaves_nothing_half_written(tiny_folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n')
    config = configuration.load(write_config(tmp_path, tiny_folder, data={"train": str(bad)}))
    with pytest.raises(UserError, match="bad.jsonl:2: needs a non-empty text 'answer'"):
        pipeline.run(config)
    assert not (tmp_path / "run").exists() or not names(tmp_path / "run")


@pytest.mark.more
def test_a_killed_run_ends_with_the_same_labels_and_partition(tiny_folder, tmp_path):
    """SIGKILL as each file appears; the run goes on, and every stage's result is the same."""
    for which in ("undisturbed", "killed"):
        (tmp_path / which).mkdir()
    changes = {"sft": {**SETTINGS["sft"], "save_steps": 1, "gradient_accumulation_steps": 1}}
    paths = {
        w: write_config(tmp_path / w, tiny_folder, **changes) for w in ("undisturbed", "killed")
    }
    environment = {**os.environ, "PYTHONPATH": several.PATH, "OMP_NUM_THREADS": "1"}

    def start(path):
        command = [sys.executable, "-m", "lorapar.cli", "run", str(path)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    pipeline.run(configuration.load(paths["undisturbed"]))
    run = tmp_path / "killed" / "run"
    for appears in ("votes.jsonl", "importance.safetensors", ".work/sft/checkpoint-1", "rl"):
        process = start(paths["killed"])
        deadline = time.monotonic() + 120
        while not (run / appears).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"ended before {appears} appeared"
    assert start(paths["killed"]).wait(240) == 0
    for name in ("labels.jsonl", "partition.safetensors"):
        assert sha(run / name) == sha(tmp_path / "undisturbed" / "run" / name), name
    sft = [load_file(tmp_path / w / "run/sft/adapter_model.safetensors") for w in paths]
    assert all(torch.equal(sft[0][n], sft[1][n]) for n in sft[0])
    assert not [n for n in names(run) if n.startswith(".")]
