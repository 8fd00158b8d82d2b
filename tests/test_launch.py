"""torchrun and the launch scripts with real processes. Tests that kill processes are in test_faults.py."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import copy_checkout, named_commands
from launched import CHECKOUT, environment_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_mistakes import TINY

Shell = Callable[..., Any]

README = named_commands(
    "launch/README.md",
    one="^launch/local.sh configs",
    two_ranks="run_dir=runs/two ranks",
    two_nodes="NNODES=2 NPROC_PER_NODE=2",
    evaluate="evaluate",
    scaling="^launch/scaling.sh runs",
    preflight="^launch/preflight.sh configs",
)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_torchrun_writes_a_complete_run_dir(shell: Shell, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = shell("torchrun", "--nproc_per_node=2", "-m", "ddp_cifar.train", *TINY, f"run_dir={run_dir}")
    assert outcome.status == 0, outcome.err
    assert "32 images per step = 2 ranks x 1 micro-batch of 16 images; 2 steps per epoch of 64 images" in outcome.out
    line = next(line for line in outcome.out.splitlines() if "Epoch 1: " in line)
    assert all(field in line for field in ("loss ", "train accuracy ", "test accuracy ", "images/s"))
    assert "[rank 1]" not in outcome.out

    assert {path.name for path in run_dir.iterdir()} == {
        *("config.yaml", "status", "metrics.jsonl", "tensorboard", "checkpoints", "logs", "lock"),
        *("heartbeats", "starts.jsonl"),
    }
    assert (run_dir / "status").read_text() == "finished\n"
    assert {path.name for path in (run_dir / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    state = torch.load(run_dir / "checkpoints" / "latest.pt", weights_only=True)
    assert state["progress"]["step"] == 2
    assert not any(name.startswith("module.") for name in state["model"])
    assert len(list((run_dir / "tensorboard").iterdir())) == 1, "only rank 0 writes events"
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for tag in (
        *("train/loss", "train/batch_accuracy", "train/lr", "train/images_per_s", "train/grad_norm", "train/accuracy"),
        *(
            "time/step_s",
            "time/data_s",
            "time/forward_s",
            "time/backward_s",
            "time/optimizer_s",
            "test/loss",
            "test/accuracy",
        ),
    ):
        assert events.Scalars(tag), tag
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 2]


def test_two_agents_on_loopback_train_like_one_process(shell: Shell, tmp_path: Path) -> None:
    """2 nodes x 2 ranks and 1 x 1 have the same images per micro-batch, so their losses are equal up to rounding."""
    arguments = (*TINY, "train.micro_batch_size=8", "precision=fp32")
    one = shell("launch/local.sh", *arguments, f"run_dir={tmp_path}/one run")
    assert one.status == 0, one.err
    two = shell("launch/local.sh", *arguments, f"run_dir={tmp_path}/two runs", NNODES="2", NPROC_PER_NODE="2")
    assert two.status == 0, two.err
    assert "[node 0] [rank 0]" in two.out or "[node 1] [rank 0]" in two.out
    first, second = rows(tmp_path / "one run"), rows(tmp_path / "two runs")
    assert [row["step"] for row in first] == [row["step"] for row in second]
    assert first[0]["train/loss"] == pytest.approx(second[0]["train/loss"], abs=1e-6)


def test_the_limit_of_open_files_is_raised_for_the_connections_of_many_ranks(tmp_path: Path) -> None:
    (tmp_path / "limits.py").write_text(
        "import resource; print('limits:', *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    command = f"ulimit -Sn 512 && ulimit -Hn 2000 && PYTHONPATH={tmp_path} MODULE=limits launch/node.sh"
    done = subprocess.run(["bash", "-c", command], cwd=CHECKOUT, env=environment_of(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (limits,) = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("limits:"))
    assert limits == ["2000", "2000"]


def test_the_default_command_without_data_or_network_says_what_to_do(shell: Shell, tmp_path: Path) -> None:
    """Four ranks, with no arguments except the folders to write to."""
    outcome = shell(
        *("torchrun", "--nproc_per_node=4", "-m", "ddp_cifar.train"),
        *(f"data.root={tmp_path}/data", f"run_dir={tmp_path}/run"),
        https_proxy="http://127.0.0.1:1",
    )
    assert outcome.status == 1
    lines = [line for line in outcome.err.splitlines() if "error: CIFAR-10 is not in" in line]
    assert 1 <= len(lines) <= 4, "each rank says it, unless it is terminated before"
    assert all("data.name=shapes" in line for line in lines)


@pytest.mark.parametrize(
    ("script", "setting", "expected"),
    [
        ("launch/local.sh", {"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0 is invalid"),
        ("launch/local.sh", {"NPROC_PER_NODE": "auto"}, "NPROC_PER_NODE=auto is invalid"),
        ("launch/local.sh", {"NNODES": "0"}, "NNODES=0 is invalid"),
        ("launch/local.sh", {"NNODES": "2", "NPROC_PER_NODE": "x"}, "NPROC_PER_NODE=x is invalid"),
        ("launch/node.sh", {"NNODES": "2"}, "NNODES=2 requires HEAD=HOST:PORT"),
    ],
)
def test_an_invalid_setting_of_a_script_is_one_line(
    shell: Shell, script: str, setting: dict[str, str], expected: str
) -> None:
    outcome = shell(script, **setting)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1
    assert expected in outcome.err


LINGERING_TORCHRUN = """#!{python}
import pathlib, sys, time

