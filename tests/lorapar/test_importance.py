"""The scoring pass: the released script's formula, at any batch size, on an untouched model."""

import copy
import dataclasses
import gc
import itertools
import json
import re
import shutil
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import score_ranks
import several
import torch
from against_peft import cast_base
from conftest import DEVICE, make_lora, make_tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from lorapar import batches, data, ranks
from lorapar import importance as stage
from lorapar.config import Config, Data, PartitionSettings, Score
from lorapar.errors import UserError
from lorapar.importance import (
    Example,
    accumulate,
    accumulate_each,
    load_scores,
    shuffled,
)
from lorapar.partitioning import adapter_parameters, jaccard, make_partition
from lorapar.patch import accelerate, lora_layers, restore
from lorapar.served import Served
from lorapar.sums import _blocks
from lorapar.template import make_template
from lorapar_kernels import ImportanceSums, importance, select_by_mass
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


def judge(got, exact, plain):
    assert got.keys() == plain.keys()
    for name in got:
        assert_as_accurate(name, got[name], exact[name], plain[name], NETWORK_FACTOR)


def released_and_exact(model, batch):
    return released_script(copy.deepcopy(model), batch), released_script(
        copy.deepcopy(model).double(), batch
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_the_released_formula_at_any_batch_size(batch_size, packed, checkpointed):
    batch, model = examples(), make_lora(make_tiny_model(), init_std=0.3)
    plain, exact = released_and_exact(model, batch)
    sums = accumulate(
        model, batch, batch_size=batch_size, packed=packed, gradient_checkpointing=checkpointed
    )
    got = sums.scores(model, "taylor2")
    judge(got, exact, plain)
    assert jaccard(
        select_by_mass(list(got.values()), 0.9),
        select_by_mass([s.float() for s in exact.values()], 0.9),
    ) > 0.999  # fmt: skip


@pytest.mark.parametrize(
    ("batch_size", "packed", "checkpointed"),
    [(1, False, False), (3, True, False), (16, False, True), (16, True, False)],
)
def test_the_kernels_equal_the_released_formula(batch_size, packed, checkpointed, triton_backend):
    batch = examples(4)
    model = make_lora(make_tiny_model(num_hidden_layers=1), init_std=0.3).to(DEVICE)
    plain, exact = released_and_exact(copy.deepcopy(model).cpu(), batch)
    sums = accumulate(
        model, batch, batch_size=batch_size, packed=packed, gradient_checkpointing=checkpointed
    )
    judge(sums.scores(model, "taylor2"), exact, plain)


@pytest.mark.parametrize("packed", [False, True])
def test_a_base_in_bf16(packed):
    batch, model = examples(), make_lora(make_tiny_model())
    cast_base(model, torch.bfloat16)
    plain, exact = released_and_exact(model, batch)
    judge(accumulate(model, batch, packed=packed).scores(model, "taylor2"), exact, plain)


def test_squares_are_of_examples_and_not_of_batches():
    batch, model = examples(), make_lora(make_tiny_model(), init_std=0.3)
    sums = accumulate(model, batch, batch_size=7)
    of_batch = {n: g.square() for n, g in sums.g.items()}
    assert all((sums.g_squared[n] - of_batch[n]).abs().max() > 0 for n in of_batch)
    one = accumulate(model, batch[:1], batch_size=7)
    for n, g in one.g.items():
        assert_as_accurate(n, one.g_squared[n], g.double().square(), g.square())


@pytest.mark.parametrize(
    "how", ["padded", "packed", "checkpointed", "as the model does", "failing"]
)
@pytest.mark.parametrize("patched", [False, True])
def test_the_model_comes_back_as_it_was(patched, how):
    model = make_lora(make_tiny_model(), lora_dropout=0.5)
    model.train()
    inner = model.base_model.model.model
    inner.layers[0].eval()
    inner.layers[1].forward = inner.layers[1].forward  # on the instance, as accelerate has it
    if patched:
        accelerate(model)
    if how == "as the model does":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    p, other, *_ = adapter_parameters(model).values()
    p.grad = torch.ones_like(p)
    other.requires_grad_(False)
    inner.norm.weight.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    flags = [
        (q.requires_grad, None if q.grad is None else q.grad.clone()) for q in model.parameters()
    ]
    modes = [m.training for m in model.modules()]
    found = attributes(model)
    state = torch.get_rng_state()
    options = {"packed": how in ("packed", "failing"), "batch_size": 3}
    options["gradient_checkpointing"] = how in ("checkpointed", "failing")
    if how == "failing":
        broken = [*examples(), Example([1], [10**6])]  # no such token, in the third batch
        with pytest.raises(IndexError):
            accumulate(model, broken, **options)
    first = accumulate(model, examples(), **options)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    for q, (flag, grad) in zip(model.parameters(), flags):
        assert q.requires_grad == flag
        assert (q.grad is None) == (grad is None) and (grad is None or torch.equal(q.grad, grad))
    assert [m.training for m in model.modules()] == modes
    assert attributes(model) == found
    assert any(isinstance(m, Served) for m in lora_layers(model).values()) == patched
    second = accumulate(model, examples(), **options)  # and nothing random took part
    assert all(torch.equal(first.g[n], second.g[n]) for n in first.g)


def attributes(model):
    """Classes, attributes, hooks and forwards of all modules."""
    skip = ("_parameters", "_buffers", "_modules", "_lorapar_group")
    return {
        n: (type(m), set(vars(m)), {k: str(v) for k, v in vars(m).items() if k not in skip})
        for n, m in model.named_modules()
    }


def test_blocks_are_recomputed_and_the_sums_stay_the_same():
    model = make_lora(make_tiny_model(), init_std=0.3)
    calls, kept, sums = [], [], []

    def run(**options):
        calls.clear(), kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                      lambda t: t):  # fmt: skip
            sums.append(accumulate(model, examples(), batch_size=4, **options))
        return len(calls), sum(kept)

    hook = model.base_model.model.model.layers[1].post_attention_layernorm.register_forward_hook(
        lambda *a: calls.append(torch.is_grad_enabled())
    )
    plain = run()
    asked = run(gradient_checkpointing=True)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    found = run()
    assert plain[0] == 2 and asked[0] == found[0] == 4, "two batches, each block once more"
    assert max(asked[1], found[1]) < plain[1], "what is inside the blocks was kept"
    hook.remove()
    for other in sums[1:]:
        for n in sums[0].g:
            assert torch.equal(sums[0].g[n], other.g[n])
            assert torch.equal(sums[0].g_squared[n], other.g_squared[n])


