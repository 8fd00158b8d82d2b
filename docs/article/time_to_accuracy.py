"""Compare how fast the recipes get accurate: test accuracy by epoch and by training time, as a plot (PNG) and a Markdown table.

    python docs/article/time_to_accuracy.py docs/article/time_to_accuracy.png

Reads RECIPE-SEED.jsonl in this folder: the rows of a run's metrics.jsonl that have a test accuracy. The original script's table
and the run of article.yaml are those of plot.py. The time of an epoch is the lower quartile of the recipe's epochs, as other work
slowed some of them. Needs matplotlib (`pip install -e '.[dev]'`).
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plot import Epoch, read_article, read_metrics

FOLDER = Path(__file__).parent
GOAL = 85.1
"""Test accuracy in %: what the original script's table first reaches in epoch 35."""

Curve = dict[int, float]
"""Test accuracy in % by epoch."""


def curve_of(epochs: Mapping[int, Epoch]) -> Curve:
    return {number: epoch.test_accuracy for number, epoch in epochs.items()}


def read_recipe(recipe: str) -> tuple[list[Curve], float]:
    """Return the curves of a recipe's seeds, and the lower quartile of the seconds of training per epoch."""
    paths = sorted(FOLDER.glob(f"{recipe}-*.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    seconds = statistics.quantiles([row["time/epoch_s"] for row in rows], n=4)[0]
    return [curve_of(read_metrics(path)) for path in paths], seconds


def mean(curves: Sequence[Curve]) -> Curve:
    """Return the mean of the curves at each epoch that all of them have."""
    return {epoch: statistics.fmean(curve[epoch] for curve in curves) for epoch in min(curves, key=len)}


def first(curve: Curve) -> str:
    """Return the first epoch that reaches the goal."""
    return next((str(epoch) for epoch, accuracy in curve.items() if accuracy >= GOAL), "-")


def main(picture: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    single: dict[str, tuple[Curve, str]] = {
        "original script": (curve_of(read_article()), "tab:orange"),
        "article.yaml": (curve_of(read_metrics(FOLDER / "metrics.jsonl")), "tab:green"),
    }
    print(f"| Recipe | Seeds | First epoch with {GOAL} % | Last epoch | Test accuracy in it | Time per epoch |")
    print("|---|---|---|---|---|---|")
    for name, (curve, color) in single.items():
        left.plot(list(curve), list(curve.values()), color=color, label=name)
        print(f"| {name} | 1 | {first(curve)} | {max(curve)} | {curve[max(curve)]:.2f} % | |")
    recipes = sorted({path.stem.rpartition("-")[0] for path in FOLDER.glob("*-*.jsonl")})
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
