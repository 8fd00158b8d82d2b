"""The recipes of the images name files, packages and versions that exist and agree. Building them needs podman and Apptainer."""

import re

import tomllib
from documented import commands_of
from launched import CHECKOUT

PAGE = "docs/containers.md"
CONTAINERFILE, APPTAINER = ((CHECKOUT / name).read_text() for name in ("Containerfile", "apptainer.def"))
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


def copied(recipe: str) -> set[str]:
    """The files and folders of the checkout that a recipe copies."""
    if recipe == CONTAINERFILE:
        lines = re.findall(r"^COPY (.+) \S+$", recipe, flags=re.MULTILINE)
    else:
        lines = re.findall(r"^    (\S+) /opt/ddp_cifar/$", recipe, flags=re.MULTILINE)
    return {name for line in lines for name in line.split()}


def the_same(pattern: str) -> str:
    """What the pattern finds in both recipes."""
    found = {match for recipe in (CONTAINERFILE, APPTAINER) for match in re.findall(pattern, recipe)}
    assert len(found) == 1, f"{pattern!r} finds {found}"
    return str(found.pop())


def test_both_recipes_copy_what_the_installation_and_the_scripts_need() -> None:
    assert copied(CONTAINERFILE) == copied(APPTAINER)
    missing = {name for name in copied(CONTAINERFILE) if not (CHECKOUT / name).exists()}
    assert not missing
    needed = {"pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
    assert copied(CONTAINERFILE) >= {*needed, "ddp_cifar", "configs", "launch", "slurm"}


def test_both_recipes_have_the_same_base_and_the_same_packages() -> None:
    base = the_same(r"BASE=(\S+)")
    python, required = (re.findall(r"\d+", part) for part in (base.partition(":")[2], PROJECT["requires-python"]))
    assert [int(number) for number in python[:2]] >= [int(number) for number in required]
    assert f"`{base.rpartition('/')[2]}`" in (CHECKOUT / PAGE).read_text()
    assert "procps" in the_same(r"apt-get install (.+?)(?: \\)?\n").split()  # for pgrep, in launch/
    assert "--constraint constraints.txt" in the_same(r"(PIP_BREAK.+)\n")


def test_the_page_builds_with_these_recipes() -> None:
    builds = " ".join(command.text for command in commands_of(PAGE) if " build " in command.text)
    named = {word for word in builds.split() if word in ("Containerfile", "apptainer.def")}
    assert named == {"Containerfile", "apptainer.def"}


def test_the_image_leaves_out_what_git_ignores() -> None:
    ignored = [line.rstrip("/") for line in (CHECKOUT / ".gitignore").read_text().splitlines()]
    expected = {name.removeprefix("/") if "/" in name else f"**/{name}" for name in ignored}
    lines = (CHECKOUT / ".containerignore").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} == {".git", *expected}
