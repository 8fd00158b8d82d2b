"""Compare how fast the recipes get accurate: test accuracy by epoch and by training time, as a plot (PNG) and a Markdown table.

    python docs/time_to_accuracy/plot.py docs/time_to_accuracy/curves.png

Reads RECIPE-SEED.jsonl in this folder: the rows of a run's metrics.jsonl that have a test accuracy. The original script's table
and the run of article.yaml are those in docs/article. The time of an epoch is the lower quartile of the recipe's epochs, as other
work slowed some of them. Needs matplotlib (`pip install -e '.[dev]'`).
"""

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
ARTICLE = FOLDER.parent / "article"
GOAL = 85.1
"""Test accuracy in %: what the original script's table first reaches in epoch 35."""

Curve = dict[int, float]
"""Test accuracy in % by epoch."""


def read_metrics(path: Path) -> tuple[Curve, list[float]]:
    """Return a run's test accuracies, and the seconds of training of each epoch."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "test/accuracy" in row]
    return {int(row["train/epoch"]): 100 * row["test/accuracy"] for row in rows}, [row["time/epoch_s"] for row in rows]


def read_recipe(recipe: str) -> tuple[list[Curve], float]:
    """Return the curves of a recipe's seeds, and the lower quartile of the seconds of training per epoch."""
    runs = [read_metrics(path) for path in sorted(FOLDER.glob(f"{recipe}-*.jsonl"))]
    return [curve for curve, _ in runs], statistics.quantiles([s for _, epochs in runs for s in epochs], n=4)[0]


def read_article() -> Curve:
    """Return the published test accuracies."""
    with open(ARTICLE / "article.csv", encoding="utf-8") as file:
        return {int(row[0]): float(row[3]) for row in list(csv.reader(file))[1:]}


def mean(curves: Sequence[Curve]) -> Curve:
    """Return the mean of the curves at each epoch that all of them have."""
    return {epoch: statistics.fmean(curve[epoch] for curve in curves) for epoch in min(curves, key=len)}


def first(curve: Curve) -> str:
    """Return the first epoch that reaches the goal."""
    return next((str(epoch) for epoch, accuracy in curve.items() if accuracy >= GOAL), "-")


def main(picture: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    single: dict[str, tuple[Curve, str]] = {
        "original script": (read_article(), "tab:orange"),
        "article.yaml": (read_metrics(ARTICLE / "metrics.jsonl")[0], "tab:green"),
    }
    print(f"| Recipe | Seeds | First epoch with {GOAL} % | Last epoch | Test accuracy in it | Time per epoch |")
    print("|---|---|---|---|---|---|")
    for name, (curve, color) in single.items():
        left.plot(list(curve), list(curve.values()), color=color, label=name)
        print(f"| {name} | 1 | {first(curve)} | {max(curve)} | {curve[max(curve)]:.2f} % | |")
    recipes = sorted({path.stem.rpartition("-")[0] for path in FOLDER.glob("*.jsonl")})
    for recipe, color in zip(recipes, ("tab:red", "tab:blue", "tab:purple"), strict=False):
        curves, seconds = read_recipe(recipe)
        middle, ends = mean(curves), [curve[max(curve)] for curve in curves]
        for axes, unit in ((left, 1.0), (right, seconds / 60)):
            for number, curve in enumerate(curves):
                label = None if number else f"{recipe}.yaml, {len(curves)} seed{'s' * (len(curves) > 1)}"
                axes.plot([unit * epoch for epoch in curve], list(curve.values()), color=color, alpha=0.7, label=label)
        spread = f" ± {statistics.stdev(ends):.2f}" if len(ends) > 1 else ""
        print(
            f"| {recipe}.yaml | {len(curves)} | {first(middle)} | {max(middle)} | {statistics.fmean(ends):.2f}{spread} % | "
            f"{seconds:.0f} s |"
        )
    for axes, label in ((left, "epoch"), (right, "minutes of training on two CPU cores")):
        axes.axhline(GOAL, color="gray", linestyle="--", linewidth=1, label=f"{GOAL} %")
        axes.set(xlabel=label, ylim=(45, 91))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    left.set(title="test accuracy, %")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
