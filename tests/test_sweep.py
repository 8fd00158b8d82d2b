"""Sweeps: a file of lists expands to runs. Finished runs are skipped, and the others resume."""

import json
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documented import command_of
from launched import ARGUMENTS, CHECKOUT, environment_of, wait_until

from ddp_cifar.errors import UserError
from ddp_cifar.sweep import expand

GRID = "config: configs/demo.yaml\ngrid:\n  optim.lr: [5e-4, 1e-3]\n  seed: [0, 1]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text)
    return path


def test_each_combination_is_a_run_with_the_values_as_typed(tmp_path: Path) -> None:
    runs = expand(write(tmp_path, GRID), ["train.epochs=2"])
    assert [run.name for run in runs] == ["lr=5e-4,seed=0", "lr=5e-4,seed=1", "lr=1e-3,seed=0", "lr=1e-3,seed=1"]
    assert runs[1].arguments == [
        *("configs/demo.yaml", "tracking.hparams=[optim.lr,seed]", "tracking.group=some"),
        *("train.epochs=2", "optim.lr=5e-4", "seed=1"),
        "run_dir=runs/sweeps/some/lr=5e-4,seed=1",
    ]
    assert {run.state for run in runs} == {"new"}
    moved = expand(write(tmp_path, GRID), ["run_dir=over there"])
    assert moved[0].arguments[-1] == "run_dir=over there/lr=5e-4,seed=0"


def test_each_variant_is_a_grid_of_runs(tmp_path: Path) -> None:
    text = "variants:\n  all: {}\n  adamw: {optim: {name: adamw, momentum: 0}}\n  no mean: {train.ema_decay: null}\n"
    runs = expand(write(tmp_path, text), ["data.name=shapes"])
    assert [run.name for run in runs] == ["all", "adamw", "no-mean"]
    hparams = "tracking.hparams=[optim.name,optim.momentum,train.ema_decay]"
    own = ("optim.name=adamw", "optim.momentum=0", "run_dir=runs/sweeps/some/adamw")
    assert runs[1].arguments == [hparams, "tracking.group=some", "data.name=shapes", *own]
    assert runs[2].arguments[3:] == ["train.ema_decay=null", "run_dir=runs/sweeps/some/no-mean"]
    runs = expand(write(tmp_path, f"{text}grid: {{seed: [0, 1]}}\n"), [])
    names = [f"{variant},seed={seed}" for variant in ("all", "adamw", "no-mean") for seed in (0, 1)]
    assert [run.name for run in runs] == names
    assert runs[3].arguments[2:5] == ["optim.name=adamw", "optim.momentum=0", "seed=1"]


def test_a_sweep_of_the_project_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = expand(Path("lr"), [])
    assert len(runs) == 4
    assert runs[0].arguments[0] == "demo"
    assert runs[0].arguments[-1] == "run_dir=runs/sweeps/lr/lr=5e-4,seed=0"
    assert [run.name for run in expand(Path("speed"), [])][:2] == ["all", "random-mirrors"]
    with pytest.raises(
        UserError, match=r"cannot read the config file lrs: .*; known names: lr, speed; did you mean lr"
    ):
        expand(Path("lrs"), [])


