"""The runs of a sweep, and how far each is: `python -m ddp_cifar.sweep SWEEP.yaml [key=value ...]`.

A sweep's file has a `grid`, which gives keys of the config a list of values each; every combination of them is a run. `config`
names the recipe that they share, and `key=value` changes all of them. The run_dir of each is in runs/sweeps/SWEEP, or in the
run_dir that the arguments have, and named by its values. launch/sweep.sh runs them here, slurm/sweep.sh as an array job.
"""

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ddp_cifar.command import Arguments, run_command, show
from ddp_cifar.config import Config, load_config, read_yaml, short_names
from ddp_cifar.errors import UserError
from ddp_cifar.run_dir import RunDir
from ddp_cifar.train import TABLES

KEYS = ("config", "grid")


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep."""

    name: str
    """Its values, such as `lr=1e-3,seed=0`: its folder in the sweep's."""
    arguments: list[str]
    """As train takes them, its run_dir last."""
    state: str
    """`new`, `finished` (with as many epochs as it is to have), or the word of its status: `stopped`, `failed`, `running`."""


def main(argv: Sequence[str]) -> int:
    """Print the runs, and return the exit status."""
    parser = Arguments("ddp_cifar.sweep", __doc__)
    parser.add_argument("sweep", metavar="SWEEP.yaml", type=Path)
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument(
        "--lines", action="store_true", help="a line a run, for shells: its state, its arguments, quoted"
    )
    options = parser.parse_intermixed_args(argv)
    runs = expand(options.sweep, options.overrides)
    if options.lines:
        show("\n".join(f"{run.state} {shlex.join(run.arguments)}" for run in runs))
    else:
        finished = sum(run.state == "finished" for run in runs)
        folder = Path(runs[0].arguments[-1].removeprefix("run_dir=")).parent
        show(
            "\n".join([f"{len(runs)} runs in {folder}, {finished} finished", *(f"{r.state:<9} {r.name}" for r in runs)])
        )
    return 0


def expand(path: Path, overrides: Sequence[str]) -> list[SweptRun]:
    """The runs of the sweep at `path`, each with a config that is valid. Raises `UserError` where one is not."""
    texts, _ = read_yaml(str(path))
    unknown = set(texts) - set(KEYS) if isinstance(texts, dict) else {"its content"}
    grid = _lists(texts.get("grid") or {}, path) if not unknown else {}
    if unknown or not grid:
        found = ", ".join(sorted(unknown)) or "no grid"
        raise UserError(
            f"{path} is no sweep ({found}): expected `grid`, with a list of values for each key, and `config`"
        )
    if stray := [argument for argument in overrides if "=" not in argument]:
        raise UserError(f"cannot read the argument {stray[0]!r}: expected key=value; the recipe is `config` in {path}")
    if again := [argument for argument in overrides if argument.split("=")[0] in grid]:
        raise UserError(f"{again[0]}: {path} has values of {again[0].split('=')[0]} in its grid: change them there")
    if not isinstance(texts.get("config") or "", str):
        raise UserError(f"config in {path} is no name of a file: expected one recipe, such as configs/demo.yaml")
    folder = next((a.removeprefix("run_dir=") for a in reversed(overrides) if a.startswith("run_dir=")), None)
    shared = [texts["config"]] if texts.get("config") else []
    shared += [argument for argument in overrides if not argument.startswith("run_dir=")]
    names = short_names(grid)
    runs: dict[str, SweptRun] = {}
    for values in itertools.product(*grid.values()):
        own = dict(zip(grid, values, strict=True))
        name = re.sub(r"[^\w.=,+-]", "-", ",".join(f"{names[key]}={value}" for key, value in own.items()))
        run_dir = f"{folder or f'runs/sweeps/{path.stem}'}/{name}"
        arguments = [*shared, *(f"{key}={value}" for key, value in own.items()), f"run_dir={run_dir}"]
        if name in runs:
            raise UserError(f"{path} has {name} twice: expected each value once")
        runs[name] = SweptRun(name, arguments, _state(run_dir, load_config(arguments, TABLES)))
    return list(runs.values())


def _lists(section: Any, path: Path, prefix: str = "") -> dict[str, list[str]]:
    """By dotted key: its values, as text."""
    if not isinstance(section, dict):
        raise UserError(
            f"{prefix[:-1] or 'grid'} in {path} holds no keys: expected lines of the form key: [value, ...]"
        )
    found: dict[str, list[str]] = {}
    for name, values in section.items():
        if isinstance(values, dict):
            found |= _lists(values, path, f"{prefix}{name}.")
        elif not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise UserError(
                f"grid: {prefix}{name} in {path} is no list of values: expected {prefix}{name}: [value, ...]"
            )
        else:
            found[f"{prefix}{name}"] = values
    if "run_dir" in found:
        raise UserError(
            f"grid: run_dir in {path}: a sweep's runs have their own; run_dir=FOLDER on the command line moves all"
        )
    return found


def _state(path: str, config: Config) -> str:
    run_dir = RunDir(path)
    state = run_dir.read_status().split(":")[0] or "new"
    if state == "finished":
        try:
            length = yaml.safe_load((run_dir.path / "config.yaml").read_text(encoding="utf-8"))["train"]
        except (OSError, yaml.YAMLError, TypeError, KeyError):
            return "running"
        if (length.get("epochs"), length.get("max_steps")) != (config.train.epochs, config.train.max_steps):
            return "stopped"  # with more to do now
    return state


if __name__ == "__main__":
    run_command(main)
