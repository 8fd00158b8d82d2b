"""What `launch/scaling.sh` has measured: `python -m ddp_cifar.scaling FOLDER`.

Reads the benchmark's results FOLDER/weak-N.json (as many images a rank on N ranks as on one) and FOLDER/strong-N.json (as many
images in all), and writes a table, FOLDER/scaling.md, and a plot, FOLDER/scaling.png. The efficiency of N ranks is their
images/s by N times those of one rank.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_cifar.command import Arguments, run_command, show, writing
from ddp_cifar.errors import UserError

KINDS = {"weak": "as many images a rank", "strong": "as many images in all"}

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""weak or strong -> number of ranks -> what the benchmark reports."""


def main(argv: Sequence[str]) -> int:
    """Report as `argv` says, and return the exit status."""
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
    """Raises `UserError` where there is nothing to report, or a result is damaged."""
    results: dict[str, dict[int, Any]] = {kind: {} for kind in KINDS}
    for kind, found in results.items():
        for path in folder.glob(f"{kind}-*.json"):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                found[int(result["world_size"])] = result
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} is not what the benchmark writes ({error}): remove it and measure again"
                ) from error
    results = {kind: dict(sorted(found.items())) for kind, found in results.items() if found}
    if not results:
        raise UserError(f"{folder} has no weak-N.json and no strong-N.json: launch/scaling.sh writes them")
    return results


def efficiency(found: Mapping[int, Mapping[str, Any]], ranks: int) -> float:
    """images/s of `ranks` by what as many would have if each did as much as one of the fewest did."""
    fewest = min(found)
    return float(found[ranks]["images_per_s"] / found[fewest]["images_per_s"] * fewest / ranks)


def table(results: Results) -> str:
    """In Markdown, a row a kind and number of ranks."""
    lines = []
    for kind, found in results.items():
        first = next(iter(found.values()))
        title = ", ".join(str(first[key]) for key in ("model", "precision", "device", "backend"))
        lines += [
            f"{kind} scaling: {KINDS[kind]}. {title}, {first['threads']} CPU threads a rank, torch {first['torch']}",
            "",
            "| ranks | images a rank | images/s, median (min - max) | efficiency | a step | exposed communication |",
            "|---|---|---|---|---|---|",
        ]
        for ranks, result in found.items():
            exposed = result["exposed_communication"]
            lines.append(
                f"| {ranks} | {result['global_batch_size'] // ranks} | {result['images_per_s']:,.0f} "
                f"({result['images_per_s_min']:,.0f} - {result['images_per_s_max']:,.0f}) | {efficiency(found, ranks):.2f} "
                f"| {1000 * result['step_s']:.1f} ms | {'-' if exposed is None else f'{exposed:.1%}'} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def draw(results: Results, path: Path) -> None:
    """images/s and efficiency by the number of ranks."""
    from matplotlib.figure import Figure  # here, as it takes a while; and without pyplot, which wants a display

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
    for axes, label in ((speed, "images/s (dotted: in proportion)"), (share, "efficiency")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, labels=[str(n) for n in every])
        axes.set_xlabel("ranks")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main)
