"""The versions that a run records."""

import subprocess
from pathlib import Path

import pytest

import ddp_cifar
from ddp_cifar.run.environment import versions


def git(folder: Path, *arguments: str) -> str:
    user = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    return subprocess.run(
        ("git", "-C", folder, *user, *arguments), check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_project_not_of_a_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init")
    for folder in ("ddp_cifar", ".venv/lib/site-packages/ddp_cifar"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    git(tmp_path, "commit", "--allow-empty", "--message=a repository")

    monkeypatch.setattr(ddp_cifar, "__file__", str(tmp_path / ".venv/lib/site-packages/ddp_cifar/__init__.py"))
    assert versions()["project"].startswith(f"{ddp_cifar.__version__}, files ")
    assert "commit" not in versions(), "in an environment"
    monkeypatch.setattr(ddp_cifar, "__file__", str(tmp_path / "ddp_cifar" / "__init__.py"))
    assert "commit" not in versions(), "installed with pip install --target"
    git(tmp_path, "add", "ddp_cifar")
    git(tmp_path, "commit", "--message=the project")
    assert versions()["commit"] == git(tmp_path, "rev-parse", "HEAD")[:12]
