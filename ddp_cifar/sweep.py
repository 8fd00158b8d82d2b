"""List the runs of a sweep with their states: `python -m ddp_cifar.sweep SWEEP.yaml [key=value ...]`.

A sweep file has a `grid`, which maps config keys to lists of values; every combination is a run. `config` names the recipe of
all runs, and `key=value` arguments apply to all of them. Each run_dir is a subfolder of runs/sweeps/SWEEP, or of run_dir=FOLDER
if given, named after its values. launch/sweep.sh runs them on this machine, slurm/sweep.sh as a Slurm array job.
"""

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from ddp_cifar.command import Arguments, run_command
from ddp_cifar.config import (
    Config,
    as_argument,
    entries,
    load_config,
    read_yaml,
    result_keys,
    setting_of,
    short_names,
    to_dict,
)
from ddp_cifar.errors import UserError
from ddp_cifar.log import show
from ddp_cifar.run.run_dir import RunDir
from ddp_cifar.shipped import SWEEPS

KEYS = ("config", "grid")

NOT_IN_NAMES = r"[^\w.=,+-]"


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep."""

    name: str
    """Its values, such as `lr=1e-3,seed=0`, which also name its folder."""
    arguments: list[str]
    """Arguments for ddp_cifar.train, run_dir last."""
    state: str
    """`new`, or the first word of its status: `finished`, `stopped`, `failed`, `running`."""


def main(argv: Sequence[str]) -> int:
    """Print the runs, and return the exit status."""
    parser = Arguments("ddp_cifar.sweep", __doc__)
    parser.add_argument("sweep", metavar="SWEEP.yaml", type=Path)
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument(
        "--null",
        action="store_true",
        help="print each run for scripts: its state, its arguments and an empty text, each ended by a NUL byte",
    )
    options = parser.parse_intermixed_args(argv)
    runs = expand(options.sweep, options.overrides)
    if options.null:
        sys.stdout.write("".join(f"{text}\0" for run in runs for text in (run.state, *run.arguments, "")))
    else:
        finished = sum(run.state == "finished" for run in runs)
        folder = Path(runs[0].arguments[-1].removeprefix("run_dir=")).parent
        show(
            "\n".join([f"{len(runs)} runs in {folder}, {finished} finished", *(f"{r.state:<9} {r.name}" for r in runs)])
        )
    return 0


def expand(path: Path, overrides: Sequence[str]) -> list[SweptRun]:
    """Return the runs of the sweep file `path`. Raises `UserError` if the file or the config of a run is invalid."""
    content = read_yaml(str(path), SWEEPS)
    parts = entries(content) if isinstance(content, yaml.MappingNode) else {}
    unknown = parts.keys() - set(KEYS) if parts else {"no keys"}
    grid = _lists(parts["grid"], path) if not unknown and "grid" in parts else {}
    if unknown or not grid:
        found = ", ".join(sorted(unknown)) or "no grid"
        raise UserError(
            f"{path} is not a sweep file ({found}): expected `grid`, with a list of values for each key, and `config`"
        )
    config = parts.get("config")
    if config and not isinstance(config, yaml.ScalarNode):
        raise UserError(f"config in {path} is not a file name: expected one recipe, such as demo")
    if stray := [argument for argument in overrides if "=" not in argument]:
        raise UserError(
            f"cannot read the argument {stray[0]!r}: expected key=value; set the recipe by `config` in {path}"
        )
    if again := [argument for argument in overrides if argument.split("=")[0] in grid]:
        raise UserError(f"{again[0]}: the grid of {path} already sets {again[0].split('=')[0]}: change it there")
    folder = next((a.removeprefix("run_dir=") for a in reversed(overrides) if a.startswith("run_dir=")), None)
    shared = [config.value] if config and config.value else []
    shared.append(f"tracking.hparams=[{','.join(dict.fromkeys(map(setting_of, grid)))}]")
    shared.append(f"tracking.group={re.sub(NOT_IN_NAMES, '-', path.stem)}")
    shared += [argument for argument in overrides if not argument.startswith("run_dir=")]
    names = short_names(grid)
    runs: dict[str, SweptRun] = {}
    for combination in itertools.product(*grid.values()):
        values = ",".join(f"{names[key]}={value.text}" for key, value in zip(grid, combination, strict=True))
        name = re.sub(NOT_IN_NAMES, "-", values)
        run_dir = f"{folder or f'runs/sweeps/{path.stem}'}/{name}"
        arguments = [*shared, *(value.argument for value in combination), f"run_dir={run_dir}"]
        if name in runs:
            raise UserError(f"{path} lists {name} twice: expected each value once")
        runs[name] = SweptRun(name, arguments, _state(run_dir, load_config(arguments)))
    return list(runs.values())


class Value(NamedTuple):
    """One value of a list in the grid."""

    text: str
    """Its text in the file."""
    argument: str
    """`key=value`, for ddp_cifar.train."""


def _lists(node: yaml.Node, path: Path, prefix: str = "") -> dict[str, list[Value]]:
    """The values of each dotted key."""
    if not isinstance(node, yaml.MappingNode):
        raise UserError(
            f"{prefix[:-1] or 'grid'} in {path} contains no keys: expected lines of the form key: [value, ...]"
        )
    found: dict[str, list[Value]] = {}
    for name, child in entries(node).items():
        key = f"{prefix}{name}"
        if isinstance(child, yaml.MappingNode):
            new = _lists(child, path, f"{key}.")
        elif not isinstance(child, yaml.SequenceNode) or not _holds_values(child):
            raise UserError(f"grid: {key} in {path} is not a list of values: expected {key}: [value, ...]")
        else:
            new = {key: [Value(each.value, as_argument(key, each)) for each in child.value]}
        if twice := found.keys() & new.keys():
            raise UserError(f"grid: duplicate key {min(twice)} in {path}")
        found |= new
    if "run_dir" in found:
        raise UserError(
            f"grid: run_dir in {path}: each run gets its own run_dir; to move all runs, pass run_dir=FOLDER as an argument"
        )
    return found


def _holds_values(node: yaml.SequenceNode) -> bool:
    return bool(node.value) and all(isinstance(each, yaml.ScalarNode) for each in node.value)


def _state(path: str, config: Config) -> str:
    """The first word of a run's status, or `new`.

    A finished run whose config now asks for more epochs, or for a different run, counts as `stopped`: train continues it, or
    rejects it with an error.
    """
    run_dir = RunDir(path)
    state = run_dir.read_status().split(":")[0] or "new"
    if state != "finished":
        return state
    try:
        before = result_keys(run_dir.read_config())
    except (OSError, ValueError):
        return "stopped"
    now = result_keys(to_dict(config))
    different = {key for key in now if now[key] != before[key]}
    if different == {"train.epochs"} and before["train.epochs"] > now["train.epochs"]:
        return state
    return "stopped" if different else state


if __name__ == "__main__":
    run_command(main)
