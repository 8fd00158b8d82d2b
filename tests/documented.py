"""The commands of a page, so that tests run them as they stand."""

import re
import shutil
from pathlib import Path

from launched import CHECKOUT


def commands_of(page: str, **parts: str) -> dict[str, str]:
    """The page's indented commands, by names of the caller's, whose regular expressions find one command each.

    All of them must have a name, but for those that say what they need that no test has.
    """
    lines = re.findall(r"^    (\S.*)$", (CHECKOUT / page).read_text(), re.MULTILINE)
    commands = [line for line in lines if "# needs" not in line]
    named = {name: [command for command in commands if re.search(part, command)] for name, part in parts.items()}
    for name, found in named.items():
        assert len(found) == 1, f"{page}: {len(found)} commands have {parts[name]!r}"
    unnamed = set(commands) - {command for found in named.values() for command in found}
    assert not unnamed, f"{page}: no test runs {unnamed}"
    return {name: found[0] for name, found in named.items()}


def copy_checkout(folder: Path) -> Path:
    """What runs of a checkout, in a folder of its own whose name has a space."""
    copy = folder / "a copy"
    for name in ("launch", "slurm", "configs", "ddp_cifar"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "site.sh"))
    return copy
