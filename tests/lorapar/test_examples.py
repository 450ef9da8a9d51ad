"""The examples run as they stand."""

import difflib
import json
import os
import runpy
import subprocess
import sys

import pytest
import several
import torch
from conftest import ARITHMETIC, REPO, make_lora
from masked_ranks import partition_for
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorapar.partitioning import Partition

STOCK, OURS = (REPO / "examples" / f"{name}.py" for name in ("trl_sft_stock", "trl_sft"))


@pytest.fixture
def arguments(tiny_folder, tmp_path):
    """Both scripts' arguments: a model, rows, an adapter, and a partition made for that."""
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "Question: 1 + 1?\nAnswer:", "completion": " 2"}
    rows.write_text((json.dumps(row) + "\n") * 16)
    adapter, partition = tmp_path / "init", tmp_path / "partition.safetensors"
    model = make_lora(AutoModelForCausalLM.from_pretrained(tiny_folder))
    model.save_pretrained(adapter)
    partition_for(model).save(partition)
    return [str(path) for path in (tiny_folder, rows, adapter, partition)]


def assert_trained(folder, arguments, masked):
    """By the partition where `masked`, else everywhere."""
    before, after = (
        load_file(f"{path}/adapter_model.safetensors")
        for path in (arguments[2], folder / "runs/trl_sft")
    )
    for name, mask in Partition.load(arguments[3]).sft.items():
        name = f"base_model.model.{name}"
        moved = before[name].view(torch.int32) != after[name].view(torch.int32)
        assert moved[mask].any() and masked != bool(moved[~mask].any()), name


def test_the_example_is_a_stock_script_and_three_lines():
    stock, ours = (path.read_text().splitlines() for path in (STOCK, OURS))
    changed = [line for line in difflib.ndiff(stock, ours) if line[0] != " "]
    assert changed == [
        "+ import lorapar  # isort: skip",
        "+ print(lorapar.accelerate(trainer.model))",
        '+ lorapar.LoraParCallback(sys.argv[4], stage="sft").attach(trainer)',
    ]
    assert "lorapar" not in "".join(stock)


@pytest.mark.parametrize("lines", [0, 2, 3])
def test_three_lines_in_a_stock_trl_script(lines, arguments, tmp_path, monkeypatch, capsys):
    """TRL's own defaults: bf16 autocast over an fp32 base, checkpointing, the trainer's AdamW.
    The third line, the mask, may be left out."""
    text = (OURS if lines else STOCK).read_text()
    if lines == 2:
        text = "".join(s for s in text.splitlines(keepends=True) if "LoraParCallback" not in s)
    script = tmp_path / "script.py"
    script.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    assert ("served 12 of 12 LoRA layers" in capsys.readouterr().out) == (lines > 0)
    assert_trained(tmp_path, arguments, masked=lines == 3)


@pytest.mark.slow
def test_both_scripts_run_from_the_command_line(arguments, tmp_path):
    path = {"PYTHONPATH": several.PATH}
    for script, given in ((STOCK, arguments[:3]), (OURS, arguments)):
        folder = tmp_path / script.stem
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, str(script), *given], cwd=folder, env=os.environ | path,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("served 12 of 12 LoRA layers" in done.stdout) == (script is OURS)
        assert_trained(folder, arguments, script is OURS)


def test_data_can_be_made_again(tmp_path):
    """The committed rows are what make_data.py writes, byte for byte."""
    pytest.importorskip("reasoning_gym", reason="extra [data]: pip install reasoning-gym")
    script = tmp_path / "make_data.py"
    script.write_text((ARITHMETIC / "make_data.py").read_text())
    subprocess.run([sys.executable, str(script)], check=True, cwd=tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (ARITHMETIC / name).read_bytes()


def test_base_model_is_small_and_reads_any_text(tokenizer):
    assert sum(f.stat().st_size for f in (ARITHMETIC / "base").iterdir()) < 6_000_000
    for text in ("12 + 45 = 57\n#### 57", "Ünïcode 🙂 «quotes» \t tabs", "Natalia sold 48/2 = 24"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_rows_are_what_they_say():
    rows = {s: [json.loads(x) for x in (ARITHMETIC / f"{s}.jsonl").read_text().splitlines()]
            for s in ("train", "test")}  # fmt: skip
    systems = [row["system"] for row in rows["test"]]
    assert systems.count("system1") >= 200 and systems.count("system2") >= 200
    assert not any("system" in row for row in rows["train"])  # labelling is the run's work
    questions = {s: {row["question"] for row in r} for s, r in rows.items()}
    assert not questions["train"] & questions["test"]
    for row in rows["test"]:
        *steps, final = row["answer"].splitlines()
        assert final == f"#### {steps[-1].rpartition('= ')[2]}"
        assert len(steps) == 1 if row["system"] == "system1" else len(steps) >= 3
        for step in steps:
            left, _, right = step.partition(" = ")
            assert eval(left) == int(right), step
