"""report.html: one self-contained page, and its pictures, from whatever a run folder holds."""

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorapar import lineage
from lorapar.agreement import Agreement, agreement_of, disagreements, labelled
from lorapar.config import Config
from lorapar.data import SYSTEMS, Row, labels_file, load_rows
from lorapar.errors import UserError
from lorapar.evaluation import eval_key, gain
from lorapar.importance import load_scores
from lorapar.partitioning import STAGES, Partition, freeze_offset, summary
from lorapar.runs import Run, whole_file, write_text

try:
    import jinja2
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as e:
    raise UserError(
        f"lorapar report needs {e.name}; install it with: pip install 'lorapar-kernels[report]'"
    ) from None

POINTS = 20_000  # most elements drawn in the scatter
EXAMPLES, DISPUTED = 3, 10  # rows shown: of each label, and on which teachers disagree most
WIDTH, DPI = 9.6, 160  # inches at the page's full width
SETS = ("neither", "system1_only", "system2_only", "shared")  # by system1 + 2 * system2
RED, BLUE, PURPLE, GREY = "#E0523F", "#3A8DD0", "#5E2A84", "#C8C8C8"  # far apart in lightness too
COLOURS = {"system1_only": RED, "system2_only": BLUE, "shared": PURPLE, "neither": GREY}
COLOURS |= {"system1": RED, "system2": BLUE, "sft": RED, "rl": BLUE, "all": "#4A4A4A"}
NAMES = {"system1_only": "System 1 only", "system2_only": "System 2 only", "shared": "shared"}
NAMES |= {"system1": "System 1", "system2": "System 2", "all": "all", "neither": "neither"}
NAMES |= {"base": "base model", "sft": "SFT", "rl": "RL"}
PICTURES = ("agreement", "importance", "active_share", "partition", "training", "accuracy")
FILES = {"label": "labels.jsonl", "score": "importance.safetensors"}
FILES |= {"partition": "partition.safetensors", "sft": "sft/summary.json"}
FILES |= {"rl": "rl/summary.json", "eval": "eval.json"}
LOGS = {"sft_history": "sft/log_history.json", "rl_history": "rl/log_history.json"}
CURVES = (  # stage, key of TRL's log, title, unit
    ("sft", "loss", "SFT loss", "nats per token"),
    ("rl", "reward", "RL reward", "mean reward of a completion"),
    ("rl", "kl", "RL drift from its start", "KL divergence, nats"),
    ("rl", "completions/mean_length", "RL completion length", "mean length, tokens"),
)


def report(config: Config) -> Path:
    """Whatever the run folder holds → report.html and report/*.png. Returns the page's path.

    Raises:
        UserError: nothing to report, or a file that cannot be read.
    """
    run = Run(config)
    found = read_run(run)
    if not found:
        raise UserError(
            f"{run.dir}: nothing to report, no stage has been run here; run `lorapar run` with "
            f"your configuration for all stages, or start with `lorapar label`"
        )
    images = {name: _png(figure) for name, figure in _figures(run, found)}
    page = _page(run, found, images)
    for name in PICTURES:
        path = run.path(f"report/{name}.png")
        if name in images:
            with whole_file(path) as temporary:
                temporary.write_bytes(images[name])
        else:
            path.unlink(missing_ok=True)
    write_text(run.path("report.html"), page)
    run.finish("report", {}, {}, ["report.html"])
    return run.path("report.html")


def read_run(run: Run) -> dict[str, Any]:
    """What is there by stage, training logs included; what is missing or empty has no key."""
    skipped = ("score", "partition") if run.config.partition is None else ()
    there = {s: run.path(f) for s, f in (FILES | LOGS).items() if s not in skipped}
    with suppress(UserError):
        there["label"] = labels_file(run)
    readers = {"score": load_scores, "partition": Partition.load}
    readers["label"] = lambda path: _read_labels(run, path)
    found = {s: readers.get(s, _json)(path) for s, path in there.items() if path.exists()}
    return {stage: content for stage, content in found.items() if content}


def _read_labels(run: Run, path: Path) -> dict[str, Any] | None:
    """Statistics, the first rows of each label, the rows most in dispute; None without rows."""
    first: dict[str | None, list] = {system: [] for system in (*SYSTEMS, None)}
    for row, votes in labelled(path):
        if len(first[row.system]) < EXAMPLES:
            first[row.system].append((row, votes))
    disputed = disagreements(run.config, path, run.path("votes.jsonl"), limit=DISPUTED)
    found = {"agreement": agreement_of(path), "first": first, "disputed": disputed}
    return found if any(first.values()) else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}; delete it and rerun its stage") from None


