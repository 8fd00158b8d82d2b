"""The commands of a page, so that tests run them as they stand."""

import re
import shutil
from pathlib import Path

from launched import CHECKOUT


def commands_of(page: str, **parts: str) -> dict[str, str]:
    """The page's indented commands, by names of the caller's, whose regular expressions find one command each.

    All of them must have a name, but for those that say what they need that no test has.
    """
    named = {name: command_of(page, part) for name, part in parts.items()}
    unnamed = set(_commands(page)) - set(named.values())
    assert not unnamed, f"{page}: no test runs {unnamed}"
    return named


def command_of(page: str, part: str) -> str:
    """The one indented command of the page in which the regular expression `part` is found."""
    found = [command for command in _commands(page) if re.search(part, command)]
    assert len(found) == 1, f"{page}: {len(found)} commands have {part!r}"
    return found[0]


def _commands(page: str) -> list[str]:
    lines = re.findall(r"^    (\S.*)$", (CHECKOUT / page).read_text(), re.MULTILINE)
    return [line for line in lines if "# needs" not in line]


def copy_checkout(folder: Path) -> Path:
    """What runs of a checkout, in a folder of its own whose name has a space."""
    copy = folder / "a copy"
    for name in ("launch", "slurm", "configs", "ddp_cifar"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "site.sh"))
    return copy
