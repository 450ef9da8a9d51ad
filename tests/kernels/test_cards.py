"""Launch configurations fit the cards that they are for, without having one."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import several
import torch
from conftest import REPO, beyond

from lorapar_kernels import _tuned


@pytest.mark.slow
@pytest.mark.parametrize("arch", beyond(["90"], ["80", "90"]))
def test_every_kernel_fits_every_card(arch):
    """Compiled for sm_80 and sm_90: shared memory within the limit, no large spill; on sm_90 the
    wait for the kernel before it comes first."""
    environment = {**os.environ, "PYTHONPATH": several.PATH}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parent / "compile_for_cards.py"
    ran = subprocess.run(
        [sys.executable, script, arch], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    *complaints, last = ran.stdout.splitlines()
    count = int(re.fullmatch(r"(\d+) compiled", last)[1])
    assert count > 50 and not complaints, "\n".join(complaints)


def test_every_kernel_begins_with_the_wait():
    """Whatever is None or constant in it; see `wait_for_previous`."""
    kernels = 0
    for file in Path(_tuned.__file__).parent.glob("*.py"):
        for function in ast.parse(file.read_text()).body:
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel"):
                first = next(s for s in function.body if not isinstance(s, ast.Constant))
                assert ast.unparse(first) == "wait_for_previous(PDL)", function.name
                kernels += 1
    assert kernels == 15


class TestConfig:
    TABLE = {"op": {"K=64": {"512": {"BLOCK_M": 1}, "8192": {"BLOCK_M": 2}}}}
    HOPPER, SAFE, INTERPRETED = {"BLOCK_M": 64}, {"BLOCK_M": 16}, {"BLOCK_M": 32}

    class Rows:
        """Rows of x on a GPU that is not here."""

        device = torch.device("cuda", 3)

        def __init__(self, m: int, dtype: torch.dtype = torch.bfloat16):
            self.shape, self.dtype = (m, 64), dtype

        def element_size(self) -> int:
            return self.dtype.itemsize

    @pytest.fixture
    def card(self, monkeypatch):
        """A card of compute capability 9.0 with a table."""
        monkeypatch.setattr(_tuned, "_table", lambda index: self.TABLE)
        monkeypatch.setattr(_tuned, "_roomy", lambda index: True)
        _tuned._nearest.cache_clear()
        yield
        _tuned._nearest.cache_clear()

    def config(self, rows, key="K=64"):
        return _tuned.config("op", rows, key, self.HOPPER, self.SAFE, self.INTERPRETED)

    @pytest.mark.parametrize("m,block", [(1, 1), (600, 1), (1500, 1), (5000, 2), (100_000, 2)])
    def test_takes_the_measured_one_of_the_nearest_m(self, m, block, card):
        assert self.config(self.Rows(m)) == {"BLOCK_M": block}

    def test_takes_hoppers_where_nothing_was_measured(self, card):
        assert self.config(self.Rows(512), "K=65") == self.HOPPER

    def test_takes_the_safe_one_in_fp32_and_on_smaller_cards(self, card, monkeypatch):
        assert self.config(self.Rows(512, torch.float32)) == self.SAFE
        monkeypatch.setattr(_tuned, "_roomy", lambda index: False)
        assert self.config(self.Rows(512)) == self.SAFE

    def test_interprets_on_a_cpu(self):
        assert self.config(torch.zeros(4, 64)) == self.INTERPRETED

    def test_a_plan_is_taken_only_if_it_was_measured(self, card, monkeypatch):
        table = {"extended_gemm": {"y": {"8192": True}, "dX": {"8192": False}}}
        monkeypatch.setattr(_tuned, "_table", lambda index: table)
        chosen = [_tuned.chosen(key, self.Rows(8192)) for key in ("y", "dX", "other")]
        assert chosen == [True, False, False]


def test_tables_are_of_the_form_that_is_read():
    import json

    for file in (REPO / "lorapar_kernels" / "tuned").glob("*.json"):
        found = json.loads(file.read_text())
        assert file == _tuned.file_of(found["gpu"])
        assert {"torch", "triton", "commit", "command", "ops"} <= found.keys()
        for op, keys in found["ops"].items():
            for by_m in keys.values():
                assert by_m and all(int(m) > 0 for m in by_m)
                kind = bool if op == "extended_gemm" else dict
                assert all(type(value) is kind for value in by_m.values())
