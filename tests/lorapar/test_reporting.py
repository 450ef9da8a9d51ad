"""lorapar.reporting: one page from whatever a run folder holds, with the run's own numbers."""

import base64
import io
import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from lorapar.agreement import Agreement, agreement_of
from lorapar.config import Config, Data, PartitionSettings
from lorapar.data import Row, load_rows, row_hash
from lorapar.errors import UserError
from lorapar.evaluation import eval_key, wilson
from lorapar.exporting import export
from lorapar.partitioning import Partition, make_partition
from lorapar.reporting import (
    PICTURES,
    _figures,
    _png,
    active_shares,
    draw_agreement,
    importance_points,
    printable,
    read_run,
    remarks,
    report,
    smooth,
)
from lorapar.runs import Run, file_digest

NASTY = "<script>alert('x')</script><img src=http://evil.example/x.png> & 3 < 4 \U0001f34e \ud83d"
MODULES = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 40)}
MARKUP = ("script", "link", "iframe", "object", "embed", "base")


class Page(HTMLParser):
    """Images, other elements and visible text of a page."""

    def __init__(self, path):
        super().__init__()
        self.images, self.tags, self.links, self.text = [], [], [], []
        self.source = path.read_text(encoding="ascii")
        self.feed(self.source)
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        self.images += [v for k, v in attrs if (tag, k) == ("img", "src")]

    def handle_data(self, data):
        self.text.append(data)


def scores(layers=2, rank=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.{module}.{side}.weight": torch.rand(shape, generator=generator) ** 4
        for layer in range(layers)
        for module, (n, k) in MODULES.items()
        for side, shape in (("lora_A", (rank, k)), ("lora_B", (n, rank)))
    }


def configure(folder, **changes):
    test = [{"question": f"{NASTY} {i}", "answer": f"#### {i}"} for i in range(20)]
    (folder / "test.jsonl").write_text("".join(json.dumps(t) + "\n" for t in test))
    data = Data(train="train.jsonl", test=str(folder / "test.jsonl"))
    return Config(model="tiny/base", data=data, run_dir=str(folder / "run"), **changes)


def add_labels(run):
    run.dir.mkdir(exist_ok=True)
    cast = [
        ("system1", "system1"),
        ("system2", "system2"),
        ("system1", "system2"),
        ("system2", None),
    ]
    with run.path("labels.jsonl").open("w") as f:
        for i, (a, b) in enumerate(cast * 3):
            system = a if a == b or b is None else None
            row = {"id": f"r{i}", "question": NASTY, "answer": "#### 1", "system": system}
            f.write(json.dumps({**row, "votes": {"rule:a": a, "judge <b>": b}}) + "\n")


def add_partition(run, settings, rank=4, seed=0):
    one, two = scores(rank=rank, seed=seed), scores(rank=rank, seed=seed + 1)
    meta = {"examples": {"system1": 7, "system2": 9}, "variant": "taylor2", "trainable_rank": None}
    meta["null_jaccard"] = {"system1": 0.8125, "system2": 0.7375, "theta": 0.9}
    tensors = {f"system{i}/{n}": t for i, s in ((1, one), (2, two)) for n, t in s.items()}
    path = run.path("importance.safetensors")
    save_file(tensors, path, metadata={"lorapar": json.dumps(meta)})
    made = make_partition(one, two, settings, {**meta, "partition": vars(settings)})
    made.save(run.path("partition.safetensors"))
    inputs = {"importance.safetensors": file_digest(path)}
    run.finish("partition", {"partition": settings}, inputs, ["partition.safetensors"])
    return made


def add_training(run, made, steps=30):
    for stage in ("sft", "rl"):
        run.path(stage).mkdir(parents=True)
        frozen = sum(int((~m).sum()) for m in made.masks(stage).values()) if made else 0
        summary = {"rows": 6, "dropped": 1, "steps": steps, "frozen_elements_checked": frozen}
        summary |= {"active_share": made.active_share(stage) if made else 1.0}
        summary |= {"adapter_elements": 1, "loss": 0.5, "reward": None}
        log = [{"loss": 2.0 - i / steps, "step": i + 1} for i in range(steps)]
        if stage == "rl":
            extra = {"reward": 0.5, "kl": float("nan"), "completions/mean_length": 9.0}
            log = [{**entry, **extra} for entry in log]
        run.path(f"{stage}/summary.json").write_text(json.dumps(summary))
        run.path(f"{stage}/log_history.json").write_text(json.dumps(log))


