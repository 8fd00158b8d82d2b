"""Compare runs: `python -m ddp_cifar.compare RUN_DIR ...`.

Prints one row per run from its metrics.jsonl: the settings in which the runs differ, the progress, the last and the best
accuracy, and the speed. For runs that differ only in the seed, it prints mean and standard deviation of the accuracy. For two
runs with the same config (apart from run_dir, hardware and the number of ranks), it prints the first step at which the
fingerprints of their weights differ.
"""

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_cifar.command import Arguments, percent, run_command, writing
from ddp_cifar.config import as_typed, result_keys, short_names
from ddp_cifar.errors import UserError, first_line
from ddp_cifar.log import log, show
from ddp_cifar.run.run_dir import RunDir, read_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The content of a run_dir."""

    path: Path
    status: str
    config: dict[str, Any]
    """Only `result_keys`, by dotted keys."""
    rows: list[Row]

    @staticmethod
    def read(path: Path) -> "Run":
        """Read the run_dir `path`. Raises `UserError` if it is none."""
        run_dir = RunDir(str(path))
        try:
            config = run_dir.read_config()
            rows = [
                {tag: value for tag, value in row.items() if isinstance(value, str) == (tag == "fingerprint")}
                for row in read_rows(run_dir.metrics)
            ]
        except OSError as error:
            raise UserError(f"{path} is not a run_dir ({error.strerror}: {error.filename})") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged: {first_line(error)}") from error
        return Run(path, run_dir.read_status(), result_keys(config), rows)

    @property
    def evaluations(self) -> list[Row]:
        """The rows with an accuracy on the test set, or else on held-out images."""
        return [row for row in self.rows if self.tag in row]

    @property
    def tag(self) -> str:
        return "test/accuracy" if any("test/accuracy" in row for row in self.rows) else "val/accuracy"

    @property
    def accuracy(self) -> float | None:
        """The last accuracy: the best one, chosen on test images, would be biased."""
        return self.evaluations[-1][self.tag] if self.evaluations else None

    @property
    def images_per_s(self) -> float | None:
        """The median over rows, or over epochs if the run is too short to have such rows."""
        for tag in ("train/images_per_s", "train/epoch_images_per_s"):
            if speeds := [row[tag] for row in self.rows if row.get(tag)]:
                return float(statistics.median(speeds))
        return None

    def seconds(self) -> list[float]:
        """Productive seconds (training and evaluation) from the run's start to each evaluation; 0 where not recorded."""
        return [row.get("run/productive_s", 0.0) for row in self.evaluations]

    def fingerprints(self) -> dict[int, str]:
        """The fingerprints of the weights by step."""
        return {row["step"]: row["fingerprint"] for row in self.rows if "fingerprint" in row}


def main(argv: Sequence[str]) -> int:
    """Print the tables, draw the plot if requested, and return the exit status."""
    parser = Arguments("ddp_cifar.compare", __doc__)
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--png", type=Path, help="plot accuracy against steps, time and images to this file")
    options = parser.parse_intermixed_args(argv)
    started = [path for path in options.run_dirs if not (path / "lock").exists() or RunDir(str(path)).metrics.exists()]
    for path in sorted(set(options.run_dirs) - set(started)):
        log.warning(f"{path} is skipped: its run has no metrics yet")
    if not started:
        raise UserError("none of these runs has metrics yet: try again later")
    runs = [Run.read(path) for path in started]
    show("\n".join([_table(runs), *_over_seeds(runs), *_divergences(runs)]))
    if options.json:
        with writing(options.json):
            options.json.write_text(json.dumps([_summary(run) for run in runs], indent=1) + "\n", encoding="utf-8")
    if options.png:
        with writing(options.png):
            draw_curves(runs, options.png)
    return 0