def test_only_blocks_that_the_model_checkpoints_are(monkeypatch):
    model = make_lora(make_tiny_model())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    one, two = model.base_model.model.model.layers
    two.gradient_checkpointing = False
    assert _blocks(model, model.modules(), True) == [one]
    other = make_lora(make_tiny_model())
    assert not _blocks(other, other.modules(), False)


class Mixer(nn.Module):
    """Tokens, their mixture with those before or after, logits. No block of transformers."""

    def __init__(self, mixes):
        super().__init__()
        self.embedding, self.proj = nn.Embedding(1024, 8), nn.Linear(8, 8)
        self.head, self.mixes = nn.Linear(8, 1024), mixes

    def forward(self, input_ids, position_ids=None, attention_mask=None, use_cache=None):
        h = self.embedding(input_ids)
        if self.mixes == "before":
            h = h.cumsum(1)
        elif self.mixes == "after":
            h = h.flip(1).cumsum(1).flip(1)
        return SimpleNamespace(logits=self.head(self.proj(h)))


class WithoutPositions(Mixer):
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return super().forward(input_ids)


def mixer(mixes, cls=Mixer):
    torch.manual_seed(0)
    return get_peft_model(cls(mixes), LoraConfig(target_modules=["proj"], init_lora_weights=False))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: mixer("before"), "Mixer does not .*: the logits of one change"),
        (lambda: mixer("after"), "Mixer does not .*: the logits of one change"),
        (lambda: mixer(None, WithoutPositions), "WithoutPositions .* takes no position_ids"),
        (lambda: make_mamba(), "MambaForCausalLM does not .*; set score.packed to false"),
    ],
    ids=["before", "after", "no positions", "mamba"],
)
def test_a_model_that_mixes_packed_examples_is_refused(model, why):
    model, batch = model(), examples()
    found = attributes(model)
    with pytest.raises(UserError, match=why):
        accumulate(model, batch, packed=True)
    assert attributes(model) == found
    accumulate(model, batch)  # padded, it is scored


