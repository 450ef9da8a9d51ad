"""Packed gradients are those of DDP, and whole adapters beside FSDP2's shards stay the same."""

import weakref

import pytest
import reduction_ranks
import several
import torch
from conftest import make_lora, make_tiny_model
from masked_ranks import partition_for
from reduction_ranks import ACCELERATED, DDP, REPLICAS, STEPS
from transformers import TrainerState

from lorapar.callback import LoraParCallback
from lorapar_kernels.testing import assert_close

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes wrote, all cases in one start."""
    out = tmp_path_factory.mktemp("reduction") / "two"
    several.finish(several.start(reduction_ranks.__file__, out), 400)
    return [torch.load(f"{out}.{rank}", map_location="cpu") for rank in "01"]


def results(ranks: list[dict], case: str) -> list[dict]:
    found = [rank[case] for rank in ranks]
    assert all(isinstance(one, dict) for one in found), found  # else the traceback
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", DDP)
def test_packed_gradients_are_those_of_ddp(case, ranks):
    """Bit for bit, in three steps over several buckets, and only what trains is sent."""
    for rank in results(ranks, case):
        ours, theirs = rank["ours"], rank["theirs"]
        for step in range(STEPS):
            a, b = ours["steps"][step], theirs["steps"][step]
            assert a.keys() == b.keys() and any(g.any() for g in a.values())
            assert all(torch.equal(a[n], b[n]) for n in a)
        needed = ours["trainable"] + ours["others"]
        assert ours["sent"] == (needed, ours["adapter"] + ours["others"])
        assert 0.2 < ours["trainable"] / ours["adapter"] < 0.5
        assert [sum(sizes) for sizes in ours["sizes"]] == [needed] * STEPS
        assert len(ours["sizes"][-1]) > 1 and not any(theirs["sizes"])


@pytest.mark.slow
def test_the_hook_is_registered_once_and_follows_the_stage(ranks):
    """Another stage's masks on the same wrapper, then none."""
    for rank in results(ranks, "states"):
        (sft, said), (rl, said_then), (everything, total) = rank["sizes"]
        assert (sft, rl, everything) == (said, said_then, total) and total == rank["total"]
        assert sft < total and rl < total and sft != rl


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, message",
    [
        ("unlike", "1 masks differ between processes, the first of them model.layers.0"),
        ("unknown", "norm: no such parameter"),
        ("shape", "needs bool [4, 32], got torch.float32 [4, 32]"),
        ("no DDP", "needs a DistributedDataParallel, got PeftModel"),
        ("taken", "DDP takes one communication hook, and refused this one"),
        ("added", "packed_reduce=True).attach(trainer), not add_callback"),
    ],
)
def test_what_cannot_be_packed_is_refused(case, message, ranks):
    assert all(message in rank[case] for rank in results(ranks, "states"))


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True], ids=["served", "left to PEFT"])
def test_trls_trainer_packed_equals_unpacked(left, ranks):
    """Accumulated, clipped, trained twice with one wrapper; one layer left to PEFT or none."""
    for rank in results(ranks, "trainers"):
        packed, plain = rank[f"{left} True"], rank[f"{left} False"]
        assert packed["wrapper"] == "DistributedDataParallel"
        assert packed["norms"] == plain["norms"] and len(plain["norms"]) == STEPS
        assert all(torch.equal(t, plain["after"][n]) for n, t in packed["after"].items())
        assert plain["sent"] == 0 and packed["sent"] == 2 * STEPS * packed["step"]


@pytest.mark.slow
@pytest.mark.parametrize("case", REPLICAS)
def test_adapters_beside_shards_train_as_in_one_process(case, ranks):
    """Frozen elements and the processes bit for bit, the steps as of one larger batch."""
    two, one = results(ranks, f"replicas, {case}"), REPLICAS[case]()
    for rank in two:
        assert not rank["message"] and rank["norms"] == two[0]["norms"]
        assert rank["extra"] == one["extra"] == [True]  # nobody had a gradient at the end
        if case == "bf16":
            assert rank["norms"] == pytest.approx(one["norms"], rel=0.02)
        else:
            assert_close("norms", torch.tensor(rank["norms"]), torch.tensor(one["norms"]))
        for name, now in rank["trained"].items():
            assert torch.equal(now, two[0]["trained"][name])
            if case != "bf16":
                assert_close(name, now, one["trained"][name].cpu())
        for name, mask in one["masks"].items():
            start, now = rank["before"][name], rank["after"][name]
            assert torch.equal(start[~mask], now[~mask])
            assert (start != now)[mask].float().mean() > 0.9
        times = {"accumulated, nobody says": 2}.get(case, 1)
        assert rank["sizes"] == [[rank["sent"]] * times] * STEPS


@pytest.mark.slow
@pytest.mark.parametrize("case", ACCELERATED)
def test_adapters_that_accelerate_leaves_out_of_sharding(case, ranks, tmp_path, monkeypatch):
    """TRL's trainer with `fsdp_ignored_modules`, accumulated and clipped, as in one process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # else transformers would use all
    two, one = results(ranks, f"accelerate, {case}"), ACCELERATED[case](str(tmp_path / "one"))
    for rank in two:
        assert rank["kinds"] == {True} and rank["lora"] == {False}
        assert len(rank["norms"]) == STEPS and rank["norms"] == two[0]["norms"]
        assert_close("norms", torch.tensor(rank["norms"]), torch.tensor(one["norms"]))
        for name, mask in one["masks"].items():
            start, now = rank["before"][name], rank["after"][name]
            assert torch.equal(start[~mask], now[~mask])
            assert torch.equal(now, two[0]["after"][name])
            assert_close(name, now - start, (one["after"][name] - one["before"][name]).cpu())


@pytest.mark.slow
def test_adapters_that_drift_apart_are_named(ranks):
    """At the end where nothing averaged, at the start where they were never the same."""
    for rank in results(ranks, "broken"):
        assert "37 of 37 parameters" in rank["message"]
        assert "differ between processes after training" in rank["message"]
    for rank in results(ranks, "unlike"):
        assert "1 of 37 parameters" in rank["message"]
        assert "before training, the first of them extra; seed" in rank["message"]


@pytest.mark.slow
def test_sharded_adapters_cannot_be_packed(ranks):
    for rank in results(ranks, "sharded adapter"):
        assert "FSDP2 has sharded this adapter; leave packed_reduce out" in rank["message"]


def test_one_process_needs_no_wrapper():
    """packed_reduce in a script that is started alone: nothing is sent, nothing is refused."""
    model = make_lora(make_tiny_model())
    callback = LoraParCallback(partition_for(model), "sft", packed_reduce=True)
    events = (None, TrainerState(), None)
    callback.on_train_begin(*events, model=model)
    assert callback._packed is None and callback._replicas is None
    callback.on_train_end(*events, model=model)


def test_a_trainer_is_not_kept_alive(tokenizer, tmp_path):
    """The callback finds DDP's wrapper through the trainer, and holds it weakly."""
    from test_callback import sft_trainer

    model = make_lora(make_tiny_model())
    trainer = sft_trainer(model, tokenizer, tmp_path)
    callback = LoraParCallback(partition_for(model), "sft").attach(trainer)
    assert callback._trainer() is trainer and isinstance(callback._trainer, weakref.ref)
