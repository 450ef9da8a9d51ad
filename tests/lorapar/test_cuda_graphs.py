"""What layers that are replayed as CUDA graphs must survive: every kind of step a user may take.

Each case runs eagerly, then compiled, several times over: a graph is recorded in the second or
third call of its kind and replayed from then on, so that only later rounds show what it holds.
"""

import copy
import gc
import warnings

import pytest
import torch
from conftest import DEVICE
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from lorapar import recording
from lorapar.patch import accelerate, lora_layers, restore
from lorapar_kernels import LoraMask
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

pytestmark = pytest.mark.gpu

ROUNDS = 5
LENGTHS = (64, 96, 128, 160, 192, 224) if DEVICE == "cuda" else (4, 5, 6, 7, 8, 9)
REENTRANT = {"non-reentrant": False, "reentrant": True}
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def nothing_skipped(monkeypatch):
    """Nothing compiled before; afterwards no graph was skipped, broken or warned of."""
    if DEVICE == "cpu":  # by hand, with `gpu` not skipped: the logic of these tests alone
        monkeypatch.setattr(recording, "COMPILER", "eager")
    torch.compiler.reset()
    gc.collect()
    counters.clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert not counters["graph_break"]
    texts = [str(w.message) for w in seen]
    words = ("cudagraph", "cuda graph", "recompile", "lorapar")
    assert not [t for t in texts if any(word in t.lower() for word in words)]


def make(dropout=0.0, checkpoints=None):
    """A base in bf16, an adapter in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=4, vocab_size=1000)  # fmt: skip
    with torch.device(DEVICE):
        base = LlamaForCausalLM(config).to(torch.bfloat16)
    adapter = LoraConfig(r=8, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    model.enable_input_require_grads()
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    return model


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1000, (2, n), generator=generator).to(DEVICE) for n in LENGTHS[:count]]


def loss_of(model, ids):
    double = next(model.parameters()).dtype == torch.float64
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not double):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model):
    """Taken, so that the next step begins with none."""
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def train(model, ids, accumulate=1):
    """Gradients of one step after another."""
    found = []
    for i, batch in enumerate(ids):
        loss_of(model, batch).backward()
        if (i + 1) % accumulate == 0:
            found.append(gradients(model))
    return found


class Judge:
    """Eager gradients in bf16 and in float64, of what `steps` does to a model."""

    def __init__(self, model, steps):
        self.model, self.steps = model, steps
        accelerate(model)
        self.eager = steps(model)
        self.exact = steps(copy.deepcopy(model).double())

    def check(self):
        for got, want, exact in zip(self.steps(self.model), self.eager, self.exact, strict=True):
            assert got.keys() == want.keys() and len(got) == 2 * 24
            for name in got:
                assert_as_accurate(name, got[name], exact[name], want[name], NETWORK_FACTOR)

    def rounds(self, between=lambda: None, rounds=ROUNDS):
        """Right in each, and nothing is compiled after the first."""
        for i in range(rounds):
            between()
            self.check()
            if i == 0:
                compiled = graphs()
        assert graphs() == compiled > 0


def graphs():
    return counters["stats"]["unique_graphs"]


def compile(model, **options):
    return accelerate(model, compile="reduce-overhead", **options).compilation


def assert_recorded(compilation):
    assert compilation.failed is None
    if DEVICE == "cuda":
        assert compilation.pool_bytes() > 0 and recording.RECORDER.replays > 0
        assert recording.RECORDER.failed is None
        assert "CUDA graphs hold 0.00 GiB" not in str(compilation)
        assert "CUDA graphs hold" in str(compilation)


def test_four_shapes_in_turn():
    model, ids = make(), batches(4)
    judge = Judge(model, lambda m: train(m, ids))
    compilation = compile(model)
    judge.rounds()
    assert len(compilation.shapes) == 4 == graphs() and not compilation.eager
    assert_recorded(compilation)
    restore(model)
    judge.eager = judge.steps(copy.deepcopy(model))
    judge.check()


def test_accumulation():
    model, ids = make(), batches(3) * 3
    judge = Judge(model, lambda m: train(m, ids, accumulate=3))
    compilation = compile(model)
    judge.rounds(rounds=3)
    assert_recorded(compilation)


def test_accumulation_of_one_shape():
    """Every micro-step's gradients come out in the same place."""
    model, ids = make(), batches(1) * 4
    judge = Judge(model, lambda m: train(m, ids, accumulate=4))
    compile(model)
    judge.rounds()


def test_two_forwards_then_one_backward():
    model, (one, other) = make(), batches(2)

    def both(m):
        (loss_of(m, one) + loss_of(m, other)).backward()
        return [gradients(m)]

    judge = Judge(model, both)
    compile(model)
    judge.rounds()


@pytest.mark.parametrize("first", [0, 1])
def test_two_forwards_then_two_backwards(first):
    """Of one shape, so that both forwards are one graph, in either order."""
    model, (ids,) = make(), batches(1)

    def both(m):
        losses, found = [loss_of(m, ids), loss_of(m, ids.flip(1))], []
        for loss in (losses[first], losses[1 - first]):
            loss.backward()
            found.append(gradients(m))
        return found

    judge = Judge(model, both)
    compile(model)
    judge.rounds()


