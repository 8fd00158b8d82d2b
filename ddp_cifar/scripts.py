"""Copy the launch scripts and the Slurm scripts to a new folder: `python -m ddp_cifar.scripts FOLDER`.

They need no checkout, only an active environment that has the package. FOLDER/launch/README.md and FOLDER/slurm/README.md
explain them.
"""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from ddp_cifar.command import Arguments, run_command, writing
from ddp_cifar.errors import UserError
from ddp_cifar.log import show
from ddp_cifar.shipped import SCRIPTS, shipped


def main(argv: Sequence[str]) -> int:
    """Copy the scripts, and return the exit status."""
    parser = Arguments("ddp_cifar.scripts", __doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new or empty folder")
    folder: Path = parser.parse_args(argv).folder
    with writing(folder):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder: choose a new folder")
        for name in SCRIPTS:
            # site.sh has a checkout's own settings
            shutil.copytree(shipped(name), folder / name, ignore=shutil.ignore_patterns("site.sh"))
    local, slurm = (shlex.quote(str(folder / script)) for script in ("launch/local.sh", "slurm/train.sh"))
    show(f"one rank per GPU: {local} demo; a Slurm job: sbatch {slurm}")
    return 0


if __name__ == "__main__":
    run_command(main)