def _summary(run: Run) -> Row:
    last: Row = run.rows[-1] if run.rows else {}
    return {
        "run_dir": str(run.path),
        "status": run.status,
        "seed": run.config.get("seed"),
        "step": last.get("step", 0),
        "epoch": max((row.get("train/epoch", 0) for row in run.rows), default=0),
        "accuracy": run.accuracy,
        "best_accuracy": max((row[run.tag] for row in run.evaluations), default=None),
        "images_per_s": run.images_per_s,
        "restarts": last.get("run/restarts", 0),
    }


def _different(runs: Sequence[Run]) -> dict[str, str]:
    """The keys, except the seed, in which the runs' configs differ, each with a short name."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "seed")
    different = [key for key in keys if len({as_typed(run.config.get(key)) for run in runs}) > 1]
    names = short_names(["seed", *different])
    return {key: names[key] for key in different}


def _table(runs: Sequence[Run]) -> str:
    different = _different(runs)
    head = ["run_dir", "status", "seed", *different.values(), "epoch", "step", "accuracy", "best", "images/s"]
    rows = [head]
    for run in runs:
        row = _summary(run)
        rows.append(
            [
                row["run_dir"],
                row["status"].split(":")[0],
                str(row["seed"]),
                *(as_typed(run.config.get(key)) for key in different),
                str(row["epoch"]),
                str(row["step"]),
                percent(row["accuracy"]),
                percent(row["best_accuracy"]),
                "-" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    words = 2  # the first columns are words, aligned left; the others are numbers, aligned right
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < words else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    )


def _over_seeds(runs: Sequence[Run]) -> list[str]:
    """One line per group of runs that differ only in the seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        shared = {key: value for key, value in run.config.items() if key != "seed"}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(run)
    lines, different = [], _different(runs)
    for group in groups.values():
        by_seed = {
            run.config.get("seed"): run for run in group if run.accuracy is not None and run.status == "finished"
        }
        if len(by_seed) < 2:
            continue
        accuracies = [run.accuracy for run in by_seed.values() if run.accuracy is not None]
        mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
        label = "".join(f"{short}={as_typed(group[0].config.get(key))}, " for key, short in different.items())
        lines.append(
            f"{label}over {len(by_seed)} seeds ({', '.join(str(seed) for seed in by_seed)}): accuracy {percent(mean)}, "
            f"standard deviation {percent(std)}"
        )
    return lines


def _divergences(runs: Sequence[Run]) -> list[str]:
    """One line per pair of runs with the same config: where their weights diverge."""
    lines = []
    for one, other in itertools.combinations(runs, 2):
        if one.config != other.config:
            continue
        mine, theirs = one.fingerprints(), other.fingerprints()
        common = sorted(mine.keys() & theirs.keys())
        if not common:
            continue
        first = next((step for step in common if mine[step] != theirs[step]), None)
        if first is None:
            lines.append(
                f"{one.path} and {other.path}: identical weights at all {len(common)} fingerprints up to step {common[-1]}"
            )
        else:
            before = max((step for step in common if step < first), default=0)
            lines.append(f"{one.path} and {other.path}: weights diverge after step {before}, by step {first}")
    return lines


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Plot each run's accuracy against steps, time and images."""
    from matplotlib.figure import Figure  # imported here because it is slow; pyplot would need a display

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    by_steps, by_time, by_images = figure.subplots(1, 3, sharey=True)
    for run in runs:
        accuracies = [100 * row[run.tag] for row in run.evaluations]
        steps = [row["step"] for row in run.evaluations]
        images = run.config.get("train.global_batch_size", 0)
        by_steps.plot(steps, accuracies, marker=".", label=str(run.path))
        by_time.plot([seconds / 60 for seconds in run.seconds()], accuracies, marker=".")
        by_images.plot([step * images / 1e6 for step in steps], accuracies, marker=".")
    by_steps.set_ylabel("accuracy, %")
    by_steps.set_xlabel("steps")
    by_time.set_xlabel("time, minutes")
    by_images.set_xlabel("images trained on, millions")
    by_steps.legend(fontsize=8)
    for axes in (by_steps, by_time, by_images):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


if __name__ == "__main__":
    run_command(main)
