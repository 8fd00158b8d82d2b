"""Fault tolerance with real processes: kills, hangs, requests to stop, full disks. docs/faults.md has the table."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import (
    ARGUMENTS,
    CHECKOUT,
    LONG,
    Result,
    Run,
    environment_of,
    parent_of,
    processes,
    rows_of,
    send,
    start,
    wait_until,
)
from soak import VARIANTS, run_until_finished
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_launch import rows as all_rows
from test_mistakes import TINY

from ddp_cifar.run.checkpoint_file import load_checkpoint
from ddp_cifar.run.diagnosis import diagnose


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The result of an uninterrupted run on 2 ranks."""
    return Run(tmp_path_factory.mktemp("uninterrupted") / "run").finish()


# -- requests to stop


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_and_the_resumed_run_equals_an_uninterrupted_one(
    run: Run, uninterrupted: Result, signum: signal.Signals
) -> None:
    run.start()
    send([run.ranks()[1]], signum)
    assert run.end() == 0
    assert run.status == f"stopped: {signum.name} (rank 1)"
    assert f"stopped by {signum.name} (rank 1): epoch" in run.terminal
    assert [row["step"] for row in rows_of(run.path)][-1] <= run.step
    (run.path / "PROFILE").write_text("steps=3 rank=1")
    assert run.finish() == uninterrupted
    (profile,) = (run.path / "profile").iterdir()
    assert re.fullmatch(r"rank_1_step_\d+\.pt\.trace\.json\.gz", profile.name), "it changes no result"


def test_a_signal_while_ranks_import_torch_stops_the_ranks_that_replace_them(run: Run) -> None:
    run.launcher = start(run.path, 2, *LONG, MAX_RESTARTS="3")
    assert wait_until(lambda: run.size == 2, 30), run.terminal
    send([run.launcher.pid], signal.SIGTERM)
    assert run.end(60) == 0, run.terminal
    assert run.status == "stopped: SIGTERM (rank 0)"


SAVING_RANK = """
import os, pathlib, signal, time

signal.signal(signal.SIGTERM, lambda *_: None)
folder = pathlib.Path(os.environ["LOG_DIR"])
(folder / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
until = time.monotonic() + 60
while not (folder / "saved").exists() and time.monotonic() < until:
    time.sleep(0.05)
pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name("lost_peer").touch()
raise SystemExit(1)
"""
"""A rank that has lost another one, and saves until a file exists."""


@pytest.mark.parametrize("signal_first", [False, True])
def test_a_rank_that_dies_before_a_signal_is_the_fault_of_its_node(tmp_path: Path, signal_first: bool) -> None:
    """Slurm ends the scripts of all nodes once one has ended, which may not be that of the dead rank."""
    (tmp_path / "saving_rank.py").write_text(SAVING_RANK)
    settings = {"NPROC_PER_NODE": "2", "MODULE": "saving_rank", "LOG_DIR": str(tmp_path), "NODE_NAME": "node7"}
    environment = environment_of(**settings)
    environment["PYTHONPATH"] += f":{tmp_path}"
    launcher = subprocess.Popen([CHECKOUT / "launch" / "node.sh"], env=environment)
    pids = [tmp_path / f"pid_{rank}" for rank in range(2)]
    assert wait_until(lambda: all(path.exists() and path.read_text() for path in pids), 30)
    dead = int(pids[1].read_text())
    acts = [lambda: send([dead], signal.SIGKILL), lambda: send([launcher.pid], signal.SIGTERM)]
    for act in reversed(acts) if signal_first else acts:
        act()
        time.sleep(1)
    (tmp_path / "saved").touch()
    assert launcher.wait(30) != 0
    assert (tmp_path / "exited-node7").exists()
    assert (tmp_path / "died-node7").exists() != signal_first


def assert_diagnosed(run_dir: Path, state: str, cause: str, *ranks: int) -> None:
    found = diagnose(str(run_dir))
    assert (found.state, [process.rank for process in found.ranks]) == (state, [*ranks]), found
    assert cause in found.cause


