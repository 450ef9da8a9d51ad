"""Accuracies of finished runs as CSV: `python results.py RUN [RUN ...] > results.csv`."""

import csv
import json
import sys
from pathlib import Path

from lorapar.evaluation import gain


def main(folders: list[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        "run stage system correct total accuracy low high gain gain_low gain_high".split()
    )
    for folder in map(Path, folders):
        results = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        for stage, result in results.items():
            for system in ("system1", "system2", "all"):
                r = result[system]
                shares = [r["accuracy"], r["low"], r["high"], *gain(results["base"][system], r)]
                numbers = [r["correct"], r["total"], *(f"{100 * v:.1f}" for v in shares)]
                writer.writerow([folder.name, stage, system, *numbers])


if __name__ == "__main__":
    main(sys.argv[1:])