def measured(hits):
    low, high = wilson(sum(hits), len(hits))
    counts = {"correct": sum(hits), "total": len(hits), "accuracy": sum(hits) / len(hits)}
    return {**counts, "low": low, "high": high, "outcomes": hits}


def add_eval(run):
    results = {}
    for stage, count in (("base", 0), ("sft", 7), ("rl", 20)):  # none, some and all correct
        hits = [int(i < count) for i in range(20)]
        groups = {"all": hits, "system1": hits[::2], "system2": hits[1::2]}
        results[stage] = {g: measured(h) for g, h in groups.items()}
        sample = {"id": "test-3", "completion": f"{stage} {NASTY}", "correct": bool(hits[3])}
        results[stage]["samples"] = [sample]
    rows = load_rows(run.config.data, "test")
    results["base"]["key"] = eval_key(run.config, rows, None)
    run.path("eval.json").write_text(json.dumps(results))
    return results


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything: its Run, its page, its partition and its eval.json."""
    run = Run(configure(tmp_path_factory.mktemp("whole")))
    add_labels(run)
    made = add_partition(run, run.config.partition)
    add_training(run, made)
    results = add_eval(run)
    return run, Page(report(run.config)), made, results


def test_the_page_needs_nothing_but_itself(whole):
    run, page, *_ = whole
    assert len(page.images) == len(PICTURES) == 6
    for source in page.images:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        picture = imread(io.BytesIO(base64.b64decode(data, validate=True)), format="png")
        assert picture.shape[1] == 1536 and picture.std() > 0.05  # drawn on, not blank
    assert page.links == page.images
    assert not set(MARKUP) & set(page.tags)
    assert "url(" not in page.source and "@import" not in page.source
    for name in PICTURES:
        png = run.path(f"report/{name}.png").read_bytes()
        assert base64.b64encode(png).decode() in page.source
    assert not list(run.dir.rglob(".*"))  # no temporary left
    record = run.record("report")
    assert record["outputs"] == {"report.html": file_digest(run.path("report.html"))}


def test_numbers_are_those_of_the_files(whole):
    _, page, made, results = whole
    for stage in results.values():
        for group in ("all", "system1", "system2"):
            r = stage[group]
            interval = f"{100 * r['low']:.1f}% to {100 * r['high']:.1f}%"
            shown = f"{100 * r['accuracy']:.1f}% {r['correct']} of {r['total']}; {interval}"
            assert shown in page.words
    assert "+35.0 points" in page.words and "+100.0 points" in page.words
    counts = made.counts()
    for kind, name in (("system1_only", "System 1 only"), ("shared", "shared")):
        share = counts[kind] / counts["all"]
        assert f"{name} {counts[kind]:,} {100 * share:.1f}%" in page.words
    for stage in ("SFT", "RL"):
        n = sum(int((~m).sum()) for m in made.masks(stage.lower()).values())
        assert f"{stage}: {n:,} of {n:,} frozen elements kept their bits" in page.words
    assert f"SFT {100 * made.active_share('sft'):.1f}%" in page.words
    assert "7 System 1 and 9 System 2 examples" in page.words
    assert "rule:a 6 6 0 100.0% 9 of 9" in page.words
    assert "judge <b> 3 6 3 100.0% 6 of 6" in page.words
    assert "alpha" not in page.words.replace("lora_alpha", "") and "Not run" not in page.words


def test_text_of_others_is_escaped(whole):
    _, page, *_ = whole
    assert "script" not in page.tags and "<script" not in page.source
    assert page.source.count("&lt;script&gt;") >= 3 + 4  # labelled rows; question and completions
    for stage in ("base", "sft", "rl"):
        assert f"{stage} <script>alert('x')</script>" in page.words
    assert "\U0001f34e" in page.words and "Question <script>" in page.words


def test_stages_that_were_not_run_are_named(tmp_path):
    run = Run(configure(tmp_path))
    add_labels(run)
    page = Page(report(run.config))
    for stage in ("score", "partition", "sft", "rl", "eval"):
        assert f"lorapar {stage} {run.dir}" in page.words
    assert f"lorapar label {run.dir}" not in page.words
    assert [p.name for p in run.path("report").iterdir()] == ["agreement.png"]
    assert len(page.images) == 1
    assert "System 1 3 25.0%" in page.words and "Sample answers" not in page.words


def test_masks_off(tmp_path):
    run = Run(configure(tmp_path, partition=None))
    add_labels(run)
    add_partition(run, PartitionSettings())  # left there by an older run
    add_training(run, None)
    add_eval(run)
    page = Page(report(run.config))
    assert len(page.images) == 3  # agreement, training and accuracy
    assert "Masks are off" in page.words and "nothing was frozen" in page.words
    assert "Importance and partition" not in page.words and "Not run" not in page.words


def test_an_empty_folder_is_refused(tmp_path):
    config = configure(tmp_path)
    for _ in range(2):  # without the folder, and with it
        with pytest.raises(UserError, match=r"run: nothing to report.*lorapar label"):
            report(config)
        assert not list((tmp_path / "run").glob("*"))
        (tmp_path / "run").mkdir(exist_ok=True)


def test_nothing_is_written_when_a_file_is_broken(tmp_path):
    run = Run(configure(tmp_path))
    add_labels(run)
    run.path("eval.json").write_text('{"base": ')
    with pytest.raises(UserError, match=r"eval\.json: not valid JSON"):
        report(run.config)
    assert sorted(p.name for p in run.dir.iterdir()) == ["eval.json", "labels.jsonl"]


def test_files_that_do_not_fit_are_remarked(tmp_path, whole):
    assert "no longer fit" not in whole[1].words
    run = Run(configure(tmp_path))
    add_labels(run)
    add_partition(run, run.config.partition)
    other = Run(replace(run.config, partition=PartitionSettings(theta=0.5)))
    assert "theta 0.9, the configuration says 0.5" in remarks(other, read_run(other))[0]
    changed = {f"system{i}/{n}": t for i in (1, 2) for n, t in scores(seed=5).items()}
    meta = {"variant": "random", "examples": {"system1": 1, "system2": 1}}
    path = run.path("importance.safetensors")
    save_file(changed, path, metadata={"lorapar": json.dumps(meta)})
    page = Page(report(run.config))
    assert "it was made from another importance.safetensors" in page.words
    assert "random-mask baseline" in page.words and run.path("report/importance.png").exists()
    path.unlink()
    report(replace(run.config, partition=None))
    left = [p.name for p in run.path("report").iterdir()]
    assert left == ["agreement.png"]  # no picture of an older state stays


def draw(run):
    """The pictures of a run by name, as numbers."""
    drawn = {name: _png(figure) for name, figure in _figures(run, read_run(run))}
    return {name: imread(io.BytesIO(png), format="png") for name, png in drawn.items()}


@pytest.mark.parametrize("theta, granularity", [(0.0, "element"), (0.6, "column")])
def test_extreme_partitions(tmp_path, theta, granularity):
    settings = PartitionSettings(theta=theta, granularity=granularity)
    run = Run(configure(tmp_path, partition=settings))
    run.dir.mkdir()
    add_partition(run, settings)
    pictures = draw(run)
    assert list(pictures) == ["importance", "active_share", "partition"]
    assert all(p.std() > 0.05 for p in pictures.values())
    r, g, b = np.moveaxis(pictures["importance"][:-80, :, :3], -1, 0)  # without the legend
    red = (r > g + 0.2) & (r > b + 0.2)
    assert red.any() == (granularity == "column")  # at 0 no element is of a system


def test_a_log_of_one_step(tmp_path):
    run = Run(configure(tmp_path, partition=None))
    add_training(run, None, steps=1)
    assert list(draw(run)) == ["training"]
    run.path("sft/log_history.json").unlink(), run.path("rl/log_history.json").unlink()
    assert "last reward" in Page(report(run.config)).words


def test_scatter_points_are_the_elements(tmp_path):
    one, two = scores(seed=3), scores(seed=4)
    settings = PartitionSettings(theta=0.7)
    made = make_partition(one, two, settings, {"partition": vars(settings)})
    points = importance_points(made, (one, two, {}), seed=0)
    flat = [torch.cat([s[n].flatten() for n in made.system1]).double() for s in (one, two)]
    assert points["of"] == len(points["x"]) == flat[0].numel()
    for i, axis in enumerate(("x", "y")):
        expected = (flat[i] / flat[i].norm()).numpy()
        assert np.array_equal(np.sort(points[axis]), np.sort(expected))
        kept = points["set"] >> i & 1 == 1
        assert points[axis][kept].min() == pytest.approx(points["cuts"][i])
        assert points[axis][~kept].max() < points["cuts"][i] or kept.all()
    offset = importance_points(made, (one, two, {"trainable_rank": 2}), seed=0)
    assert offset["of"] == points["of"] // 2
    with pytest.raises(UserError, match="differ in shape"):
        importance_points(made, (one, scores(rank=3), {}), seed=0)


def test_active_shares_by_layer_and_module():
    masks = {n: torch.zeros_like(s, dtype=torch.bool) for n, s in scores(layers=3).items()}
    masks["model.layers.2.mlp.down_proj.lora_A.weight"][:] = True
    layers, modules, share = active_shares(Partition(masks, masks, masks, masks, {}), "sft")
    assert layers == ["0", "1", "2"] and modules == ["q_proj", "v_proj", "down_proj"]
    assert share[2, 2] == 40 / 56 and share.sum() == share[2, 2]


def test_smoothing():
    assert smooth([1.0]) == [1.0] and smooth([2.0] * 50) == [2.0] * 50
    assert np.ptp(smooth([0.0, 1.0] * 40)) < 0.5


ONE, TWO = "system1", "system2"
FOUL = NASTY.replace("\U0001f34e", "")  # the font of pictures has no apples
PANEL = {  # teachers' votes by row
    "rule:a": [ONE, ONE, TWO, TWO, ONE, TWO, TWO, None],
    FOUL: [ONE, TWO, TWO, TWO, ONE, TWO, None, None],
    "late $x$": [TWO, ONE, TWO, ONE, ONE, TWO, ONE, ONE],
}
RESULT = [ONE, ONE, TWO, TWO, ONE, TWO, None, ONE]


def write_panel(run, panel=PANEL, text=NASTY):
    """labels.jsonl with these votes, or without any; votes.jsonl with what was said on row 0."""
    run.dir.mkdir(exist_ok=True)
    with run.path("labels.jsonl").open("w") as labels, run.path("votes.jsonl").open("w") as votes:
        for i, system in enumerate(RESULT):
            row = {"id": f"r{i}", "question": f"Q{i} {text}", "answer": "1", "system": system}
            cast = {"votes": {t: v[i] for t, v in panel.items()}} if panel else {}
            labels.write(json.dumps(row | cast) + "\n")
        about = {"id": "r0", "model": "m", "prompt_hash": "p"}
        about["row_hash"] = row_hash(Row("r0", f"Q0 {text}", "1"))
        for teacher, (vote, *_) in panel.items():
            said = {"teacher": teacher, "label": vote, "raw": f"say {vote}\n" + NASTY * 9}
            votes.write(json.dumps(about | said) + "\n")
    return agreement_of(run.path("labels.jsonl"))


def labels_section(page):
    return page.words.split(" Labels Label ")[1].split(" Configuration config.yaml")[0]


def test_agreement_on_the_page(tmp_path):
    run = Run(configure(tmp_path))
    found = write_panel(run)
    page = Page(report(run.config))
    words = labels_section(page)
    plain = {t: " ".join(t.replace("\ud83d", "\ufffd").split()) for t in found.teachers}
    for teacher in PANEL:
        cast, (same, of) = found.votes(teacher), found.with_result(teacher)
        counts = f"{cast[ONE]} {cast[TWO]} {cast[None]} {100 * same / of:.1f}% {same} of {of}"
        assert f"{plain[teacher]} {counts}" in words
    for (a, b), (same, of, kappa) in found.pairs().items():
        line = f"{plain[a]} and {plain[b]} {same} {of} {100 * same / of:.1f}% {kappa:.3f}"
        assert line in words
    alike, several = found.unanimous()
    assert (alike, several) == (3, 7)  # by hand: rows 2, 4 and 5; row 7 has one vote
    assert f"alike on {alike} of the {several} rows" in words
    assert f"Fleiss' kappa is {found.fleiss_kappa():.3f}" in words
    shown = words.split("The rows on which teachers disagree most")[1].split("Some labelled")[0]
    assert f"lorapar votes {run.dir}" in shown
    assert [f"Row r{i}:" in shown for i in range(8)] == [i in (0, 1, 3, 6) for i in range(8)]
    assert shown.index("Row r6: no label") < shown.index("Row r0: System 1")  # one against one
    assert "rule:a System 1 say system1 <script>" in shown and "late $x$ System 2 say" in shown
    assert "characters more)" in shown and NASTY.split()[0] * 9 not in shown
    assert not set(MARKUP) & set(page.tags) and page.links == page.images
    assert len(page.images) == 1 and run.path("report/agreement.png").exists()


def test_labels_without_votes(tmp_path):
    run = Run(configure(tmp_path))
    write_panel(run)
    report(run.config)
    write_panel(run, {}, "why?")
    pages = [Page(report(run.config))]
    assert not list(run.path("report").iterdir())  # the older picture is gone
    export(run.config)
    run.path("labels.jsonl").unlink()
    pages.append(Page(report(run.config)))
    for page in pages:
        words = labels_section(page)
        assert not page.images and words.startswith("rows share System 1 4 50.0%")
        for word in ("Votes", "teacher", "kappa", "none: "):
            assert word not in words
    assert pages[0].source == pages[1].source


def test_labels_in_parquet(tmp_path):
    run = Run(configure(tmp_path))
    panel = {("<i>" if t == FOUL else t): v for t, v in PANEL.items()}
    write_panel(run, panel, "why?")
    run.path("votes.jsonl").unlink()
    pages = [Page(report(run.config))]
    export(run.config)
    run.path("labels.jsonl").unlink()
    pages.append(Page(report(run.config)))
    assert pages[0].source == pages[1].source and "<i> and late $x$ 3 6 50.0%" in pages[1].words


def panel_of(count, name="t"):
    """Teachers of whom each votes System 1 on three rows of four, as the rows are labelled."""
    votes = {(s, *[s] * count): n for s, n in ((ONE, 30), (TWO, 10))}
    return Agreement([f"{name}{i}" for i in range(count)], Counter(votes))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_agreement_picture(count):
    picture = imread(io.BytesIO(_png(draw_agreement(panel_of(count)))), format="png")
    r, g, b = np.moveaxis(picture[:-80, :, :3], -1, 0)  # without the legend
    red, blue = (r > g + 0.4) & (r > b + 0.4), (b > r + 0.4) & (b > g + 0.2)
    assert red.sum() / (red.sum() + blue.sum()) == pytest.approx(0.75, abs=0.02)
    yellow = (r > 0.9) & (g > 0.8) & (b < 0.3)  # all alike
    assert yellow.any() == (count > 1)


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize(
    "name", ["provider/a-model-of-many-words-and-more-words-", "x" * 90, "$_^"]
)
def test_names_of_teachers_do_not_collide(count, name):
    figure = draw_agreement(panel_of(count, name))
    figure.draw_without_rendering()
    for ax in figure.axes:
        boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert len(boxes) == count + 1 and all(box.x0 >= 0 for box in boxes)
        assert all(above.y0 >= below.y1 for above, below in zip(boxes, boxes[1:]))
    left = figure.axes[0]
    assert left.get_window_extent().width > 0.3 * figure.bbox.width


def test_printable_names():
    assert printable("rule:a") == "rule:a" and printable("a\n b\t") == "a b" and printable("") == ""
    assert printable("$x$ \ud83d") == r"\$x\$ ?"
    name = "openrouter/meta-llama/Llama-3.3-70B-Instruct"
    assert printable(name) == "openrouter/meta-llama/\nLlama-3.3-70B-Instruct"
    for length in range(73):
        assert printable("y" * length).replace("\n", "") == "y" * length
    cut = printable(f"first-{'y' * 90}-last").split("\n")
    assert len(cut) == 3 and max(map(len, cut)) == 24
    assert cut[0].startswith("first") and cut[1].endswith("…") and cut[2].endswith("last")
