"""The short way past Triton's binder is taken for the same kernel only, without a GPU here."""

from types import SimpleNamespace

import pytest
import torch

from lorapar_kernels import _launch


class Kernel:
    """Stands for a JITFunction: counts what goes through the binder and what past it."""

    arg_names = ("x_ptr", "y_ptr", "scale", "M", "BLOCK", "PDL")

    def __init__(self):
        self.bound, self.direct = [], []

    def __getitem__(self, grid):
        def bind(*arguments, **meta):
            self.bound.append((arguments, meta))
            return Compiled(self)

        return bind


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.kernel.direct.append((grid, arguments, stream))


@pytest.fixture
def kernel(monkeypatch):
    active = SimpleNamespace(get_current_stream=lambda index: "stream")
    monkeypatch.setattr(_launch, "JITFunction", Kernel)
    monkeypatch.setattr(_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(_launch, "_COMPILED", {})
    monkeypatch.setattr(_launch, "starts_early", lambda index: True)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    return Kernel()


def launch(kernel, x, y=None, numbers=(2.0, 64), **meta):
    meta = {"BLOCK": 32, "num_warps": 4} | meta
    _launch.launch(kernel, (5,), x, (x, y), numbers, **meta)


def test_the_second_call_passes_addresses_to_the_compiled_kernel(kernel):
    x = torch.zeros(8)
    launch(kernel, x)
    launch(kernel, torch.ones(8))
    assert len(kernel.bound) == 1 and len(kernel.direct) == 1
    grid, (address, none, scale, m, block, pdl), stream = kernel.direct[0]
    assert grid == (5, 1, 1) and stream == "stream"
    assert isinstance(address, int) and address != x.data_ptr()
    assert (none, scale, m, block, pdl) == (None, 2.0, 64, 32, True)


@pytest.mark.parametrize("early", [False, True])
def test_a_kernel_that_starts_early_is_told_to_wait(early, kernel, monkeypatch):
    monkeypatch.setattr(_launch, "starts_early", lambda index: early)
    launch(kernel, torch.zeros(8))
    (_, meta) = kernel.bound[0]
    assert meta["PDL"] is meta["launch_pdl"] is early


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(8, dtype=torch.float16)},
        {"x": torch.zeros(9)[1:]},  # not aligned to 16 bytes
        {"y": torch.zeros(8)},
        {"numbers": (2.0, 65)},
        {"numbers": (2.0, 1)},
        {"numbers": (2.5, 64)},
        {"BLOCK": 16},
        {"num_warps": 8},
    ],
    ids=["dtype", "alignment", "none", "number", "one", "float", "constant", "option"],
)
def test_anything_that_triton_compiles_for_goes_to_it(change, kernel):
    launch(kernel, torch.zeros(8))
    launch(kernel, **({"x": torch.zeros(8)} | change))
    assert len(kernel.bound) == 2 and not kernel.direct


def test_the_cache_does_not_grow_for_ever(kernel, monkeypatch):
    monkeypatch.setattr(_launch, "_MAX_COMPILED", 4)
    for m in range(16, 160, 16):
        launch(kernel, torch.zeros(8), numbers=(1.0, m))
    assert len(_launch._COMPILED) <= 4