def test_ctrl_c_stops_and_saves_and_a_second_ctrl_c_exits_immediately(run: Run) -> None:
    run.start(*LONG)
    send([run.launcher.pid], signal.SIGINT)
    assert run.end() == 0
    assert run.status == "stopped: SIGINT (rank 0)"
    step = run.step
    assert f"step {step}" in run.terminal
    assert "Traceback" not in run.terminal
    assert_diagnosed(run.path, "stopped", "SIGINT (rank 0)")

    run.start(*LONG)
    stopped = time.monotonic()
    frozen = run.ranks()[1]
    send([frozen], signal.SIGSTOP)  # blocks rank 0 in a collective, where no Python signal handler can run
    time.sleep(1)
    send([run.ranks()[0]], signal.SIGINT)
    time.sleep(0.3)
    send([run.ranks()[0]], signal.SIGINT)
    exited = lambda: run.ranks()[0] not in processes(run.path)["ranks"]  # noqa: E731
    assert wait_until(lambda: len(processes(run.path)["ranks"]) < 2 or exited(), 5)
    assert time.monotonic() - stopped < 15
    send([frozen], signal.SIGCONT)
    assert run.end() != 0
    assert "SIGINT after SIGINT: exiting immediately, without saving" in run.terminal


def test_repeated_sigterm_does_not_interrupt_the_save(run: Run) -> None:
    run.start(*LONG)
    for _ in range(5):
        send(run.ranks(), signal.SIGTERM)
        time.sleep(0.05)
    assert run.end() == 0
    assert run.status == "stopped: SIGTERM (rank 0)"
    assert run.step > 0


@pytest.mark.slow
def test_the_time_limit_stops_and_saves(run: Run) -> None:
    run.launcher = start(run.path, 2, *LONG, f"train.max_hours={8 / 3600}")
    begun = time.monotonic()
    assert run.end() == 0
    assert 8 < time.monotonic() - begun < 40
    assert run.status in ("stopped: train.max_hours (rank 0)", "stopped: train.max_hours (rank 1)")
    assert_diagnosed(run.path, "stopped", run.status.removeprefix("stopped: "))
    assert "stopped by train.max_hours" in run.terminal
    assert run.step > 0


@pytest.mark.slow
def test_the_files_profile_save_and_stop(run: Run) -> None:
    run.start(*LONG, "checkpoint.every_steps=null", "checkpoint.every_epochs=3")
    step = run.step
    (run.path / "SAVE").touch()
    assert wait_until(lambda: step < run.step < 70, 20)
    step = run.step
    (run.path / "PROFILE").touch()
    assert wait_until(lambda: run.terminal.count("slowest kernels of the profile") == 1, 20)
    (run.path / "PROFILE").write_text("steps=100")
    assert wait_until(lambda: run.terminal.count("recording a profile") == 2, 20)
    (run.path / "PROFILE").touch()
    assert wait_until(lambda: "on all ranks are being recorded; request it again afterwards" in run.terminal, 20)
    assert step % 13, "the step is not the end of an epoch"
    assert not (run.path / "SAVE").exists()
    (run.path / "STOP").touch()
    assert run.end() == 0
    assert run.status == "stopped: the file STOP (rank 0)"
    assert run.step > step
    assert not (run.path / "STOP").exists()
    assert "stopped by the file STOP (rank 0)" in run.terminal
    assert not (run.path / "PROFILE").exists()
    names = sorted(path.name for path in (run.path / "profile").iterdir())
    first, second = re.findall(r"recording a profile of steps (\d+) to", run.terminal)
    assert names == [f"rank_{rank}_step_{at}.pt.trace.json.gz" for rank in (0, 1) for at in sorted((first, second))]


def test_sigterm_stops_both_nodes(run: Run) -> None:
    run.start(*LONG, ranks=1, NNODES="2")
    send([run.launcher.pid], signal.SIGTERM)
    assert run.end() == 0, run.terminal
    assert run.status.startswith("stopped: SIGTERM")
    assert "stopped by SIGTERM" in run.terminal
    assert (run.path / "logs" / "rank_1.log").exists()


# -- killed


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_ends_the_run_and_the_resumed_run_equals_an_uninterrupted_one(
    run: Run, uninterrupted: Result, victim: int
) -> None:
    """No step is lost, and no row: rank 0, which writes them, may be the one that is killed."""
    run.start()
    time.sleep(0.3)
    send([run.ranks()[victim]], signal.SIGKILL)
    assert run.end() != 0
    assert run.status == "running", "the status after a crash"
    assert "error: " in run.terminal.splitlines()[-1]
    assert_diagnosed(run.path, "crashed", "was killed, or the machine was lost: it ended without an error", victim)
    saved = run.step
    assert run.finish() == uninterrupted
    assert "resuming from" in run.terminal
    assert [(row["step"], row["steps_lost"]) for row in run.starts()] == [(0, 0), (saved, 0)]
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for tag in ("train/loss", "train/epoch_loss"):
        expected = [row["step"] for row in all_rows(run.path) if tag in row]
        assert [event.step for event in events.Scalars(tag)] == expected, tag


