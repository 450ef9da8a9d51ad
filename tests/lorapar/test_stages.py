"""Training stages: what is refused, what is dropped, what is left behind."""

import json

import pytest
import torch
import yaml

from lorapar import config as configuration
from lorapar import importance, stages
from lorapar.data import Row
from lorapar.errors import UserError
from lorapar.partitioning import partition
from lorapar.template import TEMPLATES

ROWS = [
    {"id": f"{system}-{i}", "question": f"What is {i} + 1?", "answer": f"#### {i + 1}",
     "system": system}
    for system in ("system1", "system2")
    for i in range(6)
]  # fmt: skip
SFT = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
       "gradient_checkpointing": False}  # fmt: skip


@pytest.fixture
def config(tiny_folder, tmp_path):
    """A run that has labels, as if the label stage had been run."""
    path = tmp_path / "config.yaml"
    raw = {"model": str(tiny_folder), "data": {"train": "x.jsonl"}, "adapter": {"r": 2},
           "sft": SFT, "run_dir": str(tmp_path / "run"), "score": {"examples": 4}}  # fmt: skip
    path.write_text(yaml.safe_dump(raw))
    (tmp_path / "run").mkdir()
    labels = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "run" / "labels.jsonl").write_text(labels)
    return configuration.load(path)


def test_rows_that_are_too_long_are_dropped_and_counted(config, tokenizer, caplog):
    template = TEMPLATES["gsm8k"]
    long = Row("long", "What is 1 + 1?", "1 + 1 = 2\n" * 100 + "#### 2")
    made, dropped = stages._dataset(config, "sft", [Row(**ROWS[0]), long], template, tokenizer)
    assert (len(made), dropped) == (1, 1)
    assert "1 of 2 rows are too long and were dropped" in caplog.text
    assert made[0]["input_ids"][-1] == tokenizer.eos_token_id  # no answer lost its end
    with pytest.raises(UserError, match="sft: all 1 rows are longer than sft.max_length"):
        stages._dataset(config, "sft", [long], template, tokenizer)


def test_a_failed_stage_writes_nothing(config, tmp_path, monkeypatch):
    importance.score(config)
    partition(config)
    before = sorted(p.name for p in (tmp_path / "run").iterdir())

    def fail(self, *args, **kwargs):
        raise MemoryError("out of memory")

    monkeypatch.setattr(stages.SFTTrainer, "train", fail)
    with pytest.raises(MemoryError):
        stages.sft(config)
    after = sorted(p.name for p in (tmp_path / "run").iterdir() if p.name != ".work")
    assert after == before and "sft" not in json.loads((tmp_path / "run/stages.json").read_text())
    with pytest.raises(UserError, match="sft is missing; run `lorapar sft"):
        stages.rl(config)


def test_fewer_rows_than_asked_for_are_all_scored(config):
    import dataclasses

    many = dataclasses.replace(config, score=dataclasses.replace(config.score, examples=100))
    assert importance.score(many)["examples"] == {"system1": 6, "system2": 6}


def test_checkpoints_of_other_settings_are_thrown_away(config, tmp_path):
    from lorapar.runs import Run

    work = stages._work_folder(Run(config), "sft", {"a": 1}, {})
    (work / "checkpoint-1").mkdir()
    assert (stages._work_folder(Run(config), "sft", {"a": 1}, {}) / "checkpoint-1").exists()
    assert not (stages._work_folder(Run(config), "sft", {"a": 2}, {}) / "checkpoint-1").exists()


def test_half_written_checkpoints_are_removed(tmp_path):
    for step, state in ((1, "{}"), (2, '{"global'), (3, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert stages.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert stages.last_checkpoint(tmp_path / "checkpoint-1") is None


def test_scores_and_labels_are_checked_for_both_systems(config, tmp_path):
    labels = tmp_path / "run" / "labels.jsonl"
    labels.write_text("".join(json.dumps(r) + "\n" for r in ROWS if r["system"] == "system1"))
    with pytest.raises(UserError, match="no row is labelled system2"):
        importance.score(config)
    labels.write_text(json.dumps({**ROWS[0], "system": "fast"}) + "\n")
    with pytest.raises(UserError, match="labels.jsonl:1: label 'fast' is neither system1 nor"):
        importance.score(config)
    assert not (tmp_path / "run" / "importance.safetensors").exists()


def test_an_example_longer_than_the_context_is_named(config, tmp_path):
    labels = tmp_path / "run" / "labels.jsonl"
    rows = [{**ROWS[0], "question": "1 + " * 400}, ROWS[-1]]
    labels.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(
        UserError, match=r"none of 1 rows .* context of 512 tokens \(row system1-0\)"
    ):
        importance.score(config)


def test_a_generators_state_that_a_kill_tore_is_removed(tmp_path):
    """Each process writes its own, so another than the last file may be half-written."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    for rank in range(2):
        torch.save({"cpu": torch.get_rng_state()}, folder / f"rng_state_{rank}.pth")
    torn = folder / "rng_state_1.pth"
    torn.write_bytes(torn.read_bytes()[:200])
    assert stages.last_checkpoint(tmp_path) == str(folder)
    assert (folder / "rng_state_0.pth").exists() and not torn.exists()
