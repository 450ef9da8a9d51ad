"""Partition: the released script's set algebra, column form, files that check what they hold."""

import math

import pytest
import torch
from conftest import make_lora, make_tiny_model, released_rule
from hypothesis import given
from hypothesis import strategies as st

from lorapar.config import PartitionSettings
from lorapar.errors import UserError
from lorapar.partitioning import (
    Partition,
    _padded,
    adapter_parameters,
    everything,
    make_partition,
    summary,
)
from lorapar_kernels.bits import count_bits, pack_bits, unpack_bits

SHAPES = {f"l{i}.{s}.weight": shape for i in range(3)
          for s, shape in (("lora_A", (4, 20)), ("lora_B", (12, 4)))}  # fmt: skip


def scores(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s, generator=generator).pow(3) for n, s in SHAPES.items()}


def flat(tensors) -> list:
    return torch.cat([t.flatten() for t in tensors.values()]).tolist()


def released(one, two, theta, alpha, beta):
    """example.py 668-721 with Python sets over a flat index."""

    s1, s2 = released_rule(one, theta), released_rule(two, theta)
    shared = s1 & s2

    def top(values, fraction):
        return set(sorted(shared, key=lambda i: -values[i])[: math.floor(fraction * len(shared))])

    return s1, s2, (s1 - s2) | top(one, alpha), (s2 - s1) | top(two, beta)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("theta", [0.1, 0.5, 0.9])
def test_equals_the_released_script(theta, alpha, beta):
    one, two = scores(1), scores(2)
    assert len(set(flat(one))) == len(flat(one))  # no ties
    made = make_partition(one, two, PartitionSettings(theta, alpha, beta))
    got = [{i for i, v in enumerate(flat(getattr(made, kind))) if v}
           for kind in ("system1", "system2", "sft", "rl")]  # fmt: skip
    assert got == list(released(flat(one), flat(two), theta, alpha, beta))


def test_theta_0_gives_none_and_1_all():
    for theta in (0.0, 1.0):
        made = make_partition(scores(1), scores(2), PartitionSettings(theta))
        assert made.active_share("sft") == made.active_share("rl") == theta
        assert made.counts()["shared"] == theta * made.counts()["all"]


def test_column_granularity_keeps_whole_columns_by_their_summed_importance():
    one, two = scores(1), scores(2)
    made = make_partition(one, two, PartitionSettings(0.6, granularity="column"))
    sums = {f"l{i}": one[f"l{i}.lora_A.weight"].sum(1) + one[f"l{i}.lora_B.weight"].sum(0)
            for i in range(3)}  # fmt: skip
    ranked = sorted(
        ((float(v), n, k) for n, s in sums.items() for k, v in enumerate(s)), reverse=True
    )
    kept, running = set(), 0.0
    for value, n, k in ranked:
        running += value
        kept.add((n, k))
        if running >= 0.6 * sum(v for v, *_ in ranked):
            break
    for n in sums:
        for k in range(4):
            want = (n, k) in kept
            assert (made.system1[f"{n}.lora_A.weight"][k] == want).all()
            assert (made.system1[f"{n}.lora_B.weight"][:, k] == want).all()


def test_one_cut_a_layer_is_another_rule_and_says_so():
    one, two = scores(1), scores(2)
    one["l1.lora_A.weight"] *= 100  # takes nearly all of a global cut
    for n in ("l2.lora_A.weight", "l2.lora_B.weight"):
        two[n].zero_()
    settings = PartitionSettings(0.6, per_layer=True)
    made = make_partition(one, two, settings, {"partition": vars(settings)})
    for layer in ("l0", "l1", "l2"):
        for scored, kept in ((one, made.system1), (two, made.system2)):
            names = [f"{layer}.lora_{side}.weight" for side in "AB"]
            values = torch.cat([scored[n].flatten() for n in names])
            mask = torch.cat([kept[n].flatten() for n in names]).tolist()
            if values.any():
                want = released_rule(values.tolist(), 0.6)
                assert {i for i, v in enumerate(mask) if v} == want
            else:
                assert not any(mask)
    all_ = make_partition(one, two, PartitionSettings(1.0, per_layer=True))
    assert all_.active_share("sft") == 1.0 and all(m.all() for m in all_.rl.values())
    zeros = {n: torch.zeros_like(s) for n, s in one.items()}
    with pytest.raises(ValueError, match="all scores of all layers are zero"):
        make_partition(one, zeros, settings)
    whole = make_partition(one, two, PartitionSettings(0.6), {"partition": vars(settings)})
    assert made.system1["l0.lora_B.weight"].any() and not whole.system1["l0.lora_B.weight"].any()
    assert "not the paper's" in summary(made)["rule"]
    columns_ = make_partition(
        one, one, PartitionSettings(0.6, granularity="column", per_layer=True)
    )
    assert all(columns_.system1[n].any() for n in SHAPES)