def make_mamba():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=1024, hidden_size=8, state_size=2, num_hidden_layers=1)
    return get_peft_model(
        MambaForCausalLM(config), LoraConfig(target_modules=["in_proj"], init_lora_weights=False)
    )


def test_a_model_that_returns_all_logits_is_scored():
    batch, one = examples(), mixer(None)
    sums = accumulate(one, batch, batch_size=1)
    for packed in (False, True):
        many = accumulate(one, batch, packed=packed)
        for n in sums.g:
            assert_close(n, many.g[n], sums.g[n])
            assert_close(n, many.g_squared[n], sums.g_squared[n])
    with pytest.raises(UserError, match="Mixer has no GradientCheckpointingLayer.*to false"):
        accumulate(one, batch, gradient_checkpointing=True)


@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_made_where_an_answer_is(packed):
    model, seen = make_lora(make_tiny_model()), []
    model.base_model.model.lm_head.register_forward_hook(
        lambda module, x, y: seen.append(list(y.shape[:2]))
    )
    batch = [Example([1, 5, 6, 7], [8, 2]), Example([1, 5, 6], [9, 9, 2])]
    accumulate(model, batch, packed=packed)
    assert seen[-1] == ([1, 5] if packed else [2, 3])  # after 7 and 8; after 6, 9 and 9


