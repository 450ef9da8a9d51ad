"""The command line as a user meets it."""

import subprocess
import sys

import pytest
import torch
from conftest import ARITHMETIC, REPO
from typer.testing import CliRunner

from lorapar import cli, doctor

COMMANDS = "label votes export score partition sft rl eval run report doctor".split()


def test_every_command_is_there():
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    assert all(f" {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: m\ndata: x\npartition: {theta: 2}\n")
    made = subprocess.run(
        [sys.executable, "-m", "lorapar.cli", "run", str(bad)],
        capture_output=True, text=True, cwd=REPO / "python",
        env={"PYTHONPATH": f"{REPO}:{REPO / 'python'}", "PATH": ""},
    )  # fmt: skip
    assert made.returncode == 2 and not made.stdout
    (line,) = made.stderr.splitlines()
    assert line == f"lorapar: {bad}:3: partition.theta must lie in [0, 1], found 2.0"


def test_doctor_names_versions_and_backend():
    result = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name in ("torch", "triton", "peft", "transformers", "trl", "GPU", "reference"):
        assert name in result.output


def test_doctor_says_which_backend_serves_and_why(monkeypatch):
    def rows():
        return {what: (found, remark) for what, found, remark in doctor.doctor()}

    monkeypatch.delenv("LORAPAR_BACKEND", raising=False)
    assert rows()["backend, CPU tensors"][0] == "reference"
    name, remark = rows()["backend, CUDA tensors"]
    assert name == "triton" and "the default for CUDA" in remark
    assert ("no GPU" in remark) == (not torch.cuda.is_available())
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")
    assert rows()["backend, CUDA tensors"][0] == "reference"
    assert "LORAPAR_BACKEND=reference" in rows()["backend, CUDA tensors"][1]
    monkeypatch.setenv("LORAPAR_BACKEND", "fast")
    found, remark = rows()["backend, CPU tensors"]
    assert found == "none" and "LORAPAR_BACKEND='fast'" in remark


def test_doctor_knows_whether_this_card_was_measured(monkeypatch, tmp_path):
    file = tmp_path / "card.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Card")
    monkeypatch.setattr(doctor._tuned, "file_of", lambda gpu: file)
    found, remark = doctor._launches()
    assert found == "default" and "none measured for NVIDIA Card" in remark
    file.touch()
    assert doctor._launches() == ("measured", "card.json")


def test_label_through_the_command_line(tmp_path):
    result = CliRunner().invoke(
        cli.app,
        ["label", str(ARITHMETIC / "config.yaml"), "--run-dir", str(tmp_path / "run"),
         "--set", "data.train_rows=40"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "run" / "labels.jsonl").read_text().splitlines()) == 40
    assert "system1" in result.output
