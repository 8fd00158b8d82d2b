"""Planted faults in real runs. Each is named rightly by the run and by `diagnose`; docs/diagnosing.md has the table."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launched import CHECKOUT, Run, environment_of, processes, wait_until

from ddp_cifar.diagnose import describe, redact
from ddp_cifar.run.diagnosis import Diagnosis, diagnose

RANKS = 3


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "run")
    yield run
    if run.launcher and run.launcher.poll() is None:
        run.launcher.kill()


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that plants a fault."""
    path = tmp_path / "fault"
    monkeypatch.setenv("FAULT_FILE", str(path))
    return path


def ended(run: Run, ranks: list[int] | None, *parts: str, state: str = "crashed") -> Diagnosis:
    """Wait for the end of a run that fails, and check which ranks and which parts of the cause are named."""
    assert run.end() != 0
    found = diagnose(str(run.path))
    assert found.state == state, found
    assert ranks is None or [process.rank for process in found.ranks] == ranks, found
    text = describe(found)
    for part in parts:
        assert re.search(part, text), text
    assert len(text.splitlines()) <= 20
    assert found.cause[:60] in run.terminal, "the launcher prints it too"
    return found


def start(run: Run, *arguments: str, **environment: str) -> None:
    run.start("train.hang_timeout_s=10", "train.epochs=40", *arguments, ranks=RANKS, **environment)


@pytest.mark.slow
def test_a_rank_that_sleeps_in_its_data_loading(run: Run, fault: Path) -> None:
    start(run, "augment.name=paced_network:augment")
    fault.write_text("sleep 1")
    waits = r"ranks 0 and 2 wait in the all-reduce of the buffers in step \d+; rank 1 never entered it"
    ended(run, [1], waits, r"rank 1 is in paced_network.py:\d+ \(augment\)", "no step; the newest checkpoint")


@pytest.mark.slow
def test_a_rank_that_skips_a_collective(run: Run, fault: Path) -> None:
    """gloo aborts a rank that receives the data of another collective, so that there may be no majority among the others."""
    fault.write_text("skip 2")
    run.launch("train.hang_timeout_s=10", "train.global_batch_size=24", ranks=RANKS)
    found = ended(run, None, "rank 2 entered the all-reduce of 16 elements", "ranks? .* the all-reduce of 7 elements")
    assert [process.rank for process in found.ranks] in ([], [2])
    assert "skipped a collective" in found.cause


@pytest.mark.slow
def test_a_rank_that_enters_another_collective(run: Run, fault: Path) -> None:
    fault.write_text("other 1")
    run.launch("train.hang_timeout_s=10", "train.global_batch_size=24", ranks=RANKS)
    ended(run, None, "rank 1 entered the broadcast", "ranks? [02 and]+ the all-reduce", "called another one")


@pytest.mark.slow
def test_a_rank_that_leaves_early(run: Run, fault: Path) -> None:
    start(run)
    fault.write_text("leave 0")
    ended(run, [0], r"rank 0 \(.*, pid \d+\) was killed, or the machine was lost: it ended without an error")


@pytest.mark.slow
def test_data_that_are_missing_on_one_node(run: Run) -> None:
    run.launch(f"data.root={run.path}", "data.name=paced_network:missing", "data.val_images=0", ranks=1, NNODES="2")
    """Both nodes are this host, so that the error does not name one."""
    ended(run, [], "labels.txt does not exist", state="never started")


@pytest.mark.slow
def test_a_rank_that_the_kernel_kills_for_lack_of_memory(run: Run, fault: Path) -> None:
    """In a control group with a limit, if this machine lets us create one."""
    group = Path("/sys/fs/cgroup/memory") / f"ddp_cifar-{os.getpid()}"
    with contextlib.suppress(OSError):
        group.mkdir()
    limit = group / "memory.limit_in_bytes"
    if not limit.exists():
        return
    try:
        start(run)
        limit.write_text(str(10**9))
        pids = [pid for group in processes(run.path).values() for pid in group]
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
        fault.write_text("allocate 1")
        ended(run, [1], "lack of memory", "request more memory")
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not (group / "cgroup.procs").read_text(), 10)
        group.rmdir()


