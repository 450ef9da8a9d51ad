"""The examples run as they stand."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import ARITHMETIC, REPO
from safetensors.torch import load_file

from lorapar.config import PartitionSettings
from lorapar.partitioning import make_partition


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("masked", [True, False])
def test_three_lines_in_a_stock_trl_script(masked, tiny_folder, tmp_path, monkeypatch, capsys):
    """TRL's own defaults: bf16 autocast over an fp32 base, checkpointing, the trainer's AdamW."""
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "Question: 1 + 1?\nAnswer:", "completion": " 2"}
    rows.write_text((json.dumps(row) + "\n") * 16)
    shapes = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16),
              "gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}  # fmt: skip
    scores = {}
    for layer in range(2):
        for name, (k, n) in shapes.items():
            block = "self_attn" if name[0] in "qkv" else "mlp"
            full = f"model.layers.{layer}.{block}.{name}"
            scores |= {f"{full}.lora_A.weight": torch.rand(8, k)}
            scores |= {f"{full}.lora_B.weight": torch.rand(n, 8)}
    partition = make_partition(scores, scores, PartitionSettings(0.5))
    partition.save(tmp_path / "partition.safetensors")
    monkeypatch.chdir(tmp_path)
    arguments = [str(tmp_path / "partition.safetensors")] if masked else []
    load_script(REPO / "examples" / "trl_sft.py").main(str(tiny_folder), str(rows), *arguments)
    assert "served 12 of 12 LoRA layers" in capsys.readouterr().out
    saved = load_file(tmp_path / "runs/trl_sft/adapter_model.safetensors")
    for name, mask in partition.sft.items():
        if "lora_B" in name:  # zero at the start, so what moved can be seen
            b = saved[f"base_model.model.{name}"]
            assert b[mask].any() and (masked != bool(b[~mask].any()))


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
