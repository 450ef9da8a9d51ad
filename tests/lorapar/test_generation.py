"""Merged for generation: the policy is PEFT's merged one, and every bit is back afterwards."""

import copy
import warnings

import pytest
import torch
from against_peft import IDS
from conftest import ARITHMETIC, DEVICE, make_lora, make_tiny_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lorapar import served
from lorapar.errors import UserError
from lorapar.generation import merge_rollouts, merged_for_generation, merged_kl
from lorapar.patch import accelerate, lora_layers
from lorapar.served import Served
from lorapar_kernels import decode
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close

BF16 = torch.bfloat16


def made(**changes):
    """A bf16 base with fp32 adapters that are large enough to round W when they are merged."""
    biases = changes.pop("biases", False)
    base = make_tiny_model(attention_bias=biases, mlp_bias=biases, tie_word_embeddings=False)
    model = make_lora(base.to(BF16), **changes).eval().to(DEVICE)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    return model


def bits(model):
    """Every tensor of the model, also those that are no parameters, as bytes."""
    found = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        for key, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                tensors[key] = value
        for key, t in tensors.items():
            if t is not None:
                found[f"{name}.{key}"] = (type(t), t.dtype, t.requires_grad, _bytes(t))
    return found


def _bytes(t):
    try:
        return t.detach().contiguous().flatten().view(torch.uint8).clone()
    except (RuntimeError, NotImplementedError):  # torchao's
        return torch.cat([_bytes(getattr(t, n)) for n in t.__tensor_flatten__()[0]])


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, (*was, data) in before.items():
        assert after[name][:-1] == tuple(was), name
        assert torch.equal(after[name][-1], data), name


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def merged_by_peft(model):
    """PEFT's merged and unloaded copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("keep", ["pinned", "gpu"])
def test_the_merged_policy_and_the_bits_afterwards(keep, accelerated, capsys):
    model = made()
    if accelerated:
        accelerate(model)
    expected, before, unmerged = logits(merged_by_peft(model)), bits(model), logits(model)
    with merged_for_generation(model, keep=keep) as inside:
        assert inside is model
        said = capsys.readouterr().out
        assert torch.equal(logits(model), expected)
    assert_same(before, bits(model))
    assert torch.equal(logits(model), unmerged) and not torch.equal(unmerged, expected)
    touched = sum(m.base_layer.weight.numel() * 2 for m in lora_layers(model).values())
    assert f"12 layers, {touched / 2**20:,.1f} MiB" in said
    assert all(isinstance(m, Served) == accelerated for m in lora_layers(model).values())


def test_many_cycles_do_not_drift_as_peft_does():
    ours, theirs = made(), made()
    theirs.load_state_dict(ours.state_dict())
    before = bits(ours)
    for _ in range(3):
        with merged_for_generation(ours):
            pass
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    assert_same(before, bits(ours))
    with pytest.raises(AssertionError):
        assert_same(before, bits(theirs))


def test_generate_gives_peft_merged_tokens():
    model = made()
    accelerate(model)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = merged_by_peft(model).generate(input_ids=IDS, **options)
    with merged_for_generation(model):
        assert torch.equal(model.generate(input_ids=IDS, **options), expected)


def test_an_exception_inside():
    model = made()
    before = bits(model)
    with pytest.raises(KeyError), merged_for_generation(model):
        raise KeyError
    assert_same(before, bits(model))
    assert not any(m.merged for m in lora_layers(model).values())


def test_an_exception_while_merging(monkeypatch):
    model = made()
    before, layer = bits(model), list(lora_layers(model).values())[3]
    merge = type(layer).merge

    def fails(self, *args):
        if self is layer:
            raise torch.OutOfMemoryError("no memory")
        return merge(self, *args)

    monkeypatch.setattr(type(layer), "merge", fails)
    with pytest.raises(torch.OutOfMemoryError), merged_for_generation(model):
        pass
    assert_same(before, bits(model))
    assert not any(m.merged for m in lora_layers(model).values())


def test_what_the_caller_changes_inside_stays():
    model = made()
    with merged_for_generation(model):
        model.train()
        model.base_model.model.config.use_cache = False
    assert model.training and all(m.training for m in model.modules())
    assert not model.config.use_cache


def test_disabled_adapters_inside_unmerge_and_all_is_back():
    model = made()
    before = bits(model)
    with merged_for_generation(model), model.disable_adapter():
        logits(model)  # PEFT unmerges here, which loses bits
    assert_same(before, bits(model))
    assert not any(m.merged for m in lora_layers(model).values())


@pytest.mark.parametrize("active", ["second", ["default", "second"]], ids=str)
def test_two_adapters(active):
    model = made()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    for name, p in model.named_parameters():
        if "second" in name:
            nn.init.normal_(p, std=0.1)
    model.base_model.set_adapter(active)
    accelerate(model)
    before, expected = bits(model), logits(merged_by_peft(model))
    with merged_for_generation(model):
        assert torch.equal(logits(model), expected)
    assert_same(before, bits(model))
    assert model.active_adapters == ([active] if isinstance(active, str) else active)


def test_no_adapter_active_merges_nothing(capsys):
    model = made()
    with model.disable_adapter():
        expected, before = logits(model), bits(model)
        with merged_for_generation(model):
            assert torch.equal(logits(model), expected)
            assert_same(before, bits(model))
    assert "0 layers" in capsys.readouterr().out


def test_lora_bias():
    model = made(biases=True, lora_bias=True)
    before, expected = bits(model), logits(merged_by_peft(model))
    with merged_for_generation(model):
        assert torch.equal(logits(model), expected)
    assert_same(before, bits(model))


def test_lora_bias_without_a_bias_is_left_unmerged(capsys):
    model = made(lora_bias=True)  # PEFT finds out when the weight is merged already
    before, expected = bits(model), logits(model)
    with merged_for_generation(model):
        assert torch.equal(logits(model), expected)
        assert not any(m.merged for m in lora_layers(model).values())
    assert_same(before, bits(model))
    assert "not merged" in (said := capsys.readouterr().out) and "lora_bias" in said


def test_a_tied_weight_is_left_unmerged(capsys):
    base = make_tiny_model(tie_word_embeddings=True).to(BF16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_lora(base, target_modules=["q_proj", "lm_head"]).eval().to(DEVICE)
    before = bits(model)
    embedded = model.get_input_embeddings()(IDS)
    with merged_for_generation(model):
        assert torch.equal(model.get_input_embeddings()(IDS), embedded)
        merged = {n for n, m in lora_layers(model).items() if m.merged}
    assert_same(before, bits(model))
    assert len(merged) == 2 and not any("lm_head" in n for n in merged)
    assert "lm_head: another module uses" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_variants(changes):
    model = made(**changes)
    before, expected = bits(model), logits(merged_by_peft(model))
    caches = {n: dict(m._caches) for n, m in lora_layers(model).items()}
    with merged_for_generation(model):
        assert torch.equal(logits(model), expected)
    assert_same(before, bits(model))
    assert {n: dict(m._caches) for n, m in lora_layers(model).items()} == caches


def test_embeddings_convolutions_and_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, ids):
            x = self.conv(self.embed(ids).mT).mT
            return self.attention(x, x, x)[0]

    targets = ["embed", "conv", "attention"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=targets, init_lora_weights=False)
        model = get_peft_model(Net(), config).eval()
    ids = torch.randint(20, (2, 5))
    unmerged = model(ids)  # here PEFT merges the attention, and unmerges it with a loss
    before = bits(model)
    with merged_for_generation(model):
        inside = model(ids)
    assert_close("merged", inside.detach(), unmerged.detach())
    assert_same(before, bits(model))


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq", "torchao int8"])
def test_quantised_bases(kind, tmp_path, capsys):
    from test_quantized import loaded
    from test_quantized import made as quantised

    make_tiny_model(attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    loaded.cache_clear()
    model = quantised(tmp_path, kind).eval()
    accelerate(model)
    unmerged, before = logits(model), bits(model)
    state = model.state_dict()
    notes = {n: _notes(m) for n, m in lora_layers(model).items()}
    with merged_for_generation(model):
        merged = [m for m in lora_layers(model).values() if m.merged]
        logits(model)
    said = capsys.readouterr().out
    assert len(merged) == 12 or "not merged" in said
    assert_same(before, bits(model))
    assert {n: _notes(m) for n, m in lora_layers(model).items()} == notes
    assert torch.equal(logits(model), unmerged)
    for key, t in model.state_dict().items():
        assert torch.equal(_bytes(t), _bytes(state[key])), key


def _notes(layer):
    """What quantisers note on a weight and beside it: which objects, and which attributes."""
    base = layer.base_layer
    weight = getattr(base, "weight", None)
    found = {k: id(v) for k, v in getattr(weight, "__dict__", {}).items()}
    state = getattr(getattr(base, "state", None), "__dict__", {})
    return id(base), found, {k: id(v) for k, v in state.items() if k != "is_training"}


@pytest.fixture
def decoded(cuda_backend, monkeypatch):
    """How many layers the decode kernel served, by a plan or not."""
    counted, lora_decode, planned = [], decode.lora_decode, served.planned

    def call(*args, **options):
        y = lora_decode(*args, **options)
        counted.append(y is not None)
        return y

    def call_planned(*args):
        y = planned(*args)
        counted.extend([True] * (type(y) is not bool and decode.serves(args[2])))
        return y

    monkeypatch.setattr(decode, "lora_decode", call)
    monkeypatch.setattr(served, "planned", call_planned)
    return counted


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_serves_generate(cache, decoded):
    model = made().to(DEVICE)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = IDS.to(DEVICE)
    accelerate(model)
    tokens = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), cache_implementation=cache,
        disable_compile=DEVICE == "cpu", **options,
    )  # fmt: skip
    assert all(decoded) and (len(decoded) == 4 * 12 or cache == "static")
    assert tokens.shape[1] == ids.shape[1] + 4


def test_decoding_has_the_logits_of_peft(decoded):
    model, ids = made(biases=True, lora_bias=True).to(DEVICE), IDS.to(DEVICE)
    baseline = logits(model, ids).flatten()
    exact = logits(copy.deepcopy(model).double(), ids).flatten()
    accelerate(model)
    ours = logits(model, ids).flatten()
    assert decoded == [True] * 12
    assert_as_accurate("logits", ours, exact, baseline, NETWORK_FACTOR)


def test_decoding_serves_rollouts_with_dropout(decoded):
    """TRL generates in training mode, where PEFT's dropout is on."""
    model, ids = made(lora_dropout=0.5).to(DEVICE), IDS.to(DEVICE)
    accelerate(model)
    without = logits(model, ids)
    model.train()
    decoded.clear()
    first, second = logits(model, ids), logits(model, ids)
    assert decoded == [True] * 24
    assert not torch.equal(first, second) and not torch.equal(first, without)
    model.eval()
    assert torch.equal(logits(model, ids), without)


