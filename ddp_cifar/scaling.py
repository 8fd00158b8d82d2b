"""Report the measurements of `launch/scaling.sh`: `python -m ddp_cifar.scaling FOLDER`.

Reads the benchmark results FOLDER/weak-N.json (a fixed number of images per rank, on N ranks) and FOLDER/strong-N.json (a fixed
number of images per step), and writes a table, FOLDER/scaling.md, and a plot, FOLDER/scaling.png. The efficiency of N ranks is
their images/s divided by N times the images/s of one rank. Without a result for one rank, the smallest number of ranks is the
reference.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_cifar.command import Arguments, run_command, span, writing
from ddp_cifar.errors import UserError
from ddp_cifar.log import show

KINDS = {"weak": "the same number of images per rank", "strong": "the same number of images per step"}

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""weak or strong -> number of ranks -> result of the benchmark."""


def main(argv: Sequence[str]) -> int:
    """Write the report for `argv` and return the exit status."""
    parser = Arguments("ddp_cifar.scaling", __doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    folder = parser.parse_args(argv).folder
    results = read(folder)
    text = table(results)
    show(text)
    with writing(folder / "scaling.md"):
        (folder / "scaling.md").write_text(text + "\n", encoding="utf-8")
    with writing(folder / "scaling.png"):
        draw(results, folder / "scaling.png")
    return 0


def read(folder: Path) -> Results:
    """Read the results in `folder`. Raises `UserError` if there are none, or one is damaged."""
    results: dict[str, dict[int, Any]] = {kind: {} for kind in KINDS}
    for kind, found in results.items():
        for path in folder.glob(f"{kind}-*.json"):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                found[int(result["world_size"])] = result
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is not a benchmark result ({error}): remove it and measure again") from error
    results = {kind: dict(sorted(found.items())) for kind, found in results.items() if found}
    if not results:
        raise UserError(f"{folder} has no weak-N.json and no strong-N.json: launch/scaling.sh writes them")
    return results


def efficiency(found: Mapping[int, Mapping[str, Any]], ranks: int) -> float:
    """Return images/s per rank on `ranks`, divided by images/s per rank on the smallest number of ranks."""
    fewest = min(found)
    return float(found[ranks]["images_per_s"] / found[fewest]["images_per_s"] * fewest / ranks)


def table(results: Results) -> str:
    """Format the results in Markdown: one row per kind and number of ranks."""
    lines = []
    for kind, found in results.items():
        first = next(iter(found.values()))
        title = ", ".join(str(first[key]) for key in ("model", "precision", "device", "backend"))
        lines += [
            f"{kind} scaling: {KINDS[kind]}. {title}, {first['threads']} CPU threads per rank, torch {first['torch']}",
            "",
            "| ranks | images per rank | images/s, median (min - max) | efficiency | time per step | exposed communication |",
            "|---|---|---|---|---|---|",
        ]
        for ranks, result in found.items():
            exposed, images = result["exposed_communication"], result["global_batch_size"]
            lines.append(
                f"| {ranks} | {span(images // ranks, -(-images // ranks))} | {result['images_per_s']:,.0f} "
                f"({result['images_per_s_min']:,.0f} - {result['images_per_s_max']:,.0f}) | {efficiency(found, ranks):.2f} "
                f"| {1000 * result['step_s']:.1f} ms | {'-' if exposed is None else f'{exposed:.1%}'} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def draw(results: Results, path: Path) -> None:
    """Plot images/s and efficiency against the number of ranks."""
    from matplotlib.figure import Figure  # imported here because it is slow; pyplot would need a display

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, share = figure.subplots(1, 2)
    for kind, found in results.items():
        ranks = list(found)
        rates = [result["images_per_s"] for result in found.values()]
        spread = [
            [abs(result[f"images_per_s_{end}"] - result["images_per_s"]) for result in found.values()]
            for end in ("min", "max")
        ]
        (line,) = speed.plot(ranks, rates, marker="o", label=f"{kind}: {KINDS[kind]}")
        speed.errorbar(ranks, rates, yerr=spread, color=line.get_color(), capsize=3, linestyle="none")
        speed.plot(ranks, [rates[0] * n / ranks[0] for n in ranks], color=line.get_color(), linestyle=":", linewidth=1)
        share.plot(ranks, [efficiency(found, n) for n in ranks], marker="o", label=kind)
    every = sorted({n for found in results.values() for n in found})
    for axes, label in ((speed, "images/s (dotted: linear scaling)"), (share, "efficiency")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, labels=[str(n) for n in every])
        axes.minorticks_off()
        axes.set_xlabel("ranks")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main)
