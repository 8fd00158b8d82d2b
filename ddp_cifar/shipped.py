"""Find the recipes and scripts of the project, in a checkout or in an installed package."""

from pathlib import Path

RECIPES, SWEEPS = "configs", "configs/sweeps"
SCRIPTS = ("launch", "slurm")


def shipped(folder: str) -> Path:
    """Return a folder of the project, such as `configs`: at the top of a checkout, but inside a package from a wheel."""
    package = Path(__file__).parent
    installed = package / "_data" / folder
    return installed if installed.is_dir() else package.parent / folder


def recipes(folder: str = RECIPES) -> dict[str, Path]:
    """The recipes in `folder`, `RECIPES` or `SWEEPS`, by name."""
    return {path.stem: path for path in sorted(shipped(folder).glob("*.yaml"))}