def test_forwards_without_a_backward():
    model, ids = make(), batches(2)
    judge = Judge(model, lambda m: train(m, ids))
    compile(model)

    def dropped():
        loss_of(model, ids[0])
        kept = loss_of(model, ids[1])
        del kept

    judge.rounds(dropped)


@pytest.mark.parametrize("kind", REENTRANT)
def test_checkpointing(kind):
    model, ids = make(checkpoints=REENTRANT[kind]), batches(2)
    judge = Judge(model, lambda m: train(m, ids))
    compilation = compile(model)
    judge.rounds()
    assert not compilation.eager and compilation.failed is None


@pytest.mark.parametrize("kind", REENTRANT)
def test_dropout_is_the_same_when_recomputed(kind):
    """And what is drawn follows the generator, graph or not."""
    ids, runs = batches(1) * 2, []
    for checkpoints in (None, REENTRANT[kind]):
        model = make(dropout=0.3, checkpoints=checkpoints)
        compile(model)
        train(model, ids * 2)  # recorded
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(train(model, ids))
        restore(model)
    for run in runs[1:]:
        for got, want in zip(run, runs[0]):
            for name in want:
                assert_close(name, got[name], want[name])
    first, second = runs[0]
    assert all((first[n] != second[n]).any() for n in first)  # each replay draws anew


def test_scoring_and_generating_between_steps():
    model, (ids, others) = make(), batches(2)
    judge = Judge(model, lambda m: train(m, [ids]))
    with torch.no_grad():
        want, exact = (loss_of(m, others) for m in (model, copy.deepcopy(model).double()))
    compile(model)

    def between():
        with torch.no_grad():
            score = loss_of(model, others)
            assert_as_accurate("score", score, exact, want, NETWORK_FACTOR)
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                made = model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3)
            assert made.shape[1] == ids.shape[1] + 3

    judge.rounds(between)


def test_an_exception_in_a_step():
    model, ids = make(), batches(1)
    judge = Judge(model, lambda m: train(m, ids))
    compile(model)
    layer = model.base_model.model.model.layers[2]

    def fail(*unused):
        raise ValueError("stop")

    def broken():
        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="stop"):
            loss_of(model, ids[0])
        hook.remove()

    def broken_backward():
        broken()
        loss = loss_of(model, ids[0])
        loss.register_hook(fail)
        with pytest.raises(ValueError, match="stop"):
            loss.backward()
        model.zero_grad(set_to_none=True)

    judge.rounds(broken)
    judge.rounds(broken_backward)


def test_more_shapes_than_allowed():
    model, ids = make(), batches(6)
    judge = Judge(model, lambda m: train(m, ids))
    compilation = compile(model)
    judge.rounds(rounds=3)
    assert len(compilation.shapes) == 4 == graphs()
    assert list(compilation.eager.values()) == [4 * 2 * 3]
    assert "24 calls ran eagerly: more shapes than max_shapes=4" in str(compilation)


def masks_for(model, seed):
    generator = torch.Generator().manual_seed(seed)

    def some(p):
        return (torch.rand(p.shape, generator=generator) < 0.4).to(DEVICE)

    return {
        name: LoraMask(some(m.lora_A["default"].weight), some(m.lora_B["default"].weight))
        for name, m in lora_layers(model).items()
    }


def test_masks_that_change_between_stages():
    """First there is none: a layer that was compiled without a mask must see the one that comes."""
    model, ids = make(), batches(1)
    judge = Judge(model, lambda m: train(m, ids))
    for seed in (None, 1, 2, 1, None):
        masks = {} if seed is None else masks_for(model, seed)
        compile(model, **({"mask": masks} if masks else {}))
        kept = {
            f"{n}.{side}.default.weight": m
            for n, mask in masks.items()
            for side, m in (("lora_A", mask.a), ("lora_B", mask.b))
        }
        for _ in range(3):
            for got, want, exact in zip(train(model, ids), judge.eager, judge.exact):
                for name in want:
                    m = kept.get(name)
                    m = torch.ones_like(got[name], dtype=torch.bool) if m is None else m
                    assert not got[name][~m].any(), name
                    assert_as_accurate(
                        name, got[name][m], exact[name][m], want[name][m], NETWORK_FACTOR
                    )


def test_weights_that_change_are_read():
    """An optimiser writes to the memory that replays read."""

    def trained(model):
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in weights.items()}
        optimizer = torch.optim.SGD(weights.values(), lr=1.0)
        for batch in batches(2) * 3:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        return {n: p.detach() - before[n] for n, p in weights.items()}

    eager, model, exact = make(), make(), make().double()
    accelerate(eager)
    compile(model)
    moved, want, ref = (trained(m) for m in (model, eager, exact))
    for name in want:
        assert ref[name].any()
        assert_as_accurate(name, moved[name], ref[name], want[name], NETWORK_FACTOR)


class Squashed(torch.nn.Module):
    """A layer whose backward reads its own output."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).tanh()


def test_an_output_that_is_written_to_is_noticed():
    from compiled_net import net, tower

    model = net()
    own = tower(model)
    own.cells = torch.nn.ModuleList(Squashed(cell) for cell in own.cells)
    compile(model)
    x = torch.randn(5, 3, 8, device=DEVICE, requires_grad=True)
    first = own.cells[0]
    for _ in range(4):
        own(x).sum().backward()
    y = first(x)
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
