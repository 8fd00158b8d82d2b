"""Compare a run's metrics.jsonl with the original script's published table, as a plot (PNG) and a Markdown table.

    python docs/article/plot.py RUN_DIR/metrics.jsonl docs/article/curves.png

`article.csv`, next to this script, is the published table. Needs matplotlib (`pip install -e '.[dev]'`).
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Epoch(NamedTuple):
    """The three published figures of an epoch; accuracies in %."""

    loss: float
    train_accuracy: float
    test_accuracy: float


def read_article() -> dict[int, Epoch]:
    """Return the published figures by epoch."""
    with open(Path(__file__).with_name("article.csv"), encoding="utf-8") as file:
        return {int(row[0]): Epoch(*map(float, row[1:])) for row in list(csv.reader(file))[1:]}


def read_metrics(path: Path) -> dict[int, Epoch]:
    """Return the evaluated epochs of a run."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        int(row["train/epoch"]): Epoch(row["train/epoch_loss"], 100 * row["train/accuracy"], 100 * row["test/accuracy"])
        for row in rows
        if "test/accuracy" in row
    }


def plot(ours: dict[int, Epoch], article: dict[int, Epoch], path: Path, clamp_from: int = 18) -> None:
    """Plot the loss on the left and accuracies on the right; a dashed line marks the first epoch of the step clamp."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for epochs, name, color in ((article, "original script", "tab:orange"), (ours, "ddp_cifar", "tab:blue")):
        left.plot(list(epochs), [epoch.loss for epoch in epochs.values()], color=color, label=name)
        right.plot(
            list(epochs),
            [epoch.train_accuracy for epoch in epochs.values()],
            ":",
            color=color,
            label=f"{name}, train",
        )
        right.plot(list(epochs), [epoch.test_accuracy for epoch in epochs.values()], color=color, label=f"{name}, test")
    for axes, title, place in ((left, "train loss", "upper right"), (right, "accuracy, %", "lower right")):
        axes.axvline(clamp_from, color="gray", linestyle="--", linewidth=1, label="step clamp starts")
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc=place)
    figure.savefig(path, dpi=110)


def markdown(ours: dict[int, Epoch], article: dict[int, Epoch], shown: Sequence[int]) -> str:
    """Return a table with one row per epoch in `shown` that the run has, and the mean distances."""
    lines = [
        "| Epoch | Loss | Train accuracy | Test accuracy | Original script: loss | Train accuracy | Test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for number in shown:
        if number in ours:
            cells = [
                f"{e.loss:.3f} | {e.train_accuracy:.1f} % | {e.test_accuracy:.1f} %"
                for e in (ours[number], article[number])
            ]
            lines.append(f"| {number} | {' | '.join(cells)} |")
    both = [number for number in ours if number in article]
    loss, train, test = (sum(abs(ours[n][i] - article[n][i]) for n in both) / len(both) for i in range(3))
    lines.append(f"\nMean distance over {len(both)} epochs: {loss:.3f} in loss, {train:.1f} points in train accuracy, ")
    lines[-1] += f"{test:.1f} in test accuracy."
    return "\n".join(lines)


def main(metrics: Path, picture: Path) -> None:
    ours, article = read_metrics(metrics), read_article()
    plot(ours, article, picture)
    shown = {1, 2, 3, 4, 5, 10, 15, 16, 17, 18, 19, 20, 25, 30, 35, 40, 45, max(ours)}
    print(markdown(ours, article, sorted(shown)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
