"""The Python API, and the answers of commands that do not import torch."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ddp_cifar
from ddp_cifar.__main__ import COMMANDS

WITHOUT_TORCH = """
import contextlib, io, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "matplotlib"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Blocker())

import ddp_cifar
from importlib import import_module
from ddp_cifar.errors import UserError

def answer(command, *arguments):
    main, output = import_module(f"ddp_cifar.{command}").main, io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            main(arguments)
    except UserError as error:
        return str(error)
    except SystemExit:
        pass
    return output.getvalue()

print(json.dumps([answer(*case) for case in json.loads(sys.argv[1])]))
"""

HELP = [[name, "--help"] for name in COMMANDS]
USER_ERRORS = [
    (["train", "optim.lrr=1"], "optim.lrr is not a key of the config; did you mean optim.lr?"),
    (["train", "optim.lr=fast"], "optim.lr=fast has the wrong type"),
    (["train", "model.name=resnet19"], "did you mean resnet9?"),
    (["train", "--dry-run", "data.name=cifar"], "did you mean cifar10?"),
    (["prepare", "data.name=imagefoldr"], "did you mean imagefolder?"),
    (["evaluate", "runs/none", "model.name=cnnn"], "did you mean cnn?"),
    (["export", "runs/none", "--format", "pt2", "optim.name=adan"], "did you mean adam?"),
    (["predict", "runs/none", "image.png", "--batch-size", "0"], "--batch-size 0 is out of range"),
    (["benchmark", "tracking.name=wandbb"], "expected mlflow, wandb, or a user-defined package.module:function"),
    (["preflight", "optim.lrr=1"], "did you mean optim.lr?"),
]
PRINTED = [["train", "--dry-run", "--help"], ["train", "--print-config"]]


def test_help_and_errors_in_the_config_do_not_import_torch() -> None:
    cases = [*HELP, *PRINTED, *(case for case, _ in USER_ERRORS)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(cases)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for case, answer in zip(cases, answers, strict=True):
        assert answer, case
        assert "usage:" in answer or case not in HELP, answer
    for (case, expected), answer in zip(USER_ERRORS, answers[-len(USER_ERRORS) :], strict=True):
        assert expected in answer, case
        assert "\n" not in answer


def test_every_name_of_the_api_exists() -> None:
    for name in ddp_cifar.__all__:
        assert getattr(ddp_cifar, name).__name__ == name
        assert name in dir(ddp_cifar)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ddp_cifar.nothing  # noqa: B018


def test_the_example_in_the_api_docstring_runs_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ddp_cifar.__doc__
    example = re.search(r"\n\n((?:    .*\n|\n)+)\n", ddp_cifar.__doc__)
    assert example
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    (tmp_path / "configs").mkdir()
    recipe = "data: {name: shapes, shapes: {train_images: 300, test_images: 60}}\ntrain: {global_batch_size: 100}\ndevice: cpu\n"
    (tmp_path / "configs" / "demo.yaml").write_text(recipe)  # smaller than the recipe of that name
    exec(re.sub(r"^    ", "", example[1], flags=re.MULTILINE), names)
    assert names["trainer"].progress.epoch == 1
    assert names["logits"].shape == (8, 10)
    assert names["network"].classes == names["dataset"].classes

    state = ddp_cifar.load_checkpoint(names["folder"] / "latest.pt")
    weights = names["network"].network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in state["model"].items())
    with pytest.raises(ddp_cifar.UserError, match="there is no checkpoint"):
        ddp_cifar.load_checkpoint(Path("elsewhere.pt"))
    assert os.getppid() == ddp_cifar.LAUNCHER


PAGE = Path(__file__).parent.parent / "docs" / "python.md"
SMALL = (
    "data: {name: shapes, shapes: {train_images: 300, test_images: 60}}\ntrain: {global_batch_size: 100}\ndevice: cpu\n"
)
"""A recipe smaller than the demo."""


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_python_page_run_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text(SMALL)
    names: dict[str, Any] = {}
    exec("\n".join(blocks_of(PAGE)), names)
    assert names["trainer"].progress.epoch == 2
    assert names["logits"].shape == (8, 10)
    assert [row["step"] for row in names["recorder"].rows if "test/accuracy" in row] == [6]

    table = re.findall(r"^\| (`[^|]*`) \|", PAGE.read_text(), re.MULTILINE)
    listed = re.findall(r"`(\w+)[^`]*`", " ".join(table))
    assert sorted(listed) == ddp_cifar.__all__


@pytest.mark.slow
def test_the_program_of_the_python_page_runs_on_two_ranks(tmp_path: Path, shell: Callable[..., Any]) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text(SMALL)
    (tmp_path / "program.py").write_text(blocks_of(PAGE)[0])
    done = shell("torchrun", "--nproc_per_node=2", "program.py", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.status == 0, done.err
    assert done.out.count("test/accuracy") == 1
    assert [path.name for path in (tmp_path / "runs" / "notebook").glob("step_*")] == ["step_00000003.pt"]


@pytest.mark.slow
def test_the_resuming_page_compares_states_by_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    for arguments in (
        ("run_dir=runs/whole", "train.max_steps=5"),
        ("run_dir=runs/cut", "train.max_steps=4"),
        ("run_dir=runs/cut", "train.max_steps=5"),
    ):
        done = train("small.yaml", *arguments)
        assert done.status == 0, done.err
    (program,) = blocks_of(PAGE.with_name("resuming.md"))
    exec(program, {})
    (whole, cut) = (line.split() for line in capfd.readouterr().out.splitlines())
    assert (whole[0], cut[0]) == ("runs/whole", "runs/cut")
    assert whole[1] == cut[1]
