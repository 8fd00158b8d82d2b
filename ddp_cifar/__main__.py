"""Run a command of the project: `ddp-cifar COMMAND ...`, or `python -m ddp_cifar COMMAND ...`."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import ddp_cifar
from ddp_cifar.command import run_command
from ddp_cifar.errors import UserError, did_you_mean
from ddp_cifar.log import show

COMMANDS = {
    "train": "train a model; with --dry-run, check the run first",
    "prepare": "download or decode data before a run",
    "evaluate": "compute loss and accuracy of a trained network",
    "predict": "classify images with a trained network",
    "export": "export a trained network for other programs",
    "compare": "compare runs in a table or a plot",
    "sweep": "list the runs of a sweep with their states",
    "diagnose": "say what happened to a run, and what to do",
    "sync": "send the metrics of a run to W&B or MLflow",
    "checkpoints": "list and verify the checkpoints of a run",
    "preflight": "check machines before a run",
    "benchmark": "measure the training speed of a recipe",
    "scaling": "report the measurements of launch/scaling.sh",
    "scripts": "copy the scripts for several ranks, hosts and Slurm to a folder",
}


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with, and return its exit status."""
    name, *arguments = argv or ["--help"]
    if name in ("-h", "--help"):
        show(help_text())
    elif name == "--version":
        show(f"ddp-cifar {ddp_cifar.__version__}")
    elif name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or "ddp-cifar --help lists the commands"
        raise UserError(f"{name} is not a command of ddp-cifar; {hint}")
    else:
        command = importlib.import_module(f"ddp_cifar.{name}")
        return int(command.main(arguments))
    return 0


def help_text() -> str:
    """The text of `--help`: each command in one line."""
    lines = ["usage: ddp-cifar COMMAND ..., the same as python -m ddp_cifar.COMMAND ...", ""]
    lines += [f"  {name:<12} {purpose}" for name, purpose in COMMANDS.items()]
    lines += ["", "ddp-cifar COMMAND --help explains a command; ddp-cifar --version prints the version"]
    lines += ["on several ranks: torchrun --nproc_per_node=4 -m ddp_cifar.COMMAND ..."]
    return "\n".join(lines)


def run() -> NoReturn:
    """Run the command of this process, and exit with its status."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, os.getcwd())  # as `python -m` does: model.name=mine:network needs mine.py
    run_command(main)


if __name__ == "__main__":
    run()
