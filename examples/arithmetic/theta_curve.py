"""How much of the adapter θ keeps, beside the paper's Table 3.

`python examples/arithmetic/theta_curve.py [--out docs]` writes theta.csv and theta.png and prints
the tables of docs/theta.md: a minute on one CPU core.
"""

import argparse
import csv
import math
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
import transformers
from torch import Tensor

from lorapar.config import Config, load
from lorapar.data import SYSTEMS, Row, load_labels, rows_of
from lorapar.importance import accumulate, encode
from lorapar.initialization import initial_adapter
from lorapar.labels import label
from lorapar.models import load_tokenizer
from lorapar.partitioning import jaccard
from lorapar.template import make_template
from lorapar_kernels import select_by_mass

HERE = Path(__file__).resolve().parent
SEEDS = (41, 42, 43)  # each draws A, B and the scored examples anew
THETAS = tuple(i / 10 for i in range(1, 11))
QKV, GUD = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"QKV": QKV, "GUD": GUD, "QKVGUD": QKV + GUD}
# %Param at θ = 0.1 ... 1 in Table 3 of Huang, Li, Tang, Chen, arXiv 2507.20999
PAPER = {
    "QKV": (0.30, 1.03, 2.20, 3.93, 6.39, 9.88, 14.90, 22.52, 35.70, 100.0),
    "GUD": (0.22, 1.21, 2.89, 5.30, 8.61, 13.10, 19.30, 28.27, 42.90, 100.0),
    "QKVGUD": (0.32, 1.22, 2.72, 4.90, 7.91, 12.07, 17.87, 26.40, 40.56, 100.0),
}


def configure(targets: str, seed: int, run_dir: str) -> Config:
    """The example's configuration, on some of the modules."""
    changes = {"adapter.target_modules": TARGETS[targets], "seed": seed, "run_dir": run_dir}
    return load(HERE / "config.yaml", changes)


def labelled(run_dir: str) -> dict[str, list[Row]]:
    """The training rows by system, labelled by the example's rules."""
    label(configure("QKV", SEEDS[0], run_dir))
    path = Path(run_dir, "labels.jsonl")
    return {system: rows_of(load_labels(path), system, path) for system in SYSTEMS}


def scored(config: Config, rows: dict[str, list[Row]]) -> dict[str, list[list[Tensor]]]:
    """By system the scores of all its examples, of one half and of the other; a tensor a matrix.

    Examples and halves are those of `lorapar score`.
    """
    model, tokenizer = initial_adapter(config), load_tokenizer(config)
    template, found = make_template(config.template), {}
    for number, system in enumerate(SYSTEMS):
        draw = torch.Generator().manual_seed(config.seed + number)
        order = torch.randperm(len(rows[system]), generator=draw)[: config.score.examples]
        examples = encode([rows[system][i] for i in order], template, tokenizer, model)
        one, two = (
            accumulate(
                model,
                half,
                batch_size=config.score.batch_size,
                pad_token_id=tokenizer.pad_token_id,
            )
            for half in (examples[::2], examples[1::2])
        )
        variant = config.score.variant
        found[system] = [list(s.scores(model, variant).values()) for s in (one + two, one, two)]
    return found


def share(masks: Sequence[Tensor]) -> float:
    """Percent of the elements that are kept."""
    return 100 * sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def product_of_normals(theta: float) -> float:
    """Percent of elements that hold θ of the mass if scores are |xy|, x and y standard normal.

    |xy| has density 2/π K₀, and those above t hold t K₁(t) of the mass.
    """
    low, high = 0.0, 60.0
    for _ in range(100):
        t = torch.tensor((low + high) / 2, dtype=torch.float64)
        more = float(t * torch.special.modified_bessel_k1(t)) > theta
        low, high = (float(t), high) if more else (low, float(t))
    # ∫ K₀ from t on = ∫ e^(−t cosh u) / cosh u du over u > 0
    u = torch.linspace(0, 40, 4001, dtype=torch.float64)
    return 200 / math.pi * float(torch.trapezoid(torch.exp(-low * u.cosh()) / u.cosh(), u))


def measure(targets: str, seed: int, rows: dict[str, list[Row]], run_dir: str) -> Iterator[dict]:
    """A row of theta.csv for each θ."""
    scores = scored(configure(targets, seed, run_dir), rows)
    for theta, paper in zip(THETAS, PAPER[targets]):
        (one, *halves1), (two, *halves2) = (
            [select_by_mass(part, theta) for part in scores[system]] for system in SYSTEMS
        )
        alone = [select_by_mass([s], theta)[0] for s in scores["system1"][0]]
        values = {
            "system1": share(one),
            "system2": share(two),
            "paper": paper,
            "normals": product_of_normals(theta),
            "by_matrix": share(alone),  # System 1, every matrix cut on its own
            "jaccard": jaccard(one, two),
            "null1": jaccard(*halves1),
            "null2": jaccard(*halves2),
        }
        place = {"targets": targets, "seed": seed, "theta": theta}
        yield place | {name: round(value, 4) for name, value in values.items()}


def read(path: Path) -> list[dict]:
    """The rows of theta.csv, numbers as numbers."""
    with path.open(encoding="utf-8") as f:
        next(f)  # versions, commit, command
        return [
            {k: v if k == "targets" else float(v) for k, v in r.items()} for r in csv.DictReader(f)
        ]


