"""List the runs of a sweep with their states: `python -m ddp_cifar.sweep SWEEP.yaml [key=value ...]`.

A sweep file has a `grid`, which maps config keys to lists of values; every combination is a run. Instead, or in addition, it has
`variants`, which maps names to settings; every variant is a run, or a grid of runs. `config` names the recipe of all runs, and
`key=value` arguments apply to all of them. Each run_dir is a subfolder of runs/sweeps/SWEEP, or of run_dir=FOLDER if given, named
after its variant and values. launch/sweep.sh runs them on this machine, slurm/sweep.sh as a Slurm array job.
"""

import itertools
import os
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

KEYS = ("config", "grid", "variants")

NOT_IN_NAMES = r"[^\w.=,+-]"


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep."""

    name: str
    """Its variant and its values in the grid, such as `lr=1e-3,seed=0`, which also name its folder."""
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
    grid = _settings(parts["grid"], path, "grid") if not unknown and "grid" in parts else {}
    variants = _variants(parts["variants"], path) if not unknown and "variants" in parts else {}
    if unknown or not (grid or variants):
        found = ", ".join(sorted(unknown)) or "no grid"
        raise UserError(
            f"{path} is not a sweep file ({found}): expected `grid`, with a list of values for each key, or `variants`, with "
            f"settings for each name, and `config`"
        )
    varied = list(dict.fromkeys(key for settings in variants.values() for key in settings))
    if twice := grid.keys() & {*varied}:
        raise UserError(f"{min(twice)} is in the grid and in the variants of {path}: expected it in one of them")
    config = parts.get("config")
    if config and not isinstance(config, yaml.ScalarNode):
        raise UserError(f"config in {path} is not a file name: expected one recipe, such as demo")
    if stray := [argument for argument in overrides if "=" not in argument]:
        raise UserError(
            f"cannot read the argument {stray[0]!r}: expected key=value; set the recipe by `config` in {path}"
        )
    if again := [argument for argument in overrides if argument.split("=")[0] in (*grid, *varied)]:
        raise UserError(f"{again[0]}: {path} already sets {again[0].split('=')[0]}: change it there")
    folder = next((a.removeprefix("run_dir=") for a in reversed(overrides) if a.startswith("run_dir=")), None)
    shared = [config.value] if config and config.value else []
    shared.append(f"tracking.hparams=[{','.join(dict.fromkeys(map(setting_of, [*grid, *varied])))}]")
    shared.append(f"tracking.group={re.sub(NOT_IN_NAMES, '-', path.stem)}")
    shared += [argument for argument in overrides if not argument.startswith("run_dir=")]
    names = short_names(grid)
    runs: dict[str, SweptRun] = {}
    for variant, settings in (variants or {"": {}}).items():
        lists = settings | grid
        for combination in itertools.product(*lists.values()):
            values = dict(zip(lists, combination, strict=True))
            named = [variant] * bool(variant) + [f"{names[key]}={values[key].text}" for key in grid]
            name = re.sub(NOT_IN_NAMES, "-", ",".join(named))
            run_dir = os.path.expanduser(f"{folder or f'runs/sweeps/{path.stem}'}/{name}")
            arguments = [*shared, *(value.argument for value in combination), f"run_dir={run_dir}"]
            if name in runs:
                raise UserError(f"{path} lists {name} twice: expected each value once")
            runs[name] = SweptRun(name, arguments, _state(run_dir, load_config(arguments)))
    return list(runs.values())


class Value(NamedTuple):
    """One value of a key."""

    text: str
    """Its text in the file."""
    argument: str
    """`key=value`, for ddp_cifar.train."""


def _variants(node: yaml.Node, path: Path) -> dict[str, dict[str, list[Value]]]:
    """The settings of each variant, by its name. Each key has one value."""
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"variants in {path} contains no names: expected lines of the form name: {{key: value, ...}}")
    return {name: _settings(child, path, f"variants: {name}", lists=False) for name, child in entries(node).items()}


def _settings(
    node: yaml.Node, path: Path, part: str, prefix: str = "", *, lists: bool = True
) -> dict[str, list[Value]]:
    """The values of each dotted key in `part` of the file: the grid, where keys have lists of values, or a variant."""
    kind, form = ("list of values", "[value, ...]") if lists else ("value", "value")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{part} in {path} contains no keys: expected lines of the form key: {form}")
    found: dict[str, list[Value]] = {}
    for name, child in entries(node).items():
        key = f"{prefix}{name}"
        if isinstance(child, yaml.MappingNode):
            new = _settings(child, path, part, f"{key}.", lists=lists)
        else:
            is_list = isinstance(child, yaml.SequenceNode)
            nodes = child.value if is_list else [child]
            values = [Value(each.value, as_argument(key, each)) for each in nodes if isinstance(each, yaml.ScalarNode)]
            if is_list != lists or not values or len(values) != len(nodes):
                raise UserError(f"{part}: {key} in {path} is not a {kind}: expected {key}: {form}")
            new = {key: values}
        if twice := found.keys() & new.keys():
            raise UserError(f"{part}: duplicate key {min(twice)} in {path}")
        found |= new
    if "run_dir" in found:
        raise UserError(
            f"{part}: run_dir in {path}: each run gets its own run_dir; to move all runs, pass run_dir=FOLDER as an argument"
        )
    return found


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