@pytest.mark.slow
def test_a_crash_loop_ends_although_restarts_are_left(run: Run) -> None:
    run.launch(MAX_RESTARTS="9", PACE_S="2")
    for number in (1, 2, 3):
        assert wait_until(lambda number=number: len(run.starts()) == number, 60), run.terminal  # type: ignore[misc]
        send([run.ranks()[1]], signal.SIGKILL)
    assert run.end() == 1, run.terminal
    message = "not starting again: 3 starts crashed at step 0, without a new step; see"
    assert message in run.terminal.splitlines()[-1]
    assert run.status.startswith(f"failed: crash loop: {message}")
    assert_diagnosed(run.path, "failed", message)
    assert len(run.starts()) == 3


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(run: Run, uninterrupted: Result) -> None:
    run.start(MAX_RESTARTS="2")
    send([run.ranks()[1]], signal.SIGKILL)
    assert run.end(200) == 0, run.terminal
    assert run.status == "finished"
    assert Result.of(run.path) == uninterrupted
    rows = all_rows(run.path)
    assert rows[-1]["run/restarts"] == 1
    assert 0 < rows[-1]["run/goodput"] < 1


@pytest.mark.slow
def test_plain_torchrun_restarts_a_killed_rank_too(run: Run) -> None:
    command = ["torchrun", "--nproc_per_node=2", "--max-restarts=2", "-m", "ddp_cifar.train", *ARGUMENTS]
    run.path.mkdir()
    with open(run.path / "terminal.txt", "wb") as terminal:
        run.launcher = subprocess.Popen(
            [*command, f"run_dir={run.path}"], env=environment_of(), stdout=terminal, stderr=terminal
        )
    assert wait_until(lambda: (run.path / "checkpoints" / "latest.pt").exists(), 60)
    send([run.ranks()[1]], signal.SIGKILL)
    assert run.end(200) == 0, run.terminal
    assert run.status == "finished"