def column(rows: list[dict], targets: str, name: str) -> list[list[float]]:
    """One column of theta.csv at each θ, a value a seed."""
    chosen = [r for r in rows if r["targets"] == targets]
    return [[r[name] for r in chosen if r["theta"] == theta] for theta in THETAS]


def means(rows: list[dict], targets: str, name: str) -> list[float]:
    return [mean(values) for values in column(rows, targets, name)]


def curve_table(rows: list[dict]) -> str:
    """Percent kept at each θ, means over the seeds, as Markdown."""
    names = {"system1": "System 1", "system2": "System 2", "paper": "paper"}
    columns = {f"{t}, {n}": means(rows, t, c) for t in TARGETS for c, n in names.items()}
    columns["normals"] = means(rows, "QKV", "normals")
    lines = [
        [str(theta), *(f"{c[i]:.2f}" for c in columns.values())] for i, theta in enumerate(THETAS)
    ]
    return markdown(["θ", *columns], lines)


def summary_table(rows: list[dict]) -> str:
    """By target: where each system is farthest from the paper, and what stands at θ = 0.9."""
    lines = []
    for system, name in (("system1", "System 1"), ("system2", "System 2")):
        far = [largest_difference(rows, t, system) for t in TARGETS]
        cells = [f"{points:+.2f} at {theta}" for points, theta in far]
        lines.append([f"{name}: largest difference to the paper, points, and its θ", *cells])
    nine = THETAS.index(0.9)
    for system, name in (("system1", "System 1"), ("system2", "System 2")):
        ends = [_ends(column(rows, t, system)[nine]) for t in TARGETS]
        cells = [f"{low:.2f} to {high:.2f}" for low, high in ends]
        lines.append([f"{name} at 0.9: lowest and highest seed, %", *cells])
    for name, text in (
        ("by_matrix", "System 1 at 0.9, every matrix cut on its own, %"),
        ("jaccard", "Jaccard of the two systems at 0.9"),
        ("null1", "the same of two halves of System 1"),
        ("null2", "the same of two halves of System 2"),
    ):
        lines.append([text, *(f"{means(rows, t, name)[nine]:.2f}" for t in TARGETS)])
    return markdown(["", *TARGETS], lines)


def largest_difference(rows: list[dict], targets: str, system: str) -> tuple[float, float]:
    """The mean share minus the paper's, in points, where it is farthest from 0; and the θ there."""
    ours = means(rows, targets, system)
    gaps = [(share - paper, theta) for share, paper, theta in zip(ours, PAPER[targets], THETAS)]
    return max(gaps, key=lambda gap: abs(gap[0]))


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def draw(rows: list[dict], path: Path) -> None:
    """Above the shares over θ, below their distance from the paper's."""
    from matplotlib.figure import Figure

    from lorapar.reporting import COLOURS, DPI, WIDTH

    figure = Figure(figsize=(WIDTH, 6.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, len(TARGETS), sharex=True, sharey="row", height_ratios=(3, 2))
    for targets, top, bottom in zip(TARGETS, *axes):
        paper = PAPER[targets]
        normals = means(rows, targets, "normals")
        top.plot(THETAS, normals, color=COLOURS["all"], ls=":", lw=1.2, label="product of normals")
        for system, name in (("system1", "System 1"), ("system2", "System 2")):
            values, style = column(rows, targets, system), {"color": COLOURS[system]}
            gaps = [[v - p for v in seeds] for seeds, p in zip(values, paper)]
            for ax, lines in ((top, values), (bottom, gaps)):
                ax.fill_between(THETAS, *zip(*map(_ends, lines)), alpha=0.25, lw=0, **style)
                ax.plot(
                    THETAS,
                    list(map(mean, lines)),
                    lw=1.4,
                    marker=".",
                    label=f"{name}, measured",
                    **style,
                )
        label = "paper, Table 3 (LLaMA-2-7B, GSM8K)"
        top.plot(THETAS, paper, "o", ms=5, mfc="none", color="black", label=label)
        top.set_yscale("log")
        top.yaxis.set_major_formatter("{x:g}")
        top.set_title(targets, size=10)
        bottom.axhline(0, color="black", lw=0.8)
        bottom.set(xlabel="θ, share of the importance (no unit)", xticks=THETAS[::2])
        for ax in (top, bottom):
            ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("active share, % of LoRA elements")
    axes[1][0].set_ylabel("measured − paper, points")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncol=4, frameon=False, fontsize=8)
    title = f"Active share over θ: mean and range of {len(SEEDS)} seeds, examples/arithmetic/base"
    figure.suptitle(title, size=11)
    figure.savefig(path, metadata={"Software": None})


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def write(path: Path, rows: list[dict]) -> None:
    """theta.csv under a line with device, versions, commit and command."""
    facts = [torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"]
    facts += [f"{p} {version(p)}" for p in ("torch", "peft", "transformers")]
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        made = subprocess.run(git, capture_output=True, text=True, cwd=HERE).stdout.strip()
        facts.append(f"commit {made or 'unknown'}")
    with path.open("w", newline="", encoding="utf-8") as f:
        f.write(f"# {', '.join(facts)}; python examples/arithmetic/theta_curve.py\n")
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs")
    out = parser.parse_args().out
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as run_dir:
        data = labelled(run_dir)
        rows = [r for t in TARGETS for seed in SEEDS for r in measure(t, seed, data, run_dir)]
    write(out / "theta.csv", rows)
    draw(rows, out / "theta.png")
    print(curve_table(rows), summary_table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
