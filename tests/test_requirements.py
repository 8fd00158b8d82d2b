"""The required versions are the same everywhere. tests/compat.sh tries them."""

import re

from launched import CHECKOUT

PYPROJECT = (CHECKOUT / "pyproject.toml").read_text()
INSTALL = (CHECKOUT / "docs" / "install.md").read_text()


def bounds() -> dict[str, str]:
    """The lower bounds in pyproject.toml, by package."""
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"', PYPROJECT, flags=re.MULTILINE)
    return {"Python": python, **dict(re.findall(r'"([\w-]+)>=([\d.]+)"', PYPROJECT))}


def test_the_pages_state_the_lower_bounds_of_pyproject() -> None:
    stated = dict(re.findall(r"^\| (\w+) \| ([\d.]+) or newer", INSTALL, flags=re.MULTILINE))
    assert {"Python", "torch", "torchvision", "omegaconf"} <= stated.keys()
    assert stated == {name: version for name, version in bounds().items() if name in stated}
    status = f"Linux, Python {bounds()['Python']} or later, torch {bounds()['torch']} or later"
    assert status in (CHECKOUT / "README.md").read_text()


def test_the_tools_check_the_code_for_the_oldest_python() -> None:
    assert f'target-version = "py{bounds()["Python"].replace(".", "")}"' in PYPROJECT


def test_the_tested_versions_include_the_oldest_and_the_pinned_torch() -> None:
    tested = INSTALL.split("## Tested versions")[1].split("\n## ")[0]
    (pinned,) = re.findall(r"^torch==(.+)", (CHECKOUT / "constraints.txt").read_text(), flags=re.MULTILINE)
    torches = re.findall(r"^\| ([\d.]+) \| 3\.", tested, flags=re.MULTILINE)
    assert {f"{bounds()['torch']}.0", pinned} <= set(torches)
    pythons = set(re.findall(r"^\| [\d.]+ \| (3\.\d+)", tested, flags=re.MULTILINE))
    assert bounds()["Python"] in pythons
