import pytest, torch
from compiled_net import *
from conftest import DEVICE
from lorapar.patch import accelerate
from lorapar_kernels import extension
pytest_plugins = "compiled_net"
pytestmark = pytest.mark.usefixtures("fresh")

@pytest.fixture
def state(monkeypatch):
    import sys
    from pathlib import Path
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
    from emulator.module import emulated_module
    monkeypatch.setattr(extension, "module", emulated_module())
    monkeypatch.setenv("LORAPAR_BACKEND", "reference")

def test_net(recorder, state):
    from lorapar import shortcuts
    plain, model = net(4), net(4)
    accelerate(plain)
    accelerate(model, compile="reduce-overhead")
    for seed in range(6):
        assert_equal_steps(step(model, inputs(seed=seed)), step(plain, inputs(seed=seed)))
        print(seed, recorder.replays, recorder.shortcuts, [f.code for f in recorder.functions()])
    assert recorder.shortcuts

def test_llama(recorder, state):
    plain, model = llama(num_hidden_layers=4)
    accelerate(plain)
    accelerate(model, compile="reduce-overhead")
    for seed in range(6):
        ids = torch.randint(0, 1000, (2, 7), generator=torch.Generator().manual_seed(seed))
        found = []
        for m in (model, plain):
            m.zero_grad()
            y = m(ids, labels=ids).loss
            y.backward()
            found.append((y.detach(), gradients(m)))
        assert_equal_steps(*found)
        print(seed, recorder.replays, recorder.shortcuts, [f.code for f in recorder.functions()])
    assert recorder.shortcuts