def _figures(run: Run, found: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    made = found.get("partition")
    if "label" in found and found["label"]["agreement"].teachers:
        yield "agreement", draw_agreement(found["label"]["agreement"])
    if made and "score" in found:
        points = importance_points(made, found["score"], run.config.seed)
        yield "importance", draw_importance(points)
    if made:
        yield "active_share", draw_active_share(made)
        yield "partition", draw_partition(summary(made))
    if curves := draw_training(found):
        yield "training", curves
    if found.get("eval"):
        yield "accuracy", draw_accuracy(found["eval"], _order(run, found))


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _label(ax: Axes, title: str, x: str, y: str = "") -> None:
    ax.set_title(title, size=10)
    ax.set(xlabel=x, ylabel=y)
    ax.spines[["top", "right"]].set_visible(False)


def printable(name: str, width: int = 24) -> str:
    """A name for a picture: up to three lines, its middle left out if long, no mathtext in it."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    part = rf".{{1,{width}}}$|.{{{width // 2},{width}}}(?<=[-/_:. ])|.{{{width}}}"
    lines = re.findall(part, name)
    if len(lines) > 3:
        lines = [lines[0], lines[1][: width - 1] + "…", name[-width:]]
    return "\n".join(lines).replace("$", r"\$")


def draw_agreement(found: Agreement) -> Figure:
    count, several = len(found.teachers), len(found.teachers) > 1
    figure = _figure(1.2 + 0.5 * (count + 1))
    left, *others = figure.subplots(1, 1 + several, squeeze=False)[0]
    bars, start = [*map(found.votes, found.teachers), found.results()], np.zeros(count + 1)
    absent = "no valid vote (result: no label)"
    for vote, name in {**{s: NAMES[s] for s in SYSTEMS}, None: absent}.items():
        share = np.array([cast[vote] / cast.total() for cast in bars])
        if not share.any():
            continue
        look = {"color": COLOURS.get(vote, GREY), "label": name}
        left.barh(range(count + 1), share, 0.7, left=start, **look)
        for row in (share > 0.08).nonzero()[0]:
            at, ink = (start[row] + share[row] / 2, row), "white" if vote else "black"
            left.text(*at, f"{share[row]:.0%}", ha="center", va="center", color=ink, size=9)
        start += share
    names = [printable(f"{i}  {t}" if several else t) for i, t in enumerate(found.teachers, 1)]
    left.set_yticks(range(count + 1), [*names, "result"], fontsize=8)
    left.set(xlim=(0, 1), ylim=(count + 0.5, -0.5))
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _label(left, "How each teacher voted, and the result", f"share of {bars[0].total():,} rows")
    figure.legend(loc="outside lower center", ncol=3, frameon=False, fontsize=8)
    if several:
        draw_pairs(others[0], found)
    return figure


def draw_pairs(ax: Axes, found: Agreement) -> None:
    """The heat map of every two teachers, and in its last row of each with the result."""
    count = len(found.teachers)
    cells = {}
    for (a, b), pair in found.pairs().items():
        i, j = found.teachers.index(a), found.teachers.index(b)
        cells[i, j] = cells[j, i] = pair
    cells |= {(count, j): (*found.with_result(t), None) for j, t in enumerate(found.teachers)}
    share = np.full((count + 1, count), np.nan)
    for at, (alike, both, _) in cells.items():
        share[at] = alike / both if both else np.nan
    low = min(0.5, math.floor(np.nanmin(share) * 10) / 10) if not np.isnan(share).all() else 0.5
    ax.pcolormesh(share, vmin=low, vmax=1, cmap="viridis", edgecolors="white", linewidth=1.5)
    for (row, column), (_, _, kappa) in cells.items():
        value = share[row, column]
        ink = "white" if value <= (low + 1) / 2 else "black"
        text = "–" if np.isnan(value) else f"{value:.0%}"
        text += "" if row == count or kappa is None else f"\n{kappa:.2f}"
        look = {"color": ink, "size": 9 if count < 6 else 7}
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", **look)
    ax.set_xticks(np.arange(count) + 0.5, range(1, count + 1), fontsize=8)
    ax.set_yticks(np.arange(count + 1) + 0.5, [*range(1, count + 1), "result"], fontsize=8)
    ax.invert_yaxis()
    _label(ax, "Rows voted alike; below, Cohen's kappa", "teacher")


def importance_points(made: Partition, scored: tuple, seed: int) -> dict[str, Any]:
    """Up to POINTS random elements: normalised scores x and y, the set of each, the two cuts."""
    *both, meta = scored
    shapes = {n: m.shape for n, m in made.system1.items()}
    if any({n: s.shape for n, s in scores.items()} != shapes for scores in both):
        raise UserError("report: scores and partition differ in shape; rerun `lorapar partition`")

    def flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[n].flatten() for n in shapes])

    ones = {n: torch.ones(shape, dtype=torch.bool) for n, shape in shapes.items()}
    allowed = flat(freeze_offset(ones, meta.get("trainable_rank")))
    index = allowed.nonzero().flatten()
    chosen = np.random.default_rng(seed).choice(len(index), min(len(index), POINTS), replace=False)
    chosen = index[torch.from_numpy(chosen)]
    axes, cuts, which = [], [], torch.zeros(len(chosen), dtype=torch.long)
    by_element = made.meta["partition"]["granularity"] == "element"
    for bit, (scores, masks) in enumerate(zip(both, (made.system1, made.system2))):
        values, mask = flat(scores).float().where(allowed, 0), flat(masks)
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64)) or 1.0
        cuts.append(float(values[mask].min()) / norm if by_element and mask.any() else None)
        axes.append((values[chosen].double() / norm).numpy())
        which += mask[chosen].long() << bit
    return {"x": axes[0], "y": axes[1], "set": which.numpy(), "cuts": cuts, "of": len(index)}


def draw_importance(points: dict[str, Any]) -> Figure:
    x, y, kind = points["x"], points["y"], points["set"]
    figure, size = _figure(5.4), 4 if len(x) > 5000 else 12
    colours = np.array([COLOURS[s] for s in SETS])[kind]
    for ax, log in zip(figure.subplots(1, 2), (True, False)):
        for part, alpha in ((kind == 0, 0.35), (kind > 0, 0.6)):
            ax.scatter(x[part], y[part], size, colours[part], alpha=alpha, linewidths=0)
        for values, axis in ((x, "x"), (y, "y")):
            positive = values[values > 0] if (values > 0).any() else np.ones(1)
            ends = np.quantile(positive, (0.005, 0.998))
            ax.set(**{f"{axis}lim": (ends[0], positive.max() * 1.5) if log else (0, ends[1])})
            ax.set(**{f"{axis}scale": "log" if log else "linear"})
        for cut, line in zip(points["cuts"], (ax.axvline, ax.axhline)):
            if cut is not None:
                line(cut, color="black", ls="--", lw=1)
        if not log:
            ax.locator_params(nbins=5)
            ax.xaxis.set_major_formatter("{x:.3g}"), ax.yaxis.set_major_formatter("{x:.3g}")
        title = "Logarithmic axes: every size" if log else "Linear axes: the large ones"
        _label(ax, title, *(f"importance for System {i} (L2-normalised, no unit)" for i in (1, 2)))
    handles = [Line2D([], [], marker="o", ls="", color=COLOURS[s], label=NAMES[s]) for s in SETS]
    if None not in points["cuts"]:
        label = "smallest kept: {:.1e} (System 1), {:.1e} (System 2)".format(*points["cuts"])
        handles.append(Line2D([], [], color="black", ls="--", lw=1, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncol=5, frameon=False, fontsize=8)
    figure.suptitle(f"Importance to each system: {len(x):,} of {points['of']:,} elements", size=11)
    return figure


def active_shares(made: Partition, stage: str) -> tuple[list[str], list[str], np.ndarray]:
    """Layers, modules, and the share [module, layer] of elements that the stage trains."""
    on, total = {}, {}
    for name, mask in made.trainable(made.masks(stage)).items():
        module = name.rpartition(".lora_")[0]
        number = re.search(r"\.(\d+)\.", module)
        key = (number[1] if number else "-", module.rpartition(".")[2])
        on[key] = on.get(key, 0) + int(mask.sum())
        total[key] = total.get(key, 0) + mask.numel()
    layers, modules = (list(dict.fromkeys(key[i] for key in total)) for i in (0, 1))
    share = np.full((len(modules), len(layers)), np.nan)
    for layer, module in total:
        share[modules.index(module), layers.index(layer)] = on[layer, module] / total[layer, module]
    return layers, modules, share


def draw_active_share(made: Partition) -> Figure:
    shares = {stage: active_shares(made, stage) for stage in STAGES}
    layers, modules, _ = shares["sft"]
    values = np.concatenate([share.ravel() for _, _, share in shares.values()])
    low = min(0.9, math.floor(np.nanmin(values) * 10) / 10)
    high = max(low + 0.1, math.ceil(np.nanmax(values) * 10) / 10)
    wide = len(layers) > 8
    figure = _figure(max(3.0, 0.9 + (0.32 * len(modules) + 0.7) * (1 + wide)))
    axes = figure.subplots(*((2, 1) if wide else (1, 2)))
    for ax, (stage, (_, _, share)) in zip(axes, shares.items()):
        image = ax.imshow(share, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        every = math.ceil(len(layers) / 40)
        ax.set_xticks(range(0, len(layers), every), layers[::every], fontsize=8)
        ax.set_yticks(range(len(modules)), modules, fontsize=8)
        _label(ax, f"{NAMES[stage]}: share of elements that train", "layer")
        for (row, column), value in np.ndenumerate(share):
            if not wide and not np.isnan(value):
                ink = "black" if value > (low + high) / 2 else "white"
                ax.text(column, row, f"{value:.0%}", ha="center", va="center", color=ink, size=9)
    label = {"format": PercentFormatter(1, decimals=0), "label": "active share of the module"}
    figure.colorbar(image, ax=list(axes), **label)
    return figure


def draw_partition(made: dict[str, Any]) -> Figure:
    figure = _figure(3.1)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    start = 0.0
    for kind in ("system1_only", "shared", "system2_only", "neither"):
        share = made[kind] / made["all"]
        label = f"{NAMES[kind]}: {made[kind]:,} ({share:.1%})"
        left.barh(0, share, 0.5, left=start, color=COLOURS[kind], label=label)
        if share > 0.07:
            ink = "black" if kind == "neither" else "white"
            left.text(start + share / 2, 0, f"{share:.1%}", ha="center", va="center", color=ink)
        start += share
    left.set(xlim=(0, 1), ylim=(-0.4, 0.4), yticks=[])
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _label(left, "Which system needs which elements", f"share of {made['all']:,} elements")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncol=2, frameon=False, fontsize=8)
    bars = [("System 1 against System 2", made["jaccard"], PURPLE)]
    for system, value in (made["null_jaccard"] or {}).items():
        if value is not None:
            bars.append((f"{NAMES[system]}: two halves", value, COLOURS[system]))
    for row, (_, value, colour) in enumerate(bars):
        right.barh(row, value, 0.6, color=colour)
        right.text(value + 0.02, row, f"{value:.3f}", va="center", size=9)
    right.set_yticks(range(len(bars)), [b[0] for b in bars], fontsize=9)
    right.set(xlim=(0, 1.18), xticks=(0, 0.25, 0.5, 0.75, 1), ylim=(len(bars) - 0.5, -0.5))
    _label(right, "Overlap, and what sampling alone gives", "Jaccard overlap (1 = same set)")
    return figure


def smooth(values: list[float]) -> list[float]:
    """A centred moving average over a tenth of the curve, narrower at its ends."""
    half = len(values) // 20 + 1
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def draw_training(found: dict[str, Any]) -> Figure | None:
    panels = []
    for stage, key, name, unit in CURVES:
        log = found.get(f"{stage}_history", [])
        log = [e for e in log if isinstance(e.get(key), int | float) and math.isfinite(e[key])]
        if log:
            panels.append((stage, [e["step"] for e in log], [e[key] for e in log], name, unit))
    if not panels:
        return None
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    figure = _figure(3.1 * rows)
    for i, (stage, steps, values, name, unit) in enumerate(panels):
        line, ax = smooth(values), figure.add_subplot(rows, columns, i + 1)
        size = 3 if len(steps) > 20 else 6
        ax.plot(steps, values, "o", color=COLOURS[stage], ms=size, alpha=0.4, mew=0)
        ax.plot(steps, line, color=COLOURS[stage], lw=1.8)
        title = f"{name}: from {line[0]:.3g} to {line[-1]:.3g}"
        _label(ax, title, f"{NAMES[stage]} optimiser step", unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def draw_accuracy(results: dict[str, Any], order: list[str]) -> Figure:
    figure = _figure(3.6)
    ax = figure.subplots()
    groups = [g for g in (*SYSTEMS, "all") if any(g in results[s] for s in order)]
    ticks, marks = [], []
    for number, group in enumerate(groups):
        there = [s for s in order if group in results[s]]
        for i, stage in enumerate(there):
            r, x = results[stage][group], number * (len(order) + 1) + i
            ends = [[max(0, r["accuracy"] - r["low"])], [max(0, r["high"] - r["accuracy"])]]
            shade = {"color": COLOURS[group], "alpha": 0.4 + 0.6 * i / max(1, len(order) - 1)}
            ax.bar(x, r["accuracy"], 0.85, **shade)
            ax.errorbar(x, r["accuracy"], ends, color="black", capsize=4, lw=1.2)
            ax.text(x, r["high"] + 0.02, f"{r['accuracy']:.1%}", ha="center", size=9)
            ticks.append(x), marks.append(NAMES[stage])
        name = f"{NAMES[group]} ({r['total']:,} tasks)"
        centre = {"x": x - (len(there) - 1) / 2, "ha": "center", "va": "top"}
        ax.text(s=name, y=-0.12, transform=ax.get_xaxis_transform(), **centre)
    ax.set_xticks(ticks, marks, fontsize=9)
    ax.set(ylim=(0, 1.1), yticks=(0, 0.2, 0.4, 0.6, 0.8, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _label(ax, "Accuracy on the test rows, before and after each stage", "", "correct answers")
    return figure


def _page(run: Run, found: dict[str, Any], images: dict[str, bytes]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = (files("lorapar") / "templates" / "report.html.j2").read_text(encoding="utf-8")
    made, results, order = found.get("partition"), found.get("eval", {}), _order(run, found)
    html = environment.from_string(source).render(
        config=run.config,
        run_dir=Path(run.config.run_dir),
        names=NAMES,
        colours=COLOURS,
        found=found,
        stages=FILES,
        remarks=remarks(run, found),
        images={n: base64.b64encode(png).decode() for n, png in images.items()},
        agreement=found["label"]["agreement"] if "label" in found else None,
        made=summary(made) if made else None,
        meta=made.meta if made else {},
        frozen={s: frozen(found, s) for s in STAGES if s in found},
        order=order,
        gains={s: gains(results, s) for s in order if s != "base"},
        questions=questions(run.config, results),
    )
    return html.encode("ascii", "xmlcharrefreplace").decode()  # any locale, any character


def _order(run: Run, found: dict[str, Any]) -> list[str]:
    """The measured stages in the order in which they were trained."""
    rl_first = "rl" in (run.record("sft") or {"inputs": {}})["inputs"]
    order = ("base", "rl", "sft") if rl_first else ("base", "sft", "rl")
    return [stage for stage in order if stage in found.get("eval", {})]


def frozen(found: dict[str, Any], stage: str) -> tuple[int, int]:
    """How many frozen elements were found unchanged, of how many."""
    checked, made = found[stage]["frozen_elements_checked"], found.get("partition")
    return checked, sum(int((~m).sum()) for m in made.masks(stage).values()) if made else checked


def gains(results: dict[str, Any], stage: str) -> dict[str, tuple[float, float, float]]:
    """Gain over the base model on the same rows, with its 95 % interval, by system."""
    base, after = results.get("base", {}), results[stage]
    both = [g for g in (*SYSTEMS, "all") if g in base and g in after and base[g]["total"]]
    same = [g for g in both if len(base[g]["outcomes"]) == len(after[g]["outcomes"])]
    return {g: gain(base[g], after[g]) for g in same}


def questions(config: Config, results: dict[str, Any]) -> dict[str, Row]:
    """The test rows by id, if their file is still there and is the one that was measured."""
    if not config.data.test or not Path(config.data.test).is_file():
        return {}
    try:
        rows = load_rows(config.data, "test")
    except UserError:
        return {}
    same = results.get("base", {}).get("key") == eval_key(config, rows, None)
    return {row.id: row for row in rows} if same else {}


def remarks(run: Run, found: dict[str, Any]) -> list[str]:
    """Stages that no longer fit their inputs or the configuration, and why."""
    notes = []
    for stage in ("label", "score", "partition", "sft", "rl"):
        if stage not in found or run.record(stage) is None:
            continue
        try:
            why = run.stale(stage, *lineage.depends(run.config, stage))
        except UserError as e:  # an input is gone
            why = str(e)
        if why:
            notes.append(f"{stage}: {why}")
    return notes
