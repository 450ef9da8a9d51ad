"""The scoring pass: the released script's formula, at any batch size, on an untouched model."""

import copy

import pytest
import torch
from conftest import make_lora, make_tiny_model

from lorapar.errors import UserError
from lorapar.importance import Example, accumulate, shuffled
from lorapar.partitioning import adapter_parameters, jaccard
from lorapar.patch import Linear, accelerate, lora_layers
from lorapar_kernels import importance, select_by_mass
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close


def examples(count=7, seed=3):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        n = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 1000, (n,), generator=generator).tolist()

    return [Example([1, *ids(2, 9)], [*ids(1, 12), 2]) for _ in range(count)]


def released_script(model, batch):
    """What example.py does, batch of one: s1 = Σ g φ, s2 = Σ (g φ)², |s1 − ½ s2| / B."""
    first, second = {}, {}
    for e in batch:
        model.zero_grad()
        ids = torch.tensor([e.prompt + e.completion])
        labels = torch.tensor([[-100] * len(e.prompt) + e.completion])
        model(input_ids=ids, labels=labels).loss.backward()
        for n, p in adapter_parameters(model).items():
            change = p.grad * p.detach()
            first[n] = first.get(n, 0) + change
            second[n] = second.get(n, 0) + change.square()
    return {n: (first[n] - 0.5 * second[n]).abs() / len(batch) for n in first}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_the_released_formula_at_any_batch_size(batch_size):
    batch, model = examples(), make_lora(make_tiny_model(), init_std=0.3)
    model.eval()  # dropout 0, as there
    plain = released_script(copy.deepcopy(model), batch)
    exact = released_script(copy.deepcopy(model).double(), batch)
    got = accumulate(model, batch, batch_size=batch_size).scores(model, "taylor2")
    assert got.keys() == plain.keys()
    for name in got:
        assert_as_accurate(name, got[name], exact[name], plain[name], NETWORK_FACTOR)
    assert jaccard(
        select_by_mass(list(got.values()), 0.9), select_by_mass(list(exact.values()), 0.9)
    ) > 0.999  # fmt: skip


def test_squares_are_of_examples_and_not_of_batches():
    batch, model = examples(), make_lora(make_tiny_model(), init_std=0.3)
    sums = accumulate(model, batch, batch_size=7)
    of_batch = {n: g.square() for n, g in sums.g.items()}
    assert all((sums.g_squared[n] - of_batch[n]).abs().max() > 0 for n in of_batch)
    one = accumulate(model, batch[:1], batch_size=7)
    for n, g in one.g.items():
        assert_as_accurate(n, one.g_squared[n], g.double().square(), g.square())


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_comes_back_as_it_was(patched):
    model = make_lora(make_tiny_model(), lora_dropout=0.5)
    model.train()
    model.base_model.model.model.layers[0].eval()
    if patched:
        accelerate(model)
    p, other, *_ = adapter_parameters(model).values()
    p.grad = torch.ones_like(p)
    other.requires_grad_(False)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    flags = [
        (q.requires_grad, None if q.grad is None else q.grad.clone()) for q in model.parameters()
    ]
    modes = [m.training for m in model.modules()]
    attributes = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
    state = torch.get_rng_state()
    first = accumulate(model, examples())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    for q, (flag, grad) in zip(model.parameters(), flags):
        assert q.requires_grad == flag
        assert (q.grad is None) == (grad is None) and (grad is None or torch.equal(q.grad, grad))
    assert [m.training for m in model.modules()] == modes
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == attributes
    assert any(type(m) is Linear for m in lora_layers(model).values()) == patched
    second = accumulate(model, examples())  # and nothing random took part
    assert all(torch.equal(first.g[n], second.g[n]) for n in first.g)


def test_the_model_comes_back_when_scoring_fails():
    model = make_lora(make_tiny_model())
    broken = [Example([1], [5]), Example([1], [10**6])]  # no such token
    with pytest.raises(IndexError):
        accumulate(model, broken)
    assert not any(type(m) is Linear for m in model.modules()) and model.active_adapter


def test_variants():
    torch.manual_seed(0)
    phi, g, g2 = torch.randn(5, 4), torch.randn(5, 4), torch.rand(5, 4)
    two = importance(phi, g, g2, 10, "taylor2")
    one, fisher = (importance(phi, g, g2, 10, v) for v in ("taylor1", "fisher"))
    assert_close("taylor1", one, (g * phi).abs() / 10)
    assert_close("fisher", fisher, 0.5 * g2 * phi**2 / 10)
    assert_close("taylor2", two, ((g * phi) / 10 - 0.5 * g2 / 10 * phi**2).abs())
    with pytest.raises(ValueError, match="variant 'taylor3' is none of"):
        importance(phi, g, g2, 10, "taylor3")
    with pytest.raises(ValueError, match="at least 1 example"):
        importance(phi, g, g2, 0)


def test_scoring_another_adapter_is_refused():
    model = make_lora(make_tiny_model())
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    with pytest.raises(UserError, match=r"adapters \['other'\] are active"):
        accumulate(model, examples())


def test_random_scores_give_a_mask_of_the_same_size():
    scores = {"a": torch.rand(8, 5), "b": torch.rand(6, 8)}
    mixed = shuffled(scores, 0)
    kept, random = (select_by_mass(list(s.values()), 0.7) for s in (scores, mixed))
    assert sum(int(m.sum()) for m in kept) == sum(int(m.sum()) for m in random)
    assert jaccard(kept, random) < 0.8
    scores = {"l.lora_A.weight": torch.rand(8, 5), "l.lora_B.weight": torch.rand(6, 8)}
    mixed = shuffled(scores, 0, rank=4)
    a, b = "l.lora_A.weight", "l.lora_B.weight"
    assert torch.equal(mixed[a][4:], scores[a][4:]) and torch.equal(
        mixed[b][:, 4:], scores[b][:, 4:]
    )
    assert not torch.equal(mixed[a][:4], scores[a][:4])


def test_an_adapter_with_b_zero_is_refused():
    model = make_lora(make_tiny_model(), init_std=0)  # PEFT's default: B = 0
    with pytest.raises(UserError, match=r"q_proj.lora_B.weight.* and 9 more are all zero.*pissa"):
        accumulate(model, examples())


def test_models_that_cannot_be_scored_are_refused():
    with pytest.raises(UserError, match="LlamaForCausalLM has no LoRA layers"):
        accumulate(make_tiny_model(), examples())
    with pytest.raises(UserError, match="12 LoRA layers cannot be scored: .*not plain LoRA"):
        accumulate(make_lora(make_tiny_model(), use_dora=True), examples())
    with pytest.raises(UserError, match="got no examples"):
        accumulate(make_lora(make_tiny_model()), [])
    with pytest.raises(UserError, match=r"examples \[1\] have no completion"):
        accumulate(make_lora(make_tiny_model()), [Example([1], [2]), Example([1], [])])