def test_decoding_leaves_training_and_other_calls_alone(decoded):
    model, ids = made(lora_dropout=0.5).to(DEVICE), IDS.to(DEVICE)
    accelerate(model)
    model(input_ids=ids)  # with autograd
    with model.disable_adapter():
        logits(model, ids)
    logits(model, ids.repeat(40, 1))  # many rows
    assert not decoded
    logits(model, ids)
    assert decoded == [True] * 12


def test_decoding_follows_the_weights(decoded):
    model, ids = made().to(DEVICE), IDS.to(DEVICE)
    accelerate(model)
    before = logits(model, ids)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.mul_(0)
    after = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(after, logits(model, ids)) and not torch.equal(after, before)


def test_merged_and_nested_models_are_refused():
    model = made()
    with merged_for_generation(model):
        with pytest.raises(UserError, match="already merged"), merged_for_generation(model):
            pass
        assert all(m.merged for m in lora_layers(model).values())
    model.merge_adapter()
    with pytest.raises(UserError, match="already merged"), merged_for_generation(model):
        pass


def test_other_refusals(monkeypatch):
    with pytest.raises(UserError, match="no PEFT layers"), merged_for_generation(nn.Linear(2, 2)):
        pass
    model = made()
    with pytest.raises(UserError, match="'disk'"), merged_for_generation(model, keep="disk"):
        pass
    next(iter(lora_layers(model).values())).base_layer.weight.ds_id = 0
    with pytest.raises(UserError, match="ZeRO-3"), merged_for_generation(model):
        pass


