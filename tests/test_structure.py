"""The layers of the package: which module may import which. docs/architecture.md explains them."""

import ast
import textwrap
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import ddp_cifar

PACKAGE = Path(ddp_cifar.__file__).parent

# From top to bottom. A module may import from lower lines and from its own package, so that nothing imports a command. The
# first line is the Python API, ddp_cifar/__init__.py.
LEVELS = """
    ddp_cifar
    __main__
    train prepare evaluate predict export compare sweep diagnose sync checkpoints preflight benchmark scaling scripts
    checks
    dry_run inference
    training
    tracking
    run data models
    command
    config distributed
    registry log
    errors seeding shipped text_files dynamo
"""
LEVEL_OF = {part: number for number, line in enumerate(LEVELS.split("\n")) for part in line.split()}
MAX_LINES = 300
LONGER = {"config.schema"}  # one long list of settings

# Ranks communicate through the methods of `World`. These modules also import torch.distributed:
COLLECTIVES = {
    "training.tree_sum",  # a communication hook of DDP, which overlaps its messages with the backward pass
    "checks.rank_context",  # needs the error class of a store that cannot be reached
    "checks.network",  # measures plain messages between two ranks
}


def module_name(path: Path) -> str:
    """ddp_cifar/run/run_dir.py -> run.run_dir; ddp_cifar/data/__init__.py -> data; ddp_cifar/__init__.py -> ddp_cifar"""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "ddp_cifar"


SOURCES = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(source: str) -> list[str]:
    """Every absolute name that a source imports, including imports in functions and for type checking."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}: use an absolute import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def imported_modules(source: str) -> set[str]:
    """The modules of this package that a source imports: `from ddp_cifar.data import build_dataset` -> data"""
    names = [name.removeprefix("ddp_cifar.") for name in imported_names(source) if name.startswith("ddp_cifar.")]
    names = [name for name in names if name != "LAUNCHER"]  # a value that must be read before any other import
    return {name if name in SOURCES else name.rpartition(".")[0] or "ddp_cifar" for name in names}


IMPORTS = {module: imported_modules(source) for module, source in SOURCES.items()}


def part_of(module: str) -> str:
    """run.run_dir -> run"""
    return module.split(".")[0]


def test_every_module_has_a_level() -> None:
    unknown = {part_of(module) for module in SOURCES} - LEVEL_OF.keys()
    assert not unknown, f"{sorted(unknown)} are missing in LEVELS: add them to the line that fits their imports"
    removed = LEVEL_OF.keys() - {part_of(module) for module in SOURCES}
    assert not removed, f"LEVELS has {sorted(removed)}, which do not exist"


def test_the_architecture_page_has_the_same_levels() -> None:
    page = PACKAGE.parent / "docs" / "architecture.md"
    assert f"```text{textwrap.dedent(LEVELS)}```" in page.read_text(), f"the levels in {page} differ from LEVELS"


def test_modules_import_only_from_lower_levels() -> None:
    wrong = [
        f"{module} imports {imported}: `{part_of(imported)}` is not below `{part_of(module)}` in LEVELS"
        for module, modules in IMPORTS.items()
        for imported in modules
        if part_of(imported) != part_of(module) and LEVEL_OF[part_of(imported)] <= LEVEL_OF[part_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_import_cycles() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other: {' <- '.join(error.args[1])}") from None


def test_no_module_is_too_long() -> None:
    long = {module: source.count("\n") for module, source in SOURCES.items() if module not in LONGER}
    wrong = [
        f"{module} has {lines} lines, more than {MAX_LINES}" for module, lines in long.items() if lines > MAX_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_ranks_communicate_only_through_world() -> None:
    users = {module for module, source in SOURCES.items() if "torch.distributed" in " ".join(imported_names(source))}
    wrong = {module for module in users if part_of(module) != "distributed"} - COLLECTIVES
    assert not wrong, f"{sorted(wrong)} import torch.distributed: use a method of World, or add one"
    assert users >= COLLECTIVES, (
        f"{sorted(COLLECTIVES - users)} no longer import torch.distributed: remove them from COLLECTIVES"
    )