@pytest.mark.slow
def test_a_port_that_is_taken_and_a_mistake_in_the_config(run: Run) -> None:
    """The launcher names them, as the run has not opened its folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = {"HEAD": f"127.0.0.1:{server.getsockname()[1]}", "NNODES": "2", "LOCAL_ADDR": "127.0.0.1"}
        run.launch(script="node.sh", ranks=1, **head)
        assert run.end(60) == 2
    assert f"another program uses port {head['HEAD'].rpartition(':')[2]}" in run.terminal.splitlines()[-1]
    run.launch("optim.lrr=1", ranks=2)
    assert run.end() == 2
    assert "optim.lrr is not a key of the config" in run.terminal.splitlines()[-1]
    (run.path / "terminal.txt").rename(run.path.with_suffix(".txt"))
    found = diagnose(str(run.path))
    assert found.state == "never started"
    assert "has no files of a run" in found.cause


@pytest.mark.slow
def test_nothing_is_named_in_healthy_runs(run: Run, fault: Path) -> None:
    """Uneven ranks, accumulation, a slow disk and a long evaluation; a live run; a stop, and a resume on fewer ranks.

    A start that fails before it trains is told from the one before.
    """
    fault.write_text("slow all")
    same = ("train.global_batch_size=56", "augment.name=paced_network:augment")
    run.start(*same, "eval.batch_size=1", ranks=RANKS)
    alive = diagnose(str(run.path))
    assert (alive.state, alive.cause, *alive.ranks, *alive.details) == ("running", "it trains")
    (run.path / "STOP").touch()
    assert run.end() == 0
    stopped = diagnose(str(run.path))
    assert (stopped.state, stopped.cause, *stopped.ranks) == ("stopped", "the file STOP (rank 0)")
    assert (stopped.steps_lost, *stopped.details) == (0,)
    run.launch(*same, "seed=5", ranks=2)
    assert run.end() == 2
    failed = diagnose(str(run.path))
    assert (failed.state, failed.details[0].rpartition(" is ")[2]) == ("failed", "stopped: the file STOP (rank 0)")
    assert "has other settings: seed=0, now 5" in failed.cause
    run.finish(*same)
    finished = diagnose(str(run.path))
    assert (finished.state, finished.starts, *finished.ranks, *finished.details) == ("finished", 2)
    assert finished.cause.startswith("val accuracy ")
    check_damage(run.path)


def check_damage(path: Path) -> None:
    """`diagnose` says something of a copy in which any file is damaged, and of one without it."""
    copy = path.with_name("copy")
    for broken in [part for part in path.rglob("*") if part.is_file() and part.suffix not in (".pt", ".txt")]:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy, symlinks=True)
        damaged = copy / broken.relative_to(path)
        damaged.write_bytes(b"\xff{" + damaged.read_bytes()[7:])
        assert describe(diagnose(str(copy)))
        damaged.unlink()
        assert describe(diagnose(str(copy)))


def test_names_of_hosts_and_users_and_paths_can_be_hidden() -> None:
    cause = "rank 1 (node7.site, pid 3) is in /home/anna/mine.py, 10.0.0.7"
    found = Diagnosis("/scratch/anna/runs/a", "crashed", cause, hosts=["node7.site"])
    found = dataclasses.replace(found, checkpoint="/scratch/anna/runs/a/checkpoints/step_00000005.pt")
    text = redact(describe(found), found)
    assert not re.search(r"anna|node7|10\.0|scratch", text)
    assert "rank 1 (host1, pid 3) is in PATH, ADDRESS" in text
    assert "RUN_DIR/checkpoints/step_00000005.pt" in text


def test_json(tmp_path: Path) -> None:
    command = ["python", "-m", "ddp_cifar.diagnose", str(tmp_path / "none"), "--json"]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment_of(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["state"] == "never started"
