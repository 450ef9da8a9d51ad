"""Every init is an ordinary PEFT adapter of the original base, and can be scored."""

import dataclasses

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorapar import models
from lorapar.config import INITS, Config, Data
from lorapar.errors import UserError
from lorapar.importance import Example, accumulate
from lorapar.initialization import ensure_initial, initial_adapter, trainable_rank
from lorapar.partitioning import adapter_parameters
from lorapar.patch import lora_layers
from lorapar_kernels.testing import assert_close

IDS = torch.tensor([[1, 5, 9, 30, 7]])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """In fp32, so that starting at the base can be told from starting near it."""
    monkeypatch.setattr(models, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(models, "base_dtype", lambda: torch.float32)


@pytest.fixture
def config(tiny_folder, tmp_path):
    return Config(str(tiny_folder), Data("x"), adapter={"r": 4}, run_dir=str(tmp_path / "run"))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("init", INITS)
def test_stock_peft_reads_it_and_gives_the_same_logits(init, config):
    config = dataclasses.replace(config, init=init)
    folder = ensure_initial(config)
    ours = initial_adapter(config)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), folder)
    assert torch.equal(logits(stock), logits(ours))
    base = logits(AutoModelForCausalLM.from_pretrained(config.model))
    difference = (logits(ours) - base).abs().max() / base.abs().max()
    if init == "paper":  # it moves the model, a little: PAPER.md section 4
        assert 1e-5 < difference
    else:
        assert difference < 1e-5
    doubled = init in ("paper_offset", "pissa", "olora")
    assert trainable_rank(config) == (4 if doubled else None)
    a = next(iter(adapter_parameters(ours).values()))
    assert a.shape[0] == (8 if doubled else 4)


@pytest.mark.parametrize("init", INITS)
def test_it_can_be_scored(init, config):
    model = initial_adapter(dataclasses.replace(config, init=init))
    scores = accumulate(model, [Example([1, 5], [9, 2])]).scores(model, "taylor2")
    assert all(s.any() for s in scores.values())


def test_paper_draws_both_matrices_from_the_seed(config):
    model, same = initial_adapter(config), initial_adapter(config)
    other = initial_adapter(dataclasses.replace(config, seed=1))
    values = [torch.cat([p.flatten() for p in adapter_parameters(m).values()])
              for m in (model, same, other)]  # fmt: skip
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert values[0].std().item() == pytest.approx(0.01, rel=0.05)
    assert abs(values[0].mean().item()) < 0.001


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_decompositions_are_pefts(init, config):
    """The first r columns are what PEFT itself would start from."""
    from peft import LoraConfig, get_peft_model

    ours = adapter_parameters(initial_adapter(dataclasses.replace(config, init=init)))
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(config.model),
        LoraConfig(r=4, lora_alpha=64, init_lora_weights=init, target_modules=["q_proj"]),
    )
    for name, p in adapter_parameters(theirs).items():
        mine = ours[name][:4] if "lora_A" in name else ours[name][:, :4]
        assert_close(name, mine.abs(), p.detach().abs())  # signs of an SVD are free


def test_rslora_keeps_its_scale(config):
    config = dataclasses.replace(
        config, init="paper_offset", adapter={"r": 4, "use_rslora": True, "lora_alpha": 6}
    )
    layer = next(iter(lora_layers(initial_adapter(config)).values()))
    assert layer.scaling["default"] == pytest.approx(6 / 4**0.5)


def test_it_is_made_once_and_anew_when_settings_change(config):
    folder = ensure_initial(config)
    made = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert (ensure_initial(config) / "adapter_model.safetensors").stat().st_mtime_ns == made
    other = ensure_initial(dataclasses.replace(config, seed=7))
    assert (other / "adapter_model.safetensors").stat().st_mtime_ns != made


def test_patterns_with_a_doubled_rank_are_refused(config):
    config = dataclasses.replace(
        config, init="pissa", adapter={"r": 4, "rank_pattern": {"q_proj": 2}}
    )
    with pytest.raises(UserError, match="rank_pattern cannot be combined with init: pissa"):
        initial_adapter(config)


def test_a_target_that_is_not_there(config):
    config = dataclasses.replace(config, adapter={"target_modules": ["nothing"]})
    with pytest.raises(UserError, match="adapter: Target modules .* not found"):
        initial_adapter(config)


def test_a_model_that_is_not_there(config):
    with pytest.raises(UserError, match="model: 'nowhere/at-all' cannot be loaded"):
        initial_adapter(dataclasses.replace(config, model="nowhere/at-all"))