def test_bad_scores_are_named():
    one, two = scores(1), scores(2)
    two["l1.lora_B.weight"][3, :3] = torch.nan
    with pytest.raises(ValueError, match=r"l1.lora_B.weight \[12, 4\] has 3 elements that are NaN"):
        make_partition(one, two, PartitionSettings(0.9))
    with pytest.raises(UserError, match="scores are of different adapters"):
        make_partition(one, {**two, "l1.lora_B.weight": torch.rand(4, 12)}, PartitionSettings(0.9))


def test_the_order_of_names_does_not_matter():
    one, two = scores(1), scores(2)
    turned = dict(reversed(two.items()))
    first, second = (
        make_partition(one, t, PartitionSettings(0.7, 0.5, 0.5)) for t in (two, turned)
    )
    assert all(torch.equal(first.rl[n], second.rl[n]) for n in SHAPES)


def test_counts_and_jaccard_agree():
    made = make_partition(scores(1), scores(2), PartitionSettings(0.9))
    c = made.counts()
    assert c["system1_only"] + c["system2_only"] + c["shared"] + c["neither"] == c["all"] == 384
    assert made.jaccard() == c["shared"] / (c["all"] - c["neither"])
    assert made.active_share("sft") == (c["system1_only"] + c["shared"]) / c["all"]


@given(st.lists(st.booleans(), max_size=70))
def test_packing_loses_nothing(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.numel() == math.ceil(len(bits) / 8)
    assert torch.equal(unpack_bits(packed, [len(bits)]), mask)
    assert [int(n) for n in count_bits(packed)] == [
        sum(bits[i : i + 8]) for i in range(0, len(bits), 8)
    ]


def test_file_round_trip(tmp_path):
    made = make_partition(scores(1), scores(2), PartitionSettings(0.7), {"seed": 3})
    made.save(tmp_path / "partition.safetensors")
    again = Partition.load(tmp_path / "partition.safetensors")
    assert again.meta == {"seed": 3}
    for kind in ("system1", "system2", "sft", "rl"):
        for name, mask in getattr(made, kind).items():
            assert torch.equal(mask, getattr(again, kind)[name])
    assert [p.name for p in tmp_path.iterdir()] == ["partition.safetensors"]


def test_a_partition_of_another_model_is_refused():
    partition = everything(make_lora(make_tiny_model()))
    with pytest.raises(
        UserError, match=r"(?s)of another model.*lora_A.weight: \[4, 32\] in the part"
    ):
        partition.check_model(make_lora(make_tiny_model(), r=5))
    with pytest.raises(UserError, match="v_proj.lora_A.weight: only in the partition"):
        partition.check_model(make_lora(make_tiny_model(), target_modules=["q_proj"]))
    with pytest.raises(UserError, match="only in the model"):
        small = everything(make_lora(make_tiny_model(), target_modules=["q_proj"]))
        small.check_model(make_lora(make_tiny_model()))


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "broken").write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="broken: not a readable partition"):
        Partition.load(tmp_path / "broken")
    with pytest.raises(UserError, match="missing: not a readable partition"):
        Partition.load(tmp_path / "missing")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(UserError, match="other: not a partition made by this version"):
        Partition.load(tmp_path / "other")


def test_an_offset_stays_live_where_columns_are_dropped():
    """Its columns belong to no system, but the start is at the base model through them."""
    whole, inside = scores(1), {}
    for n, s in whole.items():
        inside[n] = s[:2] if "lora_A" in n else s[:, :2]
    settings = PartitionSettings(0.3, granularity="column", drop_unselected=True)
    made = _padded(make_partition(inside, inside, settings), whole)
    for n, flags in made.meta["live"].items():
        assert len(flags) == 4 and flags[2:] == [True, True]
        assert not made.sft[f"{n}.lora_A.weight"][2:].any()
    assert not all(all(flags[:2]) for flags in made.meta["live"].values())


def test_an_offset_is_never_trained():
    model = make_lora(make_tiny_model(), r=6)
    partition = everything(model, trainable_rank=3)
    partition.check_model(model)
    for name, p in adapter_parameters(model).items():
        mask = partition.sft[name]
        first, rest = (mask[:3], mask[3:]) if "lora_A" in name else (mask[:, :3], mask[:, 3:])
        assert first.all() and not rest.any() and mask.shape == p.shape
    assert partition.active_share("sft") == 1.0  # the offset belongs to no share
    half = sum(p.numel() for p in adapter_parameters(model).values()) // 2
    assert partition.counts()["all"] == partition.counts()["shared"] == half