(log_dir,) = (argument.split("=")[1] for argument in sys.argv if argument.startswith("--log-dir="))
pathlib.Path(log_dir, "id", "attempt_0", "0").mkdir(parents=True)
print("ranks exited", flush=True)
time.sleep(2)
"""
"""A torchrun that stays alive after its ranks have exited. With the real one, that moment is too short for a test."""


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_just_after_the_ranks_have_finished_has_no_effect(tmp_path: Path, signum: signal.Signals) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(LINGERING_TORCHRUN.format(python=sys.executable))
    torchrun.chmod(0o755)
    process = subprocess.Popen(
        [CHECKOUT / "launch" / "node.sh"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout
    assert process.stdout.readline() == b"ranks exited\n"
    process.send_signal(signum)
    assert process.wait(20) == 0


FORWARDED = """#!{python}
import pathlib, shutil, signal, subprocess, sys

(log_dir,) = (argument.split("=")[1] for argument in sys.argv if argument.startswith("--log-dir="))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
script = "trap 'echo saved; exit' TERM; sleep 0.5; echo ready; for _ in $(seq 100); do sleep 0.1; done"
rank = subprocess.Popen(["sh", "-c", script])
shutil.rmtree(log_dir)
sys.exit(rank.wait())
"""
"""A torchrun with one rank, whose log folder is removed, as a cleaner of /tmp does."""


def test_a_signal_is_forwarded_without_the_temporary_folder(tmp_path: Path) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(FORWARDED.format(python=sys.executable))
    torchrun.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [CHECKOUT / "launch" / "node.sh"], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert process.wait(20) == 0
    assert process.stdout.read() == b"saved\n"


@pytest.mark.slow
def test_the_commands_of_launch_readme_run(shell: Shell, tmp_path: Path) -> None:
    """Commands for several machines are tested in tests/slurm."""
    copy = copy_checkout(tmp_path)
    short = " ".join((*TINY, "train.micro_batch_size=8"))
    for name, run_dir in (("one", "demo"), ("two_ranks", "two ranks"), ("two_nodes", "two-nodes")):
        done = shell("bash", "-c", f"{README[name]} {short}", cwd=copy)
        assert done.status == 0, done.err
        assert (copy / "runs" / run_dir / "status").read_text() == "finished\n"
    done = shell("bash", "-c", f"{README['preflight']} {short}", cwd=copy)
    assert done.status == 0, done.out + done.err
    assert "the preflight passed" in done.out
    small = "--rounds 1 --steps 1"
    done = shell("bash", "-c", f"{README['scaling']} {small}", cwd=copy, MAX_RANKS="2", IMAGES="8")
    assert done.status == 0, done.err
    assert (copy / "runs" / "scaling" / "scaling.png").exists()
    done = shell("bash", "-c", README["evaluate"], cwd=copy)
    assert done.status == 0, done.err
    assert "runs/demo/checkpoints/step_00000002.pt (epoch 1, step 2), test: 20 images" in done.out
