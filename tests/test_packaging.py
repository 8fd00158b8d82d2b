"""The wheel and the source distribution: what they hold, and that an installed wheel works in an empty folder."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launched import CHECKOUT, rows_of
from test_mistakes import TINY

import ddp_cifar
from ddp_cifar.__main__ import COMMANDS
from ddp_cifar.shipped import RECIPES, shipped

Shell = Callable[..., Any]

SHORT = (*TINY, "train.max_steps=2", "model.name=mine:Network")


def source_files() -> list[str]:
    """The files of the project: those in git, or in an unpacked source distribution those in its list."""
    if (CHECKOUT / ".git").exists():
        git = ("git", "-c", "safe.directory=*", "ls-files")
        names = subprocess.run(git, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout.splitlines()
    else:
        names = (CHECKOUT / "ddp_cifar.egg-info" / "SOURCES.txt").read_text().splitlines()
        names = [name for name in names if not name.startswith("ddp_cifar.egg-info/")]
    return [name for name in names if (CHECKOUT / name).exists()]


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source distribution of the checkout, and the wheel that pip builds from it."""
    folder, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in source_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, folder / name)
    (folder / "slurm" / "site.sh").write_text("# the settings of a site stay in the checkout\n")
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (sdist,) = out.iterdir()
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(out), str(sdist))
    (wheel,) = out.glob("*.whl")
    return Built(sdist, wheel)


def pip(command: str, *arguments: str) -> None:
    line = (sys.executable, "-m", "pip", command, "--no-index", "--no-deps", *arguments)
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Installed:
    """The wheel, installed in a folder of its own, and an empty folder to run it in."""

    shell: Shell
    packages: Path
    folder: Path

    def run(self, *command: str, **environment: str) -> Any:
        path = f"{self.packages / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
        settings = {"PATH": path, "PYTHONPATH": str(self.packages), "OMP_NUM_THREADS": "1", **environment}
        return self.shell(*command, cwd=self.folder, **settings)


@pytest.fixture(scope="module")
def installed(built: Built, shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    packages = tmp_path_factory.mktemp("packages")
    pip("install", "--target", str(packages), str(built.wheel))
    return Installed(shell, packages, tmp_path_factory.mktemp("an empty folder"))


def test_the_source_distribution_holds_every_file_of_the_checkout(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {
            member.name.partition("/")[2]: member.mode & 0o111 for member in archive.getmembers() if member.isfile()
        }
    expected = source_files()
    assert set(expected) - files.keys() == set(), "MANIFEST.in lacks them"
    wrong = [name for name in expected if bool(files[name]) != bool((CHECKOUT / name).stat().st_mode & 0o111)]
    assert not wrong, "the executable bit differs"
    extra = {name for name in files.keys() - set(expected) if not name.startswith("ddp_cifar.egg-info/")}
    assert extra == {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_package_the_recipes_and_the_scripts(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        files = {info.filename: info.external_attr >> 16 & 0o111 for info in archive.infolist()}
        metadata = archive.read(f"ddp_cifar-{ddp_cifar.__version__}.dist-info/METADATA").decode()
    expected = {name: name for name in source_files() if name.startswith("ddp_cifar/")}
    for folder in ("configs", "launch", "slurm"):
        expected |= {f"ddp_cifar/_data/{name}": name for name in source_files() if name.startswith(f"{folder}/")}
    held = {name for name in files if ".dist-info/" not in name}
    assert held == expected.keys(), "see [tool.setuptools] in pyproject.toml"
    assert "ddp_cifar/py.typed" in held
    wrong = [name for name in held if bool(files[name]) != bool((CHECKOUT / expected[name]).stat().st_mode & 0o111)]
    assert not wrong, "the executable bit differs"
    assert f"\nVersion: {ddp_cifar.__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata


def test_the_package_of_a_checkout_finds_the_recipes_at_its_top() -> None:
    assert shipped(RECIPES) == CHECKOUT / "configs"


def test_ddp_cifar_has_every_command_with_one_line_of_help(installed: Installed) -> None:
    package = Path(ddp_cifar.__file__).parent
    modules = {
        path.stem for path in package.glob("*.py") if "run_command(main)" in ast.unparse(ast.parse(path.read_text()))
    }
    assert COMMANDS.keys() == modules - {"__main__"}

    (installed.packages.parent / "no torch").mkdir(exist_ok=True)
    (installed.packages.parent / "no torch" / "torch.py").write_text("raise ImportError('torch is imported')\n")
    without_torch = f"{installed.packages.parent / 'no torch'}:{installed.packages}"
    told = installed.run("ddp-cifar", "--help", PYTHONPATH=without_torch)
    assert told.status == 0, told.err
    for name in COMMANDS:
        assert len(re.findall(rf"^  {name} +\w.*", told.out, flags=re.MULTILINE)) == 1, told.out
    assert installed.run("ddp-cifar", PYTHONPATH=without_torch).out == told.out
    assert installed.run("ddp-cifar", "--version").out == f"ddp-cifar {ddp_cifar.__version__}\n"

    sweep = installed.run("ddp-cifar", "sweep", "lr", PYTHONPATH=without_torch)
    assert (sweep.status, sweep.out.splitlines()[0]) == (0, "4 runs in runs/sweeps/lr, 0 finished"), sweep.err

    unknown = installed.run("python", "-m", "ddp_cifar", "trian")
    assert unknown.status == 2
    assert re.fullmatch(r".* error: trian is not a command of ddp-cifar; did you mean train\?\n", unknown.err)


def test_the_scripts_are_copied_only_to_a_new_folder(installed: Installed) -> None:
    copied = installed.run("ddp-cifar", "scripts", "a copy")
    assert copied.status == 0, copied.err
    for name in source_files():
        if name.startswith(("launch/", "slurm/")):
            copy = installed.folder / "a copy" / name
            assert copy.read_bytes() == (CHECKOUT / name).read_bytes()
            assert bool(copy.stat().st_mode & 0o111) == bool((CHECKOUT / name).stat().st_mode & 0o111), name
    (installed.folder / "a copy" / "launch" / "local.sh").write_text("edited")
    again = installed.run("ddp-cifar", "scripts", "a copy")
    assert again.status == 2
    assert re.fullmatch(r".* error: a copy exists and is not an empty folder: choose a new folder\n", again.err)
    assert (installed.folder / "a copy" / "launch" / "local.sh").read_text() == "edited"


@pytest.mark.slow
def test_an_installed_wheel_trains_and_evaluates_in_an_empty_folder(installed: Installed) -> None:
    shutil.copy(CHECKOUT / "tests" / "paced_network.py", installed.folder / "mine.py")
    described = installed.run("ddp-cifar", "train", "demo", "--dry-run", *SHORT)
    assert described.status == 0, described.err
    assert "run_dir" in described.out

    trained = installed.run("python", "-m", "ddp_cifar.train", "demo", *SHORT)
    assert trained.status == 0, trained.err
    assert (installed.folder / "runs" / "demo" / "status").read_text() == "finished\n"

    assert installed.run("ddp-cifar", "scripts", "here").status == 0
    two = installed.run("here/launch/local.sh", "demo", *SHORT, "run_dir=runs/two", NPROC_PER_NODE="2")
    assert two.status == 0, two.err
    assert [row["step"] for row in rows_of(installed.folder / "runs" / "two")][-1] == 2

    evaluated = installed.run("ddp-cifar", "evaluate", "runs/two", "--trust")
    assert evaluated.status == 0, evaluated.err
    assert "test" in evaluated.out
