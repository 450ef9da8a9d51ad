"""docs/theta.md says what docs/theta.csv holds, and theta.csv what the package computes."""

import csv
import importlib.util
import re

import pytest
import torch
from conftest import ARITHMETIC, REPO

from lorapar_kernels import select_by_mass

DOCS = REPO / "docs"
BAND = 0.02  # points, 8 of QKV's 40,960 elements; and of Jaccard, 6 of the few at θ = 0.1


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("theta_curve", ARITHMETIC / "theta_curve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    with open(DOCS / "theta.csv", encoding="utf-8") as f:
        assert re.match(r"# .+torch \d.+commit .+; python examples/arithmetic/theta_curve", next(f))
        return list(csv.DictReader(f))


def mean(rows, targets, theta, name):
    values = [float(r[name]) for r in rows if (r["targets"], r["theta"]) == (targets, theta)]
    assert len(values) == 3
    return sum(values) / 3


def test_tables_hold_the_numbers_of_the_csv(script, rows):
    text = (DOCS / "theta.md").read_text(encoding="utf-8")
    parsed = script.read(DOCS / "theta.csv")
    assert script.curve_table(parsed) in text and script.summary_table(parsed) in text
    for i in range(1, 11):  # once more without the script
        (line,) = re.findall(rf"^\| {i / 10} \| (.+) \|$", text, re.MULTILINE)
        names = [(t, c) for t in script.TARGETS for c in ("system1", "system2", "paper")]
        for shown, (t, c) in zip(line.split(" | "), [*names, ("QKV", "normals")], strict=True):
            assert abs(float(shown) - mean(rows, t, f"{i / 10}", c)) < 0.00501, (i, t, c)


def test_sentences_hold_the_numbers_of_the_csv(script, rows):
    text = (DOCS / "theta.md").read_text(encoding="utf-8")
    gaps = {
        (t, s, r["theta"]): mean(rows, t, r["theta"], s) - float(r["paper"])
        for s in ("system1", "system2")
        for r in rows
        for t in [r["targets"]]
    }
    t, s, theta = max(gaps, key=lambda key: abs(gaps[key]))
    points = f"{gaps[t, s, theta]:+.2f} points ({t}, System {s[-1]}, θ = {theta})"
    assert f"largest difference to the paper is {points}" in text
    tenths = [mean(rows, t, "0.1", "system1") / script.PAPER[t][0] for t in script.TARGETS]
    sizes = {"QKV": 40_960, "GUD": 73_728, "QKVGUD": 114_688}
    counts = [
        round(float(r[s]) * sizes[r["targets"]] / 100)
        for r in rows
        for s in ("system1", "system2")
        if r["theta"] == "0.1"
    ]
    shares = "{:.2f}, {:.2f} and {:.2f} times".format(*tenths)
    assert f"{min(counts)} to {max(counts)} elements are kept: {shares}" in text
    nines = [
        mean(rows, "GUD", "0.9", name) - mean(rows, "QKV", "0.9", name)
        for name in ("system1", "system2", "paper")
    ]
    less = "by {:.1f} points in System 1 and {:.1f} in System 2; in the paper by {:.1f}."
    assert less.format(*nines) in text
    for r in rows:
        if r["theta"] == "0.9":
            assert float(r["jaccard"]) < min(float(r["null1"]), float(r["null2"])), r
        if r["targets"] == "QKV" and r["theta"] != "1.0":
            assert min(float(r["system1"]), float(r["system2"])) > float(r["paper"]), r


def test_the_measured_share_is_what_one_cut_can_give(script, rows):
    """The top elements hold at least their share, each tenth of the mass needs more than the last,
    and a cut over all matrices keeps less than one in every matrix."""
    for targets in script.TARGETS:
        for seed in script.SEEDS:
            mine = [r for r in rows if (r["targets"], r["seed"]) == (targets, str(seed))]
            assert [float(r["theta"]) for r in mine] == list(script.THETAS)
            assert tuple(float(r["paper"]) for r in mine) == script.PAPER[targets]
            for name in ("system1", "system2"):
                shares = [0.0, *(float(r[name]) for r in mine)]
                steps = [b - a for a, b in zip(shares, shares[1:])]
                assert steps[0] > 0 and steps == sorted(steps) and shares[-1] == 100
                for r in mine[:-1]:
                    assert float(r[name]) < float(r["normals"]) < 100 * float(r["theta"])
            assert all(float(r["system1"]) < float(r["by_matrix"]) for r in mine[:-1])


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.9, 1.0])
def test_closed_form_is_the_share_of_drawn_products(script, rows, theta):
    """A million products: the share at 0.9 has a standard deviation of some 0.05 points."""
    drawn = (torch.randn(1_000_000) * torch.randn(1_000_000)).abs()
    exact = script.product_of_normals(theta)
    assert abs(script.share(select_by_mass([drawn], theta)) - exact) < 0.2
    assert {round(exact, 4)} == {float(r["normals"]) for r in rows if r["theta"] == f"{theta}"}


def test_rows_are_computed_again(script, rows, tmp_path, monkeypatch):
    """Labels, adapter, scores and cuts of one seed, on the CPU as they were measured.

    Another order of sums moves elements at the cut alone, none with other batch sizes and threads;
    BAND leaves room for another BLAS.
    """
    monkeypatch.setattr("lorapar.models.device", lambda: torch.device("cpu"))
    monkeypatch.setattr("lorapar.models.base_dtype", lambda: torch.float32)
    made = script.measure("QKV", 42, script.labelled(str(tmp_path)), str(tmp_path))
    want = [r for r in rows if (r["targets"], r["seed"]) == ("QKV", "42")]
    for got, row in zip(made, want, strict=True):
        assert got["theta"] == float(row["theta"])
        for name in ("system1", "system2", "by_matrix", "jaccard", "null1", "null2"):
            assert abs(got[name] - float(row[name])) <= BAND, (got, row)


def test_the_picture_is_drawn_from_the_rows(script, tmp_path):
    from matplotlib.image import imread

    script.draw(script.read(DOCS / "theta.csv"), tmp_path / "theta.png")
    drawn, kept = imread(tmp_path / "theta.png"), imread(DOCS / "theta.png")
    assert drawn.shape == kept.shape and drawn.std() > 0.1
