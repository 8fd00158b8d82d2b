"""Find the commands in the project's pages, so that tests can run them unchanged."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launched import CHECKOUT

PAGES = (
    *("README.md", "CONTRIBUTING.md", "docs/*.md", "launch/README.md", "slurm/README.md", "benchmarks/README.md"),
    "launch/kubernetes/*",
    *("configs/*.yaml", "configs/sweeps/*.yaml", "launch/*.sh", "slurm/*.sh", "benchmarks/*.sh", "benchmarks/*.py"),
)
PROGRAMS = {
    *(
        "torchrun",
        "ddp-cifar",
        "python",
        "pip",
        "make",
        "tensorboard",
        "sbatch",
        "salloc",
        "srun",
        "scancel",
        "sinfo",
        "squeue",
        "sacct",
    ),
    *(
        "scontrol",
        "ssh",
        "git",
        "df",
        "diff",
        "cp",
        "echo",
        "touch",
        "tail",
        "py-spy",
        "module",
        "apt-get",
        "source",
        "kill",
    ),
}
"""Inline code is a command if it starts with one of these programs and has arguments, or with a script of the project."""
SCRIPTS = ("launch/", "slurm/", "benchmarks/", "tests/")


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[str]:
    found = [path for pattern in PAGES for path in sorted(CHECKOUT.glob(pattern))]
    return [str(path.relative_to(CHECKOUT)) for path in found if path.name != "site.sh"]


def commands_of(page: str) -> list[Command]:
    """All commands in a page, or in the head of a script or config."""
    text = (CHECKOUT / page).read_text()
    if page.endswith(".py"):
        text = text.split('"""')[1]
    elif not page.endswith(".md"):
        head = re.match(r"(#.*\n)*", text)
        assert head
        text = re.sub(r"^# ?", "", head[0], flags=re.MULTILINE)
    return list(commands_in(text, page))


def commands_in(text: str, page: str) -> Iterator[Command]:
    """The commands in indented blocks, in fenced blocks (of a diff, only added lines), and in inline code."""
    fence, continued = None, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
            continue
        if fence in ("python", "text"):
            continue
        if fence == "diff":
            block = line[1:].strip() if line.startswith("+") else ""
        elif fence is not None:
            block = line.strip()
        else:
            block = line.strip() if line.startswith("    ") else ""
        if block:
            continued += re.sub(r"(^|\s+)#.*", "", block)
            if continued.endswith("\\"):
                continued = continued[:-1]
                continue
            for part in re.split(r"\s{3,}or\s{3,}", continued):
                if part:
                    yield Command(page, number, part.strip())
            continued = ""
            continue
        for code in re.findall(r"`([^`]+)`", line):
            words = code.split()
            while words and re.match(r"[A-Z_]+=\S", words[0]):
                words.pop(0)
            starts = words and (words[0] in PROGRAMS or words[0].startswith(SCRIPTS) or words[0] == "...")
            if starts and (len(words) > 1 or words[0].endswith((".sh", ".py"))) and "*" not in words[0]:
                yield Command(page, number, code.strip())


def named_commands(page: str, **parts: str) -> dict[str, str]:
    """Commands of the page by name; each name has a regular expression that matches exactly one command."""
    return {name: command_of(page, part) for name, part in parts.items()}


def command_of(page: str, part: str) -> str:
    """The only command of the page that matches the regular expression `part`."""
    found = list(dict.fromkeys(command.text for command in commands_of(page) if re.search(part, command.text)))
    assert len(found) == 1, f"{page}: {len(found)} commands match {part!r}, expected 1"
    return found[0]


def modules_of(page: str) -> dict[str, str]:
    """The Python files that a page asks to save, by name."""
    text = (CHECKOUT / page).read_text()
    return dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL))


def copy_checkout(folder: Path) -> Path:
    """Copy the files of the checkout that a run needs to a new folder, whose name contains a space."""
    copy = folder / "a copy"
    for name in ("launch", "slurm", "configs", "ddp_cifar"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "site.sh"))
    shutil.copy(CHECKOUT / "tests" / "paced_network.py", copy)  # importable, as runs start in this folder
    return copy