def test_ranks_exit_if_their_torchrun_is_killed(run: Run, uninterrupted: Result) -> None:
    run.start()
    send(processes(run.path)["agents"], signal.SIGKILL)
    assert run.end() != 0
    assert run.status == "running", "the status after a crash"
    logs = [(run.path / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
    assert any("the torchrun process that started this rank exited" in text for text in logs), "on one rank at least"
    assert run.finish() == uninterrupted


@pytest.mark.slow
def test_a_stopped_rank_is_not_left_behind_if_its_torchrun_is_killed(run: Run) -> None:
    run.start()
    send([run.ranks()[1]], signal.SIGSTOP)
    send(processes(run.path)["agents"], signal.SIGKILL)
    assert run.end() != 0


@pytest.mark.slow
def test_a_killed_node_is_started_again_and_the_run_continues(run: Run, tmp_path: Path) -> None:
    """As a scheduler would do it: all processes of the node that does not host the rendezvous are killed and restarted."""
    arguments = ("train.epochs=6",)
    port = random.Random(os.getpid()).randrange(30000, 40000)
    nodes = {
        "NNODES": "2",
        "HEAD": f"127.0.0.1:{port}",
        "RUN_ID": "two",
        "LOCAL_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    agents: list[subprocess.Popen[bytes]] = []

    def start_node() -> None:
        environment = environment_of(**nodes, MAX_RESTARTS="3", NPROC_PER_NODE="1", OMP_NUM_THREADS="1")
        with open(tmp_path / f"node{len(agents)}.txt", "wb") as terminal:
            command = [str(CHECKOUT / "launch" / "node.sh"), *ARGUMENTS, *arguments, f"run_dir={run.path}"]
            agents.append(
                subprocess.Popen(
                    command, cwd=CHECKOUT, env=environment, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL
                )
            )

    start_node()
    assert wait_until(lambda: _is_listening(port), 60), "the first node hosts the rendezvous"
    start_node()
    assert wait_until(lambda: (run.path / "checkpoints" / "latest.pt").exists(), 90)
    victims = [pid for pids in processes(run.path).values() for pid in pids if _is_child_of(pid, agents[1].pid)]
    assert len(victims) >= 2, "the node's torchrun and rank"
    send([agents[1].pid, *victims], signal.SIGKILL)
    time.sleep(1)
    start_node()
    assert agents[0].wait(240) == 0, (tmp_path / "node0.txt").read_text()
    assert agents[2].wait(60) == 0
    assert run.status == "finished"
    steps = [row["step"] for row in rows_of(run.path) if "train/epoch" not in row]
    assert steps == sorted(set(steps)), "each step once, in order"


def _is_listening(port: int) -> bool:
    sockets = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    return re.search(rf":{port:04X} [0-9A-F:]+ 0A ", sockets) is not None


def _is_child_of(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = parent_of(pid)
    return False


def test_a_rank_that_hangs_is_named_and_the_others_exit(run: Run) -> None:
    """SIGSTOP stops the process, as swapping or a debugger can."""
    run.start(*LONG, "train.silent_timeout_s=5")
    frozen, limit = run.ranks()[1], time.monotonic() + 5 + 3
    send([frozen], signal.SIGSTOP)
    assert wait_until(lambda: "no heartbeat from" in run.terminal, 20)
    assert time.monotonic() < limit
    assert f"no heartbeat from rank 1 ({os.uname().nodename}, pid {frozen}, at step" in run.terminal
    assert "training/step.py" in (run.path / "logs" / "rank_0.stacks").read_text()
    assert run.end() != 0
    assert "error: no heartbeat from rank 1" in run.terminal.splitlines()[-1], "the reason is the last line"
    assert_diagnosed(run.path, "crashed", "no heartbeat from rank 1", 1)
    run.finish()
    assert run.starts()[-1]["steps_lost"] == 0


@pytest.mark.slow
def test_random_kills_leave_state_and_rows_bitwise_identical(run: Run, tmp_path: Path) -> None:
    """5 kills (tests/soak.py does more). Afterwards, each TensorBoard curve has each step once."""
    run_until_finished(tmp_path / "uninterrupted", VARIANTS[0], random.Random(0), kills=0)
    uninterrupted = Result.of(tmp_path / "uninterrupted")
    done = run_until_finished(run.path, VARIANTS[0], random.Random(1), kills=5)
    assert len(done) == 5
    assert all(lost <= 1 for _, lost in done), done
    result = Result.of(run.path)
    assert result.rows == uninterrupted.rows, done
    assert result.state == uninterrupted.state, done
    ledgers = {(row["ledger/images"], row["ledger/sum"]) for row in result.rows if "train/epoch" in row}
    assert len(ledgers) == 1
    assert {images for images, _ in ledgers} == {400}
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for tag in events.Tags()["scalars"]:
        expected = [row["step"] for row in all_rows(run.path) if tag in row]
        assert [event.step for event in events.Scalars(tag)] == expected, tag


@pytest.mark.slow
def test_the_recovery_from_a_killed_rank_is_measured() -> None:
    command = [sys.executable, CHECKOUT / "tests" / "recovery.py", "--runs", "1", "--only", "rank killed, 2 ranks"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment_of())
    pattern = r"rank killed, 2 ranks: ([\d.]+) .* s, ([\d.-]+) .* s beyond the import of torch, (\d+) .* steps lost"
    seconds, beyond, lost = re.search(pattern, done.stdout).groups()
    assert float(beyond) < float(seconds) < 30
    assert lost == "0"


@pytest.mark.slow
def test_from_4_to_2_to_1_to_4_ranks_with_kills(run: Run, uninterrupted: Result) -> None:
    """The number of ranks changes the rounding of sums in the rows. It does not change ledgers and steps."""
    for ranks in (4, 2, 1):
        run.start(ranks=ranks)
        time.sleep(0.3)
        send([run.ranks()[-1]], signal.SIGKILL)
        run.end()
    result = run.finish(ranks=4)
    for field in ("step", "train/epoch", "train/lr", "ledger/images", "ledger/sum"):
        assert [row.get(field) for row in result.rows] == [row.get(field) for row in uninterrupted.rows], field
    losses = [
        [row["train/epoch_loss"] for row in rows if "train/epoch" in row] for rows in (result.rows, uninterrupted.rows)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.2)


# -- the disk


def on_a_small_disk(tmp_path: Path, megabytes: int, script: str, *arguments: str) -> Any:
    """Run a shell script with a small file system at `tmp_path / "disk"`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    flags = "-m" if os.geteuid() == 0 else "-rm"
    if subprocess.run(["unshare", flags, "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    return subprocess.run(
        [
            "unshare",
            flags,
            "sh",
            "-c",
            f"mount -t tmpfs -o size={megabytes}m tmpfs {disk} && {script}",
            "sh",
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=120,
    )


def train_on_a_small_disk(tmp_path: Path, megabytes: int, options: str, *arguments: str) -> Any:
    """Run `python -m ddp_cifar.train` with run_dir on a small file system, and copy its files out afterwards."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    kept.mkdir()
    command = f'{sys.executable} -m ddp_cifar.train "$@" run_dir={disk}/run'
    script = f"mkdir {disk}/run && {options} {{ {command}; status=$?; cp -a {disk}/run/. {kept}; exit $status; }}"
    return on_a_small_disk(tmp_path, megabytes, script, *TINY, "train.epochs=6", *arguments), kept


def test_a_full_disk_skips_checkpoints_and_the_exit_status_is_3(tmp_path: Path) -> None:
    """The disk of 100 MB has space for one checkpoint of 70 MB."""
    done, kept = train_on_a_small_disk(tmp_path, 100, "")
    assert done.returncode == 3, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "was not saved (No space left on device)" in line]
    assert len(warnings) == 5, "one for each checkpoint that did not fit"
    assert "error: 5 checkpoints could not be saved" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (kept / "status").read_text() == "finished\n"
    assert_diagnosed(kept, "finished", "5 checkpoints could not be saved")
    (checkpoint,) = kept.glob("checkpoints/step_*")
    assert load_checkpoint(checkpoint)["progress"]["step"] == 2
    assert [row["step"] for row in rows_of(kept) if "train/epoch" in row] == [2, 4, 6, 8, 10, 12]


RECORD = """
import os, pathlib
from ddp_cifar.command import _reserve_space, record_error

_reserve_space()
try:
    pathlib.Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name("other").write_bytes(bytes(2 << 20))
except OSError as error:
    assert record_error(str(error), 3, is_final=True)
"""


def test_an_error_is_recorded_on_a_full_disk(tmp_path: Path) -> None:
    error_file = f"TORCHELASTIC_ERROR_FILE={tmp_path}/disk/error.json"
    done = on_a_small_disk(tmp_path, 1, f"{error_file} {sys.executable} -c '{RECORD}'")
    assert done.returncode == 0, done.stderr


def test_a_read_only_disk_is_a_one_line_error(tmp_path: Path) -> None:
    done, _ = train_on_a_small_disk(tmp_path, 100, f"mount -o remount,ro {tmp_path}/disk;")
    assert done.returncode == 2
    assert "error: cannot write to run_dir=" in done.stderr
    assert "Read-only file system" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("[rank")]) == 1


@pytest.mark.slow
def test_a_missing_checkpoint_folder_skips_checkpoints_and_the_exit_status_is_not_0(run: Run) -> None:
    run.start("checkpoint.every_steps=null")
    shutil.move(run.path / "checkpoints", run.path / "moved")
    assert run.end() != 0
    assert run.status == "finished"
    assert "was not saved (No such file or directory)" in run.terminal
    assert "checkpoints could not be saved" in run.terminal.splitlines()[-1]
    assert_diagnosed(run.path, "finished", "checkpoints could not be saved", 0)
    assert "error: 0 checkpoints could not be saved" not in run.terminal, "rank 1 saves none, and reports none"


@pytest.mark.slow
def test_a_partial_checkpoint_left_by_a_kill_is_removed_and_links_are_not_needed(
    run: Run, uninterrupted: Result
) -> None:
    run.start()
    send(run.ranks(), signal.SIGTERM)
    run.end()
    (run.path / "checkpoints" / "latest.pt").unlink()
    stale = run.path / "checkpoints" / "step_00000999.pt.tmp"
    stale.write_bytes(b"half of it")
    assert run.finish() == uninterrupted
    assert not stale.exists()


# -- the list of checkpoints


@pytest.mark.slow
def test_the_list_marks_good_and_damaged_checkpoints(run: Run, shell: Callable[..., Any]) -> None:
    run.start()
    send(run.ranks(), signal.SIGTERM)
    run.end()
    newest, older = sorted(run.path.glob("checkpoints/step_*.pt"), reverse=True)[:2]
    newest.write_bytes(newest.read_bytes()[:1000])
    outcome = shell(sys.executable, "-m", "ddp_cifar.checkpoints", str(run.path))
    assert outcome.status == 0
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.startswith("step_")}
    assert "NO: " in lines[newest.name]
    assert "damaged" in lines[newest.name]
    assert "yes" in lines[older.name]
    assert outcome.out.startswith(f"{run.path}: stopped")
    outcome = shell(sys.executable, "-m", "ddp_cifar.checkpoints", str(run.path / "logs"))
    assert outcome.status == 2
    assert "has no checkpoints" in outcome.err