class Unused(nn.Module):
    """A model that calls one of two siblings: the other's output is made and waits."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(1024, 8), nn.Linear(8, 1024)
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=self.head(self.q_proj(self.embedding(input_ids))))


def make_unused():
    torch.manual_seed(0)
    return get_peft_model(
        Unused(), LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    )


def test_sums_go_to_the_host_in_pieces(monkeypatch):
    """However these are cut, each parameter gets its own."""
    batch, model = examples(3), make_lora(make_tiny_model())
    whole = accumulate(model, batch)
    for size in (1, 1000):
        monkeypatch.setattr("lorapar.sums._COPY_BYTES", size)
        cut = accumulate(model, batch)
        for n in whole.g:
            assert torch.equal(cut.g[n], whole.g[n])
            assert torch.equal(cut.g_squared[n], whole.g_squared[n])


def test_batches_hold_examples_of_like_length(monkeypatch):
    """So little is padded; the longest come first. The dearest batch is as cheap as it can be."""
    seen, padded = [], batches._padded

    def recorded(tokens, pad_token_id):
        seen.append([len(ids) for ids in tokens])
        return padded(tokens, pad_token_id)

    monkeypatch.setattr(batches, "_padded", recorded)
    batch, model = examples(10), make_lora(make_tiny_model())
    accumulate(model, batch, batch_size=4)
    lengths = sorted(map(len, batch), reverse=True)
    assert sum(seen, []) == lengths and lengths[0] > lengths[-1]

    def dearest(cuts):
        return max((j - i) * lengths[i] for i, j in itertools.pairwise([0, *cuts, 10]))

    ways = [(i, j) for i in range(1, 5) for j in range(i + 1, i + 5) if 6 <= j < 10]
    assert max(len(one) * one[0] for one in seen) == min(map(dearest, ways)) and len(seen) == 3


def lengths_of(count, low, high):
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [Example([1] * (n // 2), [2] * (n - n // 2)) for n in lengths]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_get_shares_of_like_cost(world, packed):
    parts = [lengths_of(50, 80, 420), lengths_of(49, 80, 420), lengths_of(51, 150, 600)]
    shares = batches.deal(parts, 16, world, packed=packed)
    assert len(shares) == world and max(map(len, shares)) - min(map(len, shares)) <= 1
    for i, part in enumerate(parts):
        dealt = [e for share in shares for at, batch in share if at == i for e in batch]
        assert sorted(map(id, dealt)) == sorted(map(id, part))
    cost = (lambda b: sum(map(len, b))) if packed else (lambda b: len(b) * max(map(len, b)))
    costs = [sum(cost(batch) for _, batch in share) for share in shares]
    assert max(costs) <= 1.07 * sum(costs) / world
    assert sum(costs) <= 1.2 * sum(len(e) for part in parts for e in part)
    for share in shares:
        assert all(0 < len(batch) <= 16 for _, batch in share)
        assert [at for at, _ in share] == sorted(at for at, _ in share)
    if world == 1:
        alone = [[batch for _, batch in batches.deal([p], 16, 1, packed=packed)[0]] for p in parts]
        assert [batch for _, batch in shares[0]] == sum(alone, [])


def test_few_examples_are_dealt_too():
    one, two = lengths_of(2, 5, 9)
    assert batches.deal([[one], [two]], 16, 1) == [[(0, [one]), (1, [two])]]
    assert sorted(map(len, batches.deal([[one], [two]], 16, 4))) == [0, 0, 1, 1]
    assert sorted(map(len, batches.deal([[one, two]], 16, 2))) == [1, 1]
    shares = batches.deal([[one] * 9], 2, 4)
    assert [[len(batch) for _, batch in share] for share in shares] == [[2, 1], [2], [2], [2]]


@pytest.mark.parametrize(
    "options", [{}, {"packed": True}, {"gradient_checkpointing": True, "on_host": False}]
)
def test_parts_in_one_pass_are_as_passes_of_their_own(options):
    parts = [examples(7), examples(1, seed=4), examples(5, seed=5)]
    model, done = make_lora(make_tiny_model(), init_std=0.3), Counter()
    options["batch_size"] = 3
    found = accumulate_each(model, parts, **options, advance=lambda n, part: done.update({part: n}))
    assert done == {0: 7, 1: 1, 2: 5}
    for part, sums in zip(parts, found, strict=True):
        alone = accumulate(model, part, **options)
        assert sums.count == alone.count == len(part)
        for kind in ("g", "g_squared"):
            got, expected = getattr(sums, kind), getattr(alone, kind)
            assert [*got] == [*expected] == [*adapter_parameters(model)]
            assert all(torch.equal(got[n], t) and t.any() for n, t in expected.items())
    for bad in ([], [examples(2), []]):
        with pytest.raises(UserError, match="got no examples"):
            accumulate_each(model, bad)


@pytest.mark.parametrize("make", [lambda: make_lora(make_tiny_model()), make_unused])
@pytest.mark.parametrize("patched", [False, True])
def test_nothing_keeps_the_sums_on_the_device(patched, make, monkeypatch):
    made = weakref.WeakSet()

    class Watched(ImportanceSums):
        def __init__(self, *args):
            super().__init__(*args)
            made.add(self)

    monkeypatch.setattr("lorapar.sums.ImportanceSums", Watched)
    model = make()
    if patched:
        accelerate(model)
    gc.disable()
    try:
        sums = accumulate(model, examples(3))
        assert sums.count == 3 and not made
    finally:
        gc.enable()


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


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_on_the_head_is_scored_too(packed):
    """Its layer has to see every row, so all logits are made."""
    model = make_lora(make_tiny_model(tie_word_embeddings=False), target_modules=["lm_head"])
    batch = examples()
    plain = released_script(copy.deepcopy(model), batch)
    exact = released_script(copy.deepcopy(model).double(), batch)
    got = accumulate(model, batch, batch_size=3, packed=packed).scores(model, "taylor2")
    assert len(got) == 2
    for name in got:
        assert_as_accurate(name, got[name], exact[name], plain[name], NETWORK_FACTOR)


def test_a_stray_rank_in_the_environment_changes_nothing(monkeypatch):
    batch, model = examples(3), make_lora(make_tiny_model())
    alone = accumulate(model, batch)
    monkeypatch.setenv("RANK", "1")
    again = accumulate(model, batch)
    assert all(torch.equal(again.g[n], alone.g[n]) for n in alone.g)
    assert ranks.first(lambda: "ran") == "ran" and ranks.launched_rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher's, of a script that made no group
    again = accumulate(model, batch)
    assert all(torch.equal(again.g[n], alone.g[n]) for n in alone.g)
    assert ranks.launched_rank() == 1


def test_models_that_cannot_be_scored_are_refused():
    with pytest.raises(UserError, match="LlamaForCausalLM has no LoRA layers"):
        accumulate(make_tiny_model(), examples())
    with pytest.raises(UserError, match="12 LoRA layers cannot be scored: .*not plain LoRA"):
        accumulate(make_lora(make_tiny_model(), use_dora=True), examples())
    half = make_lora(make_tiny_model())
    accelerate(half)
    restore(half.base_model.model.model.layers[0].mlp)
    with pytest.raises(UserError, match="3 LoRA layers cannot be scored: .*not patched; call acc"):
        accumulate(half, examples())
    with pytest.raises(UserError, match="got no examples"):
        accumulate(make_lora(make_tiny_model()), [])
    with pytest.raises(UserError, match=r"examples \[1\] have no completion"):
        accumulate(make_lora(make_tiny_model()), [Example([1], [2]), Example([1], [])])


ROWS = [
    {"id": f"{system}-{i}", "question": f"What is {i} + 1?", "answer": f"{i} + 1\n#### {i + 1}",
     "system": system}
    for system in ("system1", "system2")
    for i in range(8)
]  # fmt: skip


@pytest.fixture
def config(tiny_folder, tmp_path):
    """A run that has labels, as if the label stage had been run."""
    made = Config(
        model=str(tiny_folder),
        data=Data("x.jsonl"),
        adapter={"r": 2},
        score=Score(examples=5, batch_size=2),
        run_dir=str(tmp_path / "run"),
    )
    label(made, ROWS)
    return made


def label(config, rows):
    folder = Path(config.run_dir)
    folder.mkdir(exist_ok=True)
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed(config, section, **values):
    changed = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})


def scores_of(config):
    """Scores of both systems, and the file's metadata."""
    return load_scores(Path(config.run_dir) / "importance.safetensors")


