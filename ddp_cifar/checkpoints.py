"""List a run's checkpoints, after reading and verifying each: `python -m ddp_cifar.checkpoints RUN_DIR`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ddp_cifar.command import EXIT_FAILED, run_command
from ddp_cifar.config import flatten
from ddp_cifar.errors import UserError
from ddp_cifar.log import show
from ddp_cifar.registry import user_defined_names
from ddp_cifar.run.run_dir import RunDir

USAGE = "usage: python -m ddp_cifar.checkpoints RUN_DIR|CHECKPOINT_FOLDER"


def main(argv: Sequence[str]) -> int:
    """Print the table; return 0, or 1 if no checkpoint is valid."""
    if "-h" in argv or "--help" in argv:
        show(USAGE)
        return 0
    if len(argv) != 1:
        raise UserError(f"found {len(argv)} arguments, expected 1; {USAGE}")

    from ddp_cifar.run.checkpoint_file import load_checkpoint  # imports torch, which takes seconds
    from ddp_cifar.run.checkpoint_store import Checkpoints

    run_dir = RunDir(argv[0])
    folder = run_dir.checkpoints if run_dir.checkpoints.is_dir() else run_dir.path
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected a run_dir, or a folder of checkpoints")
    paths = Checkpoints(folder, keep=1).paths()
    if not paths:
        raise UserError(f"{folder} has no checkpoints: expected files step_*.pt")
    if status := run_dir.read_status():
        show(f"{run_dir.path}: {status}")

    links: dict[str, list[str]] = {}
    for link in sorted(folder.glob("*.pt")):
        if link.is_symlink():
            links.setdefault(os.readlink(link), []).append(link.stem)
    show(f"{'checkpoint':<18} {'step':>8} {'epoch':>8}  {'accuracy':<34} {'MB':>8}  verified")
    good = 0
    code: set[str] = set()
    for path in paths:
        try:
            size = path.stat().st_size / 1e6
            state = load_checkpoint(path)
            where, verified = _where(state), "yes"
            good += 1
            code |= set(user_defined_names(flatten(state["config"])))
        except FileNotFoundError:
            continue  # the run has just deleted it
        except UserError as error:
            where, verified = f"{'':>8} {'':>8}  {'':<34}", f"NO: {error}"
        note = f" ({', '.join(links[path.name])})" if path.name in links else ""
        show(f"{path.name:<18} {where} {size:>8.1f}  {verified}{note}")
    for name in sorted(code):
        show(f"user-defined code: {name}")
    return 0 if good else EXIT_FAILED


def _where(state: Mapping[str, Any]) -> str:
    progress = state["progress"]
    epoch = f"{progress['epoch']}" + (f"+{progress['step_in_epoch']}" if progress["step_in_epoch"] else "")
    accuracies = [
        f"{tag.removesuffix('/accuracy')} {100 * value:.2f} %"
        for tag, value in progress["results"].items()
        if tag.endswith("/accuracy")
    ]
    return f"{progress['step']:>8} {epoch:>8}  {', '.join(accuracies) or '-':<34}"


if __name__ == "__main__":
    run_command(main)