def test_kl(capsys):
    model = made()
    accelerate(model)
    model.train()
    before, mask = bits(model), torch.ones_like(IDS)
    mask[0, :3] = 0
    found = merged_kl(model, IDS, mask)
    assert 0.0 < found < 0.1 and f"{found:.3g} nats" in capsys.readouterr().out
    assert model.training
    assert_same(before, bits(model))
    p, q = (_log_probabilities(m.eval()) for m in (model, merged_by_peft(model)))
    rows = [(p[i] - q[i]).mul(p[i].exp()).sum(-1) for i in range(len(p))]
    assert_close("KL", torch.tensor(found), torch.cat(rows).mean().float())


def _log_probabilities(model):
    rows = [IDS[0, 3:], *IDS[1:]]
    return [logits(model, row[None])[0].double().log_softmax(-1) for row in rows]


def test_no_kl_where_merging_changes_nothing():
    model = made(init_std=0.0)  # B is zero
    assert merged_kl(model, IDS) == 0.0


def test_merge_rollouts(tmp_path, capsys):
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import AutoTokenizer

    model = make_lora(make_tiny_model(vocab_size=1024))
    accelerate(model)
    options = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4,
        "max_steps": 2, "learning_rate": 0.1, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        args=trl.GRPOConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1 + 1 =", "2 + 3 ="]}),
        processing_class=AutoTokenizer.from_pretrained(ARITHMETIC / "base"),
    )
    merge_rollouts(trainer)
    with pytest.raises(UserError, match="twice"):
        merge_rollouts(trainer)
    seen, generate = [], type(trainer.model).generate

    def counted(self, *args, **kwargs):
        seen.append(all(m.merged for m in self.modules() if isinstance(m, LoraLayer)))
        return generate(self, *args, **kwargs)

    type(trainer.model).generate = counted
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    adapter = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    try:
        trainer.train()
    finally:
        type(trainer.model).generate = generate
    assert seen == [True, True]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in base.items())
    assert any(not torch.equal(after[n], p) for n, p in adapter.items())
    said = capsys.readouterr().out
    assert said.count("merged_for_generation:") == 1 and said.count("KL(unmerged || merged)") == 1
    del trainer._generate
    assert trainer._generate.__func__ is trl.GRPOTrainer._generate