def test_rows_that_cannot_be_scored_are_skipped_counted_and_said(config, caplog):
    config = dataclasses.replace(
        changed(config, "score", examples=8), template={"completion": "{answer}"}
    )
    rows = copy.deepcopy(ROWS)
    for i in (0, 2, 4, 6):
        rows[i]["question"] = "1 + " * 400
    rows[1]["answer"] = "1 + 1 = 2\n####"  # the EOS alone
    label(config, rows)
    summary = stage.score(config)
    assert summary["examples"] == {"system1": 3, "system2": 8}
    assert summary["skipped"]["system1"] == {"too_long": 4, "no_answer": 1}
    assert summary["skipped"]["system2"] == {"too_long": 0, "no_answer": 0}
    assert summary["halves"] == {"system1": [2, 1], "system2": [4, 4]}
    meta = scores_of(config)[2]
    assert {key: meta[key] for key in ("examples", "skipped", "halves")} == {
        key: summary[key] for key in ("examples", "skipped", "halves")
    }
    (said,) = (r.getMessage() for r in caplog.records if r.name == "lorapar")
    assert said.startswith("score system1: skipped 4 longer than the model's context of 512 tokens")
    assert re.search(r"\(row system1-\d, system1-\d, system1-\d, …\), 1 without answer", said)
    assert said.endswith("(row system1-1)")


def test_an_answer_that_is_the_templates_text_alone_is_none(config):
    config = dataclasses.replace(config, template="xml")
    rows = copy.deepcopy(ROWS)
    rows[2]["answer"] = "2 + 1 = 3\n####"
    label(config, rows)
    config = changed(config, "score", examples=8)
    assert stage.score(config)["skipped"]["system1"] == {"too_long": 0, "no_answer": 1}


