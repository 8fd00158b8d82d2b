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
from typing import Any, NamedTuple

import yaml

from ddp_cifar.command import Arguments, run_command, show
from ddp_cifar.config import (
    Config,
    as_argument,
    essential,
    load_config,
    read_yaml,
    setting_of,
    short_names,
    to_dict,
)
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
    """`new`, `finished`, or another word of its status: `stopped`, `failed`, `running`."""


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
    texts, values = read_yaml(str(path))
    unknown = set(texts) - set(KEYS) if isinstance(texts, dict) else {"its content"}
    grid = _lists(texts.get("grid") or {}, values.get("grid") or {}, path) if not unknown else {}
    if unknown or not grid:
        found = ", ".join(sorted(unknown)) or "no grid"
        raise UserError(
            f"{path} is no sweep ({found}): expected `grid`, with a list of values for each key, and `config`"
        )
    if not isinstance(texts.get("config") or "", str):
        raise UserError(f"config in {path} is no name of a file: expected one recipe, such as configs/demo.yaml")
    if stray := [argument for argument in overrides if "=" not in argument]:
        raise UserError(f"cannot read the argument {stray[0]!r}: expected key=value; the recipe is `config` in {path}")
    if again := [argument for argument in overrides if argument.split("=")[0] in grid]:
        raise UserError(f"{again[0]}: {path} has values of {again[0].split('=')[0]} in its grid: change them there")
    folder = next((a.removeprefix("run_dir=") for a in reversed(overrides) if a.startswith("run_dir=")), None)
    shared = [texts["config"]] if texts.get("config") else []
    shared.append(f"tracking.hparams=[{','.join(dict.fromkeys(map(setting_of, grid)))}]")
    shared += [argument for argument in overrides if not argument.startswith("run_dir=")]
    names = short_names(grid)
    runs: dict[str, SweptRun] = {}
    for combination in itertools.product(*grid.values()):
        own = ",".join(f"{names[key]}={value.text}" for key, value in zip(grid, combination, strict=True))
        name = re.sub(r"[^\w.=,+-]", "-", own)
        run_dir = f"{folder or f'runs/sweeps/{path.stem}'}/{name}"
        arguments = [*shared, *(value.argument for value in combination), f"run_dir={run_dir}"]
        if name in runs:
            raise UserError(f"{path} has {name} twice: expected each value once")
        runs[name] = SweptRun(name, arguments, _state(run_dir, load_config(arguments, TABLES)))
    return list(runs.values())


class Value(NamedTuple):
    """One of a list."""

    text: str
    """As it stands in the file."""
    argument: str
    """`key=value`, as train takes it."""


def _lists(texts: Any, values: Any, path: Path, prefix: str = "") -> dict[str, list[Value]]:
    """By dotted key: its values."""
    if not isinstance(texts, dict):
        raise UserError(
            f"{prefix[:-1] or 'grid'} in {path} holds no keys: expected lines of the form key: [value, ...]"
        )
    found: dict[str, list[Value]] = {}
    for (name, text), value in zip(texts.items(), values.values(), strict=True):
        key = f"{prefix}{name}"
        if isinstance(text, dict):
            new = _lists(text, value, path, f"{key}.")
        elif not isinstance(text, list) or not text or not all(isinstance(each, str) for each in text):
            raise UserError(f"grid: {key} in {path} is no list of values: expected {key}: [value, ...]")
        else:
            new = {key: [Value(t, as_argument(key, t, v)) for t, v in zip(text, value, strict=True)]}
        if twice := found.keys() & new.keys():
            raise UserError(f"grid: {min(twice)} stands twice in {path}")
        found |= new
    if "run_dir" in found:
        raise UserError(
            f"grid: run_dir in {path}: a sweep's runs have their own; run_dir=FOLDER on the command line moves all"
        )
    return found


def _state(path: str, config: Config) -> str:
    """The word of a run's status; but `stopped` where it has finished and is to be longer now, or another run: train will say."""
    run_dir = RunDir(path)
    state = run_dir.read_status().split(":")[0] or "new"
    if state != "finished":
        return state
    try:
        before = essential(yaml.safe_load((run_dir.path / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError):
        return "stopped"
    now = essential(to_dict(config))
    different = {key for key in now if now[key] != before[key]}
    if different == {"train.epochs"} and before["train.epochs"] > now["train.epochs"]:
        return state
    return "stopped" if different else state


if __name__ == "__main__":
    run_command(main)
