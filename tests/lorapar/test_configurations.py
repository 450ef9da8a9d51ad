"""The dtypes, autocast modes and loops that people train and sample in, against plain PEFT."""

import copy
import functools

import pytest
import torch
from against_peft import IDS, cast_base, compare, pair
from conftest import DEVICE, beyond
from torch.nn.functional import cross_entropy

from lorapar.patch import accelerate
from lorapar_kernels.testing import NETWORK_FACTOR, assert_as_accurate, assert_close, error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def no_autocast():
    return torch.autocast(DEVICE, enabled=False)


def autocast(dtype):
    return functools.partial(torch.autocast, DEVICE, dtype=dtype)


# name → dtype of the base, of the adapters, and the context of the forward
CONFIGURATIONS = {
    "peft with trl": (BF16, FP32, autocast(BF16)),
    "trl's loading": (FP32, FP32, autocast(BF16)),
    "qlora's adapters": (BF16, BF16, autocast(BF16)),
    "all bf16": (BF16, BF16, no_autocast),
    "fp32 adapters outside autocast": (BF16, FP32, no_autocast),
    "fp16": (FP16, FP32, autocast(FP16)),
    "fp32 in fp16": (FP32, FP32, autocast(FP16)),
    "all fp32": (FP32, FP32, no_autocast),
}


def models(name, **changes):
    """PEFT's, a patched copy, and the context to run them in."""
    base, adapters, context = CONFIGURATIONS[name]
    plain, _ = pair(init_std=0.1, **changes)
    cast_base(plain, base)
    for n, p in plain.named_parameters():
        if "lora_" in n:
            p.data = p.data.to(adapters)
    patched = copy.deepcopy(plain)
    assert len(accelerate(patched).groups) == 4
    return plain, patched, context


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_outputs_and_gradients(name):
    plain, patched, context = models(name)
    compare(patched, plain, context)
    dtype = CONFIGURATIONS[name][1]
    assert all(p.grad.dtype == dtype for n, p in patched.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_dropout_of_a_twentieth(name):
    """The bits are not PEFT's, the distribution is: the mean of many losses, and its spread."""
    plain, patched, context = models(name, lora_dropout=0.05)
    losses = []
    for model in (patched.train(), plain.train()):
        with torch.no_grad(), context():
            draws = [model(input_ids=IDS, labels=IDS).loss.double() for _ in range(48)]
        losses.append(torch.stack(draws))
    assert len(losses[0].unique()) > 4
    error = (losses[0].var() / 48 + losses[1].var() / 48).sqrt()
    assert (losses[0].mean() - losses[1].mean()).abs() < 5 * error
    assert 1 / 3 < losses[0].std() / losses[1].std() < 3
    patched.zero_grad()
    with context():
        patched(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.isfinite().all() for n, p in patched.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", ["fp16", "fp32 in fp16"])
def test_grad_scaler(name):
    """Scaled gradients, an overflow that skips its step, and the steps after it."""
    plain, patched, context = models(name)
    exact = copy.deepcopy(plain).double()
    results = []
    runs = ((patched, context), (plain, context), (exact, no_autocast))
    for model, inside in runs:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(parameters, lr=0.5)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
        start = [p.detach().clone() for p in parameters]
        for step in range(3):
            optimiser.zero_grad()
            with inside():
                loss = model(input_ids=IDS, labels=IDS).loss
            scaler.scale(loss * (1e9 if step == 0 else 1)).backward()
            scaler.step(optimiser)
            scaler.update()
            if step == 0 and model is not exact:
                assert all(torch.equal(p, q) for p, q in zip(parameters, start))
                assert scaler.get_scale() == 2.0**9
            elif step == 0:  # float64 does not overflow
                for p, q in zip(parameters, start):
                    p.data.copy_(q)
        moved = [(p - q).detach() for p, q in zip(parameters, start)]
        results.append(torch.cat([m.flatten() for m in moved]))
    assert_as_accurate("steps", results[0], results[2], results[1], NETWORK_FACTOR)


@torch.no_grad()
def test_rollouts_outside_autocast():
    """TRL samples with bf16 base and fp32 adapters under no_grad: every step's logits."""
    plain, patched, _ = models("fp32 adapters outside autocast")
    exact = copy.deepcopy(plain).double()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS),
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    made = patched.generate(IDS, **options)
    ids, got = made.sequences, torch.stack(made.logits, 1)
    assert ids.shape == (2, 13)
    where = slice(IDS.shape[1] - 1, -1)
    want = exact(input_ids=ids).logits[:, where]
    base = plain(input_ids=ids).logits[:, where].to(got.dtype)
    assert_as_accurate("logits", got, want, base)
    # Each token is the best one as far as bf16 tells: PEFT in float64 gives none a better logit.
    chosen = want.gather(-1, ids[:, IDS.shape[1] :, None])
    worst = (got.double() - want).abs().max()
    assert (want.max(-1, keepdim=True).values - chosen).max() <= 2 * worst


def train(model, context, steps=50):
    """The loss of every step."""
    generator = torch.Generator().manual_seed(7)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    batches = [torch.randint(3, 1000, (4, 12), generator=generator).to(DEVICE) for _ in range(5)]
    for step in range(steps):
        ids = batches[step % len(batches)]
        with context():
            logits = model(input_ids=ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach().float())
    return torch.stack(losses)


@pytest.mark.parametrize(
    "name", beyond(["trl's loading"], ["all fp32", "peft with trl", "trl's loading"])
)
def test_fifty_steps(name):
    """The curve is PEFT's: in fp32 to the order of sums, in bf16 within the noise of rounding,
    which two unpatched runs show whose adapters differ by less than bf16 can hold."""
    plain, patched, context = models(name)
    exact, other = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.mul_(1 + torch.finfo(BF16).eps * (torch.rand_like(p) - 0.5))
    curve, peft, ideal = train(patched, context), train(plain, context), train(exact, no_autocast)
    assert curve[-1] < curve[0] - 0.1
    if name == "all fp32":
        assert_close("losses", curve, peft)
    else:
        peft = max(peft, train(other, context), key=lambda run: error(run, ideal.double()).peak)
    assert_as_accurate("losses", curve, ideal.double(), peft, NETWORK_FACTOR)