def test_a_row_of_exactly_the_context_is_scored(tokenizer):
    template, model = make_template("gsm8k"), make_lora(make_tiny_model())
    row = data.Row("r", "1 + 1?", "#### 2")
    length = sum(
        len(ids)
        for ids in (
            template.prompt_ids(tokenizer, row.question),
            template.completion_ids(tokenizer, row.answer),
        )
    )
    for limit, skipped in ((length, 0), (length - 1, 1)):
        model.config.max_position_embeddings = limit
        rows = [row, data.Row("short", "", "2")]
        assert stage.usable(rows, template, tokenizer, model, 2, "x")[1]["too_long"] == skipped


def test_the_next_rows_stand_in_for_those_that_are_skipped(config):
    rows = copy.deepcopy(ROWS)
    order = stage.in_random_order(list(range(8)), config, 0)
    for i in order[1:4]:
        rows[i]["question"] = "1 + " * 400
    label(config, rows)
    first = stage.score(config)
    assert first["examples"] == {"system1": 5, "system2": 5}
    assert first["skipped"]["system1"]["too_long"] == 3
    got = scores_of(config)[0]
    label(config, [r for i, r in enumerate(rows) if i in (order[0], *order[4:]) or i >= 8])
    assert stage.score(config)["skipped"]["system1"]["too_long"] == 0
    for n, s in scores_of(config)[0].items():
        assert_close(n, got[n], s)


def test_no_row_that_can_be_scored_is_a_message(config):
    label(config, [{**row, "question": "1 + " * 400} for row in ROWS[:8]] + ROWS[8:])
    with pytest.raises(
        UserError,
        match=r"score system1: none of 8 rows can be scored: 8 longer than the model's context of "
        r"512 tokens \(row system1-\d, .*…\); change the data or the template",
    ):
        stage.score(config)