def test_sections_may_be_nested_and_run_names_stay_distinct(tmp_path: Path) -> None:
    text = "grid:\n  model: {name: [cnn, resnet9], init: [random]}\n  optim: {name: [sgd]}\n"
    assert [run.name for run in expand(write(tmp_path, text), [])] == [
        "model.name=cnn,init=random,optim.name=sgd",
        "model.name=resnet9,init=random,optim.name=sgd",
    ]
    own = "grid: {model.args.tag: ['010', 'a #b', null, 1e-3]}\n"
    arguments = [run.arguments[2] for run in expand(write(tmp_path, own), [])]
    assert arguments == [f"model.args.tag={value}" for value in ("'010'", "'a #b'", "null", "0.001")]
    paths = "grid: {data.root: [/a/b, c d]}\n"
    assert [run.name for run in expand(write(tmp_path, paths), [])] == ["root=-a-b", "root=c-d"]


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("optim: {lr: [1]}\n", [], "is not a sweep file (optim): expected `grid`"),
        ("", [], "is not a sweep file (no keys)"),
        ("config: configs/demo.yaml\n", [], "is not a sweep file (no grid)"),
        ("grid: {seed: 1}\n", [], "grid: seed in {path} is not a list of values: expected seed: [value, ...]"),
        ("grid: {seed: []}\n", [], "grid: seed in {path} is not a list of values"),
        ("grid: {seed: [[1, 2]]}\n", [], "grid: seed in {path} is not a list of values"),
        ("grid: {seed: [1, 1]}\n", [], "lists seed=1 twice"),
        ("grid: {optim.lr: [1], optim: {lr: [2]}}\n", [], "grid: duplicate key optim.lr in {path}"),
        ("grid: {on: [1]}\n", [], "on is not a key of the config"),
        ("grid: {run_dir: [a, b]}\n", [], "grid: run_dir in {path}: each run gets its own run_dir"),
        ("grid: {optim.lrr: [1]}\n", [], "optim.lrr is not a key of the config; did you mean optim.lr?"),
        ("grid: {optim.lr: [1e-3, -1]}\n", [], "optim.lr=-1.0 is out of range"),
        ("config: [a, b]\ngrid: {seed: [1]}\n", [], "config in {path} is not a file name"),
        ("config: gone.yaml\ngrid: {seed: [1]}\n", [], "cannot read the config file gone.yaml"),
        ("grid: {seed: [1]}\n", ["seed=2"], "seed=2: {path} already sets seed: change it there"),
        ("variants: {a: {seed: 1}}\n", ["seed=2"], "seed=2: {path} already sets seed: change it there"),
        ("variants: {a: {seed: 1}}\ngrid: {seed: [2]}\n", [], "seed is in the grid and in the variants of {path}"),
        (
            "variants: [a]\n",
            [],
            "variants in {path} contains no names: expected lines of the form name: {{key: value, ...}}",
        ),
        ("variants: {a: 1}\n", [], "variants: a in {path} contains no keys: expected lines of the form key: value"),
        ("variants: {a: {seed: [1]}}\n", [], "variants: a: seed in {path} is not a value: expected seed: value"),
        ("variants: {a: {optim.lr: -1}}\n", [], "optim.lr=-1.0 is out of range"),
        ("variants: {a/b: {}, a-b: {}}\n", [], "lists a-b twice"),
        ("variants: {}\n", [], "is not a sweep file (no grid)"),
        ("grid: {seed: [1]}\n", ["configs/demo.yaml"], "cannot read the argument 'configs/demo.yaml'"),
    ],
)
def test_a_user_error_in_a_sweep_is_one_line(text: str, overrides: list[str], expected: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as refused:
        expand(path, overrides)
    assert expected.format(path=path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_is_finished_if_the_current_arguments_leave_nothing_to_do(tmp_path: Path) -> None:
    path, there = write(tmp_path, "grid: {seed: [0, 1, 2]}\n"), f"run_dir={tmp_path}"
    for seed, status in ((0, "finished"), (1, "stopped: SIGTERM (rank 0)")):
        (tmp_path / f"seed={seed}").mkdir()
        (tmp_path / f"seed={seed}" / "status").write_text(f"{status}\n")
        (tmp_path / f"seed={seed}" / "config.yaml").write_text("train: {epochs: 3, max_steps: null}\n")
    assert [run.state for run in expand(path, [there, "train.epochs=3"])] == ["finished", "stopped", "new"]
    assert [run.state for run in expand(path, [there, "train.epochs=4"])] == ["stopped", "stopped", "new"]
    assert [run.state for run in expand(path, [there, "train.epochs=2"])] == ["finished", "stopped", "new"]
    another = [there, "train.epochs=3", "model.name=resnet9"]
    assert expand(path, another)[0].state == "stopped", "train rejects it with an error that names the key"
    elsewhere = [there, "train.epochs=3", "device=cpu", "checkpoint.keep=9"]
    assert expand(path, elsewhere)[0].state == "finished"


@pytest.mark.slow
def test_a_sweep_of_four_runs_is_interrupted_and_resumed(tmp_path: Path, shell: Callable[..., Any]) -> None:
    """Ctrl-C in the second run: that run resumes from its checkpoint, and the first is not started again."""
    folder = tmp_path / "a sweep"
    arguments = [*ARGUMENTS, "train.epochs=3", f"run_dir={folder}"]
    line = [*command_of("launch/README.md", "^launch/sweep.sh configs").split(), *arguments]
    sweep = CHECKOUT / "configs" / "sweeps" / "lr.yaml"
    ranks = {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    interrupted = subprocess.Popen(
        line,
        cwd=CHECKOUT,
        env=environment_of(**ranks),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    second = folder / "lr=5e-4,seed=1"
    under_way = wait_until(lambda: any(second.glob("checkpoints/step_*.pt")) or interrupted.poll() is not None, 120)
    assert under_way
    interrupted.send_signal(signal.SIGINT)
    said, _ = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 0, said
    assert said.splitlines()[-1] == "== sweep: stopped in run 2 of 4; run the same command to resume", said
    assert [run.state for run in expand(sweep, arguments)] == ["finished", "stopped", "new", "new"]

    done = shell("bash", "-c", shlex.join(line), timeout=200, **ranks)
    assert done.status == 0, done.out + done.err
    assert f"== sweep 1 of 4: {folder}/lr=5e-4,seed=0 is finished" in done.out
    assert f"== sweep 2 of 4: {second} (stopped)" in done.out
    names = [run.name for run in expand(sweep, arguments)]
    starts = [(folder / name / "starts.jsonl").read_text().splitlines() for name in names]
    assert [len(rows) for rows in starts] == [1, 2, 1, 1]
    assert json.loads(starts[1][1])["step"] > 0
    assert {(folder / name / "status").read_text() for name in names} == {"finished\n"}
    table = done.out[done.out.rindex("run_dir  ") :].splitlines()
    assert table[0].split() == ["run_dir", "status", "seed", "lr", "epoch", "step", "accuracy", "best", "images/s"]
    assert [row.split()[-6] for row in table[1:5]] == ["0.0005", "0.0005", "0.001", "0.001"]
    assert table[5].startswith("lr=0.0005, over 2 seeds (0, 1): accuracy ")


@pytest.mark.slow
def test_a_failed_run_does_not_end_the_sweep(tmp_path: Path, shell: Callable[..., Any]) -> None:
    sweep = write(tmp_path, "grid: {train.global_batch_size: [32, 1]}\n")
    arguments = [*ARGUMENTS, "train.epochs=1", "train.micro_batch_size=8", f"run_dir={tmp_path / 'runs'}"]
    arguments.remove("train.global_batch_size=32")
    line = shlex.join(["launch/sweep.sh", str(sweep), *arguments])
    done = shell("bash", "-c", line, NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    assert done.status == 2
    assert "train.global_batch_size=1 is less than the number of ranks (2)" in done.err
    assert done.out.count("finished: epoch 1") == 1
    assert "global_batch_size=32  finished" in done.out.splitlines()[-1]
    last = f"== sweep: failed: {tmp_path / 'runs'}/global_batch_size=1 (exit status 2)"
    assert done.err.splitlines()[-1] == last
