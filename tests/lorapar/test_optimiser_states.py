"""MaskedAdamW's state under FSDP2: saved on some ranks and loaded on others."""

from types import SimpleNamespace

import optimiser_ranks
import pytest
import several
import torch
from optimiser_ranks import AFTER, BEFORE, KINDS, OPTIONS, Net, make_optimiser, run, values

from lorapar_kernels.testing import assert_close

WORLD = max(2, torch.cuda.device_count() // 2 * 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> SimpleNamespace:
    """What the ranks found, and the same run unsharded: its state midway, and its end."""
    folder = tmp_path_factory.mktemp("states")
    model = Net()
    optimiser = make_optimiser(model)
    run(model, optimiser, BEFORE)
    middle = {"model": values(model), "optimiser": optimiser.state_dict()}
    torch.save(middle, folder / "one")
    middle = torch.load(folder / "one", weights_only=True)
    run(model, optimiser, AFTER)
    several.finish(several.start(optimiser_ranks.__file__, folder, world=WORLD))
    where = torch.device("cpu")
    ranks = [torch.load(folder / str(r), map_location=where) for r in range(WORLD)]
    return SimpleNamespace(ranks=ranks, middle=middle, end=values(model))


def check_end(end, expected) -> None:
    for name, p in expected.items():
        assert_close(name, end[name], p)


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", ["by_itself", "hybrid"])
def test_a_state_is_of_whole_parameters_on_every_rank(case, found):
    expected = found.middle["optimiser"]
    for rank in found.ranks:
        state = rank[case]["optimiser"]
        assert state["param_groups"] == expected["param_groups"]
        frozen = state["state"].pop(state["param_groups"][0]["param_names"].index("inner.frozen"))
        assert frozen["step"] == frozen["exp_avg"].numel() == 0  # torch wants an entry
        assert state["state"].keys() == expected["state"].keys()
        for key, own in expected["state"].items():
            assert own.keys() == state["state"][key].keys()
            assert own["step"] == state["state"][key]["step"] == len(BEFORE)
            for moment in ("exp_avg", "exp_avg_sq"):
                assert_close(f"{key} {moment}", state["state"][key][moment], own[moment])
        assert rank[case]["kept"]
        check_end(rank[case]["end"], found.end)


def test_a_state_of_many_goes_on_as_one(found):
    model = Net()
    model.load_state_dict(found.ranks[0]["by_itself"]["model"])
    optimiser = make_optimiser(model)
    optimiser.load_state_dict(found.ranks[1]["by_itself"]["optimiser"])
    run(model, optimiser, AFTER)
    check_end(values(model), found.end)


def test_a_state_of_one_goes_on_as_many(found):
    for rank in found.ranks:
        check_end(rank["from_one"]["end"], found.end)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_torch_gets_and_sets_it(options, found):
    assert all(rank["by_torch"][str(options)] for rank in found.ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_saves_and_loads_it(kind, found):
    for rank in found.ranks:
        check_end(rank["by_accelerate"][kind], found.end)
        message = rank["by_accelerate"][f"{kind}, other mask"]
        assert "MaskedAdamW: the state was made with another mask: inner.columns" in message
    check_end(found.ranks[0]["alone"][kind], found.end)