def spoil(monkeypatch, value):
    """Scoring whose Σg of one parameter gets `value`, or of all for None."""

    def spoiled(*args, **options):
        found = accumulate_each(*args, **options)
        for sums in found:
            if value is None:
                for t in (*sums.g.values(), *sums.g_squared.values()):
                    t.zero_()
            else:
                sums.g["model.layers.1.mlp.up_proj.lora_A.weight"][:, 3] = value
        return found

    monkeypatch.setattr(stage, "accumulate_each", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(config, value, monkeypatch):
    spoil(monkeypatch, value)
    with pytest.raises(
        UserError,
        match=r"score: 2 scores of system1 are NaN or Inf, in 1 parameters: "
        r"model.layers.1.mlp.up_proj.lora_A.weight \(2 of 64\); look for NaN",
    ):
        stage.score(config)
    assert not (Path(config.run_dir) / "importance.safetensors").exists()


def test_scores_that_are_all_zero_are_refused(config, monkeypatch):
    spoil(monkeypatch, None)
    with pytest.raises(UserError, match="score: all scores of system1 are zero"):
        stage.score(config)
    assert not (Path(config.run_dir) / "importance.safetensors").exists()


@pytest.mark.parametrize("granularity", ["element", "column"])
@pytest.mark.parametrize("variant", ["taylor2", "taylor1", "fisher"])
def test_the_null_control_is_the_overlap_of_two_halves(config, variant, granularity, monkeypatch):
    config = changed(config, "score", variant=variant)
    config = changed(config, "partition", granularity=granularity, theta=0.6)
    halves = []

    def watched(model, parts, **options):
        found = accumulate_each(model, parts, **options)
        halves.extend(sums.scores(model, variant) for sums in found)
        return found

    monkeypatch.setattr(stage, "accumulate_each", watched)
    summary = stage.score(config)
    assert summary["halves"] == {"system1": [3, 2], "system2": [3, 2]}
    settings = PartitionSettings(theta=0.6, granularity=granularity)
    for system, pair in zip(("system1", "system2"), (halves[:2], halves[2:])):
        expected = make_partition(*pair, settings).jaccard()
        assert summary["null_jaccard"][system] == expected and 0 < expected < 1
    null = scores_of(config)[2]["null_jaccard"]
    assert null == {**summary["null_jaccard"], "theta": 0.6, "granularity": granularity,
                    "per_layer": False}  # fmt: skip


def test_the_null_control_of_random_masks_is_that_of_chance(config):
    config = changed(config, "score", variant="random")
    summary = stage.score(config)
    share = make_partition(*scores_of(config)[:2], config.partition).jaccard()
    for null in summary["null_jaccard"].values():
        assert abs(null - share) < 0.05  # two independent masks of such sizes, too
    assert stage.score(changed(config, "score", variant="taylor2"))["null_jaccard"]["system1"] > 0.6


def test_masks_off_have_no_null_control(config):
    summary = stage.score(dataclasses.replace(config, partition=None))
    assert summary["null_jaccard"] == {"system1": None, "system2": None}
    assert scores_of(config)[2]["null_jaccard"]["theta"] is None


def test_how_a_pass_is_run_does_not_change_what_it_made(config):
    stage.score(config)
    one, two, meta = scores_of(config)
    other = changed(config, "score", batch_size=16, packed=True, gradient_checkpointing=True)
    assert stage.settings_and_inputs(other) == stage.settings_and_inputs(config)
    stage.score(other)
    for before, after in zip((one, two), scores_of(other)):
        for n in before:
            assert_close(n, after[n], before[n])
    assert scores_of(other)[2].keys() == meta.keys()


@pytest.fixture
def config_file(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    return path


@pytest.mark.more
def test_two_processes_equal_one(config, config_file, tmp_path):
    expected = {case: score_ranks.sums_of(case) for case in score_ranks.CASES}
    alone = changed(config, "score", batch_size=5)
    summary = stage.score(dataclasses.replace(alone, run_dir=config.run_dir))
    one, two, meta = scores_of(config)
    for name in ("importance.safetensors", "stages.json"):
        (Path(config.run_dir) / name).unlink()
    shutil.rmtree(Path(config.run_dir) / "init")

    out = str(tmp_path / "out")
    several.finish(several.start(score_ranks.__file__, out, config_file))
    results = [torch.load(f"{out}.{rank}") for rank in range(2)]
    for case, parts in expected.items():
        for result in results:
            for sums, got in zip(parts, result[case], strict=True):
                assert got["count"] == sums.count
                for kind in ("g", "g_squared"):
                    for n, t in getattr(sums, kind).items():
                        assert_close(f"{case}: {kind} of {n}", got[kind][n], t)
    assert results[1]["broken"].startswith("IndexError")
    assert results[0]["broken"].startswith("UserError: process 1 failed: IndexError: ")
    assert results[0]["summary"] == results[1]["summary"]
    for key in ("examples", "skipped", "halves"):
        assert results[0]["summary"][key] == summary[key]
    for before, after in zip((one, two), scores_of(config)):
        for n in before:
            assert_close(n, after[n], before[n])
    assert scores_of(config)[2].keys() == meta.keys()


@pytest.mark.more
@pytest.mark.skipif(torch.cuda.is_available(), reason="starts two processes on a CPU")
def test_the_command_line_on_two_processes(config, config_file):
    stage.score(config)
    one, two, _ = scores_of(config)
    (Path(config.run_dir) / "importance.safetensors").unlink()
    command = ("-m", "lorapar.cli", "score", config_file)
    (said,) = several.finish([several.torchrun(2, *command, CUDA_VISIBLE_DEVICES="")])
    assert said.count("lorapar score") == 1, said
    for before, after in zip((one, two), scores_of(config)):
        for n in before:
            assert_close(n, after[n], before[n])


def test_an_incomplete_launch_is_a_message(config, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but .*MASTER_ADDR.*start with torchrun"):
        stage.score(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 has no GPU, 1 are here; start one a GPU"):
        stage.score(config)
