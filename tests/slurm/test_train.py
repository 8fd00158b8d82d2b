"""The shipped scripts, unedited, on a real Slurm: two nodes through time limits, preemption, crashes and lost nodes.

The result of each run is compared with an uninterrupted run of as many ranks on one machine.
"""

import fcntl
import json
import re
import shlex
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from documented import command_of, copy_checkout, named_commands
from launched import ARGUMENTS, CHECKOUT, SHORT, Result, Run, processes, send
from slurm_cluster import Cluster

from ddp_cifar.run.checkpoint_file import load_checkpoint

TRAIN = str(CHECKOUT / "slurm" / "train.sh")
TWO_NODES = ("--nodes=2", "--gpus-per-node=1")
REPRODUCIBLE = ("train.reproducible=true",)
README = named_commands(
    "slurm/README.md",
    plain="^sbatch slurm/train.sh$",
    two_nodes="^sbatch --nodes=2 .* slurm/train.sh",
    by_hand="^slurm/train.sh --nodes",
    array="--array=1-3",
    sweep="^slurm/sweep.sh ",
    salloc="salloc",
    chain="^slurm/chain.sh 8",
    preflight="slurm/preflight.sh",
    evaluate="slurm/evaluate.sh",
)
"""The commands of slurm/README.md. Tests run them in a copy of the checkout, with the arguments of a short run appended."""


def submit(cluster: Cluster, checkout: Path, command: str, *arguments: str) -> list[str]:
    """Run a command of the README with more arguments, and return the ids of the jobs that it submitted."""
    line = f"{command} {shlex.join(arguments)}"
    said = cluster.run("bash", "-c", line, cwd=checkout, timeout=90).stdout
    return re.findall(r"^Submitted batch job (\d+)$", said, re.MULTILINE)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """The result of an uninterrupted run on two ranks, by its arguments."""
    results: dict[tuple[str, ...], Result] = {}

    def of(*arguments: str) -> Result:
        if arguments not in results:
            run = Run(tmp_path_factory.mktemp("uninterrupted") / "run")
            results[arguments] = run.finish(*arguments, ranks=2)
        return results[arguments]

    return of


class Job:
    """A job of slurm/train.sh, submitted in `folder`, and its run in run_dir=run."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str, arguments: tuple[str, ...] = SHORT) -> None:
        self.cluster = cluster
        self.run_dir = folder / "run"
        # as the uninterrupted run, whose result is compared bitwise
        line = (*ARGUMENTS, "train.threads=1", *arguments, f"run_dir={self.run_dir}")
        self.id = cluster.sbatch(*options, TRAIN, *line, cwd=folder)

    @property
    def log(self) -> str:
        return self.cluster.log(self.id)

    @property
    def status(self) -> str:
        return (self.run_dir / "status").read_text().strip()

    def is_under_way(self) -> bool:
        """True if the run has saved a checkpoint."""
        return any(self.run_dir.glob("checkpoints/step_*.pt"))

    def wait_under_way(self) -> None:
        self.cluster.wait_until(self.is_under_way, 90, self.id)

    def wait_requeued(self, timeout: float = 90) -> None:
        self.cluster.wait_until(lambda: self.cluster.restarts(self.id) > 0, timeout, self.id)

    def wait_for(self, state: str) -> None:
        self.cluster.wait_for(self.id, state, timeout=200)

    def finish(self) -> Result:
        """Wait until the run has finished, check what must hold at every end, and return its result."""
        self.wait_for("COMPLETED")
        assert self.status == "finished"
        assert self.log.rstrip().endswith(f"job {self.id}: the run finished"), self.log
        assert not list(self.run_dir.glob("logs/start-*"))
        return Result.of(self.run_dir)

    def starts(self) -> list[int]:
        """The step that each start resumed from."""
        path = self.run_dir / "starts.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def assert_resumed(job: Job, expected: Result) -> None:
    """Assert that the job was requeued once, resumed from a checkpoint, and has the expected result and one log."""
    assert job.finish() == expected
    assert job.cluster.restarts(job.id) == 1
    first, second = job.starts()
    assert first == 0 < second
    assert re.findall(r"start (\d), (\d+) requeues left", job.log) == [("1", "20"), ("2", "19")]


def test_a_job_finishes_with_its_arguments_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    run_dir = 'it\'s a "run" $HOME; *'
    options = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=3")
    job = cluster.sbatch(*options, TRAIN, *ARGUMENTS, *SHORT, f"run_dir={run_dir}", cwd=folder)
    cluster.wait_for(job, "COMPLETED", timeout=120)
    log = cluster.log(job)
    assert f"job {job}: start 1, 20 requeues left\n" in log
    assert f"nodes: 2 (node[1-2]), rendezvous at node1:2000{job}; per node: 2 ranks, 3 cores\n" in log
    stop = r"it\'s\ a\ \"run\"\ \$HOME\;\ \*/STOP"
    assert f"run_dir: {run_dir}\nto follow: tail -f {folder}/slurm-{job}.out\nto stop: touch {stop} (saves" in log
    assert "32 images per step = 4 ranks x 1 micro-batch of 8 images" in log
    assert re.search(r"^[01]: \[rank 0\] .*finished: epoch 3", log, re.MULTILINE)
    assert "warning" not in log
    assert {path.name for path in (folder / run_dir / "logs").iterdir()} == {f"rank_{i}.log" for i in range(4)}
    cluster.wait_idle()


def test_a_job_is_saved_and_requeued_before_the_time_limit(
    cluster: Cluster, tmp_path: Path, uninterrupted: Callable[..., Result]
) -> None:
    job = Job(cluster, tmp_path, *TWO_NODES, "--time=1:00", "--signal=B:USR1@30")
    job.wait_under_way()
    ranks = processes(job.run_dir)["ranks"]
    assert len(ranks) == 2
    send(ranks, signal.SIGSTOP)  # otherwise a fast machine would finish before the time limit
    cluster.wait_until(lambda: job.cluster.show(job.id)["RunTime"] >= "00:00:32", 60, job.id)
    send(ranks, signal.SIGCONT)
    job.wait_requeued()
    cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=10")  # otherwise the second start may reach it too
    assert re.search(rf"^job {job.id}: the run stopped: SIGUSR1 \(rank \d\); requeuing the job$", job.log, re.MULTILINE)
    assert_resumed(job, uninterrupted(*SHORT))


@pytest.mark.parametrize("grace", ["10", "0"])
def test_a_preempted_job_is_requeued(
    cluster: Cluster, tmp_path: Path, uninterrupted: Callable[..., Result], grace: str
) -> None:
    """With a grace time Slurm signals only the ranks, and the script requeues the job. Without, it signals the script too."""
    cluster.run("scontrol", "update", "partitionname=main", f"gracetime={grace}")
    job = Job(cluster, tmp_path, *TWO_NODES)
    job.wait_under_way()
    other = cluster.sbatch("--partition=urgent", "--nodes=3", "--exclusive", "--wrap=srun sleep 1", cwd=tmp_path)
    cluster.wait_for(other, "COMPLETED", timeout=60)
    assert_resumed(job, uninterrupted(*SHORT))


def steps_lost(job: Job) -> int:
    return int(json.loads((job.run_dir / "starts.jsonl").read_text().splitlines()[-1])["steps_lost"])


def test_a_job_that_loses_the_node_of_its_script_is_requeued(
    cluster: Cluster, tmp_path: Path, uninterrupted: Callable[..., Result]
) -> None:
    job = Job(cluster, tmp_path, *TWO_NODES)
    job.wait_under_way()
    cluster.crash("node1")
    assert_resumed(job, uninterrupted(*SHORT))
    assert "(node[2-3])" in job.log
    assert cluster.nodes()["node1"].startswith("down")


def test_a_job_that_loses_another_node_continues_on_the_rest(
    cluster: Cluster, tmp_path: Path, uninterrupted: Callable[..., Result]
) -> None:
    """In the same allocation, without a requeue, from the last completed step.

    The node vanishes without closing a connection: its link is cut first. Only its heartbeat tells.
    """
    job = Job(cluster, tmp_path, "--nodes=3", arguments=(*SHORT, *REPRODUCIBLE, "train.silent_timeout_s=8"))
    job.wait_under_way()
    begun = time.monotonic()
    cluster.on("node2", "ip", "link", "set", "eth0", "down")
    cluster.crash("node2")
    cluster.wait_until(lambda: len(job.starts()) == 2, 60, job.id)
    print(f"started again after {time.monotonic() - begun:.1f} s")
    assert time.monotonic() - begun < 8 + 40
    assert steps_lost(job) == 0
    assert "no heartbeat from rank 1 (node2, pid" in job.log
    assert job.finish() == uninterrupted(*SHORT, *REPRODUCIBLE)
    assert cluster.restarts(job.id) == 0
    assert f"job {job.id}: node2 is not used again: it does not answer" in job.log
    assert "the run crashed; starting again on 2 of its 3 nodes (node1,node3)" in job.log


def test_a_spare_node_replaces_a_lost_one(
    cluster: Cluster, tmp_path: Path, uninterrupted: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is bitwise identical without train.reproducible, as the number of ranks stays the same."""
    monkeypatch.setenv("SPARE_NODES", "1")
    job = Job(cluster, tmp_path, "--nodes=3")
    job.wait_under_way()
    begun = time.monotonic()
    cluster.crash("node2")
    cluster.wait_until(lambda: len(job.starts()) == 2, 60, job.id)
    print(f"started again after {time.monotonic() - begun:.1f} s")
    assert time.monotonic() - begun < 45
    assert job.finish() == uninterrupted(*SHORT)
    assert cluster.restarts(job.id) == 0
    assert steps_lost(job) == 0
    assert "starting again on 2 of its 3 nodes (node1,node3)" in job.log


def test_a_node_on_which_ranks_die_twice_is_not_used_again(
    cluster: Cluster, tmp_path: Path, uninterrupted: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = tmp_path / "fault"
    monkeypatch.setenv("FAULT_FILE", str(fault))
    job = Job(cluster, tmp_path, "--nodes=2", arguments=(*SHORT, *REPRODUCIBLE))
    job.wait_under_way()
    fault.write_text("kill node2")
    assert job.finish() == uninterrupted(*SHORT, *REPRODUCIBLE)
    assert cluster.restarts(job.id) == 0
    assert steps_lost(job) == 0
    assert "the run crashed; starting again on 2 of its 2 nodes (node1,node2)" in job.log
    assert "node2 is not used again: it was the node of two ranks that died" in job.log
    assert "the run crashed; starting again on 1 of its 2 nodes (node1)" in job.log


def test_a_bad_node_is_excluded_if_the_job_is_requeued(
    cluster: Cluster, tmp_path: Path, uninterrupted: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MIN_NODES=2: the job needs two nodes, so that it has to be requeued."""
    expected = uninterrupted(*SHORT)
    monkeypatch.setenv("MIN_NODES", "2")
    fault = tmp_path / "fault"
    monkeypatch.setenv("FAULT_FILE", str(fault))
    job = Job(cluster, tmp_path, *TWO_NODES)
    job.wait_under_way()
    fault.write_text("kill node2")
    assert job.finish() == expected
    assert cluster.restarts(job.id) == 1
    assert len(job.starts()) == 3
    assert "node2 is not used again: it was the node of two ranks that died" in job.log
    assert "the run crashed, and 1 of the job's 2 nodes can be used; requeuing the job" in job.log
    assert f"job {job.id}: excluding node2" in job.log
    assert "(node[1,3])" in job.log
    assert (job.run_dir / "bad_nodes").read_text() == "node2 was the node of two ranks that died\n"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("diverge", "the weights of rank"), ("corrupt", r"in step \d+, rank \d has computed wrong gradients")],
)
def test_the_node_of_a_replica_that_diverges_or_computes_wrong_numbers_is_not_used_again(
    cluster: Cluster,
    tmp_path: Path,
    uninterrupted: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    reason: str,
) -> None:
    """The state of that moment is not saved: the run continues from its last checkpoint that can be trusted."""
    fault = tmp_path / "fault"
    monkeypatch.setenv("FAULT_FILE", str(fault))
    arguments = (*SHORT, *REPRODUCIBLE, "train.fingerprint_every=2", "train.on_corruption=exclude")
    arguments += ("train.verify_every=2",) if kind == "corrupt" else ()
    job = Job(cluster, tmp_path, "--nodes=3", arguments=arguments)
    job.wait_under_way()
    fault.write_text(f"{kind} node3")
    assert job.finish() == uninterrupted(*arguments)
    assert cluster.restarts(job.id) == 0
    assert re.search(f"node3 has a faulty rank: {reason}", (job.run_dir / "bad_nodes").read_text())
    assert "the run crashed; starting again on 2 of its 3 nodes (node1,node2)" in job.log


def test_a_crash_loop_ends_the_job(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If ranks die on all nodes of the job, that is not the nodes' fault, and they are used again."""
    fault = tmp_path / "fault"
    monkeypatch.setenv("FAULT_FILE", str(fault))
    job = Job(cluster, tmp_path, "--nodes=1")
    job.wait_under_way()
    fault.write_text("kill 0")
    job.wait_for("FAILED")
    assert cluster.restarts(job.id) == 0
    assert re.search(
        r"error: not starting again: 3 starts crashed at step \d+, without a new step", job.log.splitlines()[-1]
    )
    assert "ranks have died on all nodes, so the nodes are not the cause: they are used again" in job.log


def test_a_job_is_saved_and_requeued_after_a_signal_to_its_ranks(
    cluster: Cluster, tmp_path: Path, uninterrupted: Callable[..., Result]
) -> None:
    """Without scancel's option `--batch`, which other tests use, the signal does not reach the script."""
    job = Job(cluster, tmp_path, *TWO_NODES)
    job.wait_under_way()
    cluster.cancel(job.id, "--signal=USR1")
    assert_resumed(job, uninterrupted(*SHORT))
    assert "the run stopped: SIGUSR1" in job.log


def test_the_file_stop_ends_the_job_without_a_requeue(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, *TWO_NODES)
    job.wait_under_way()
    (job.run_dir / "STOP").touch()
    job.wait_for("COMPLETED")
    assert job.status == "stopped: the file STOP (rank 0)"
    assert cluster.restarts(job.id) == 0
    last = job.log.splitlines()[-1]
    assert last == f"job {job.id}: the run {job.status}; to resume, submit it again with run_dir={job.run_dir}"


def test_a_canceled_job_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, *TWO_NODES)
    job.wait_under_way()
    cluster.cancel(job.id)
    job.wait_for("CANCELLED")
    cluster.wait_idle()
    assert cluster.restarts(job.id) == 0
    assert job.status.startswith("stopped: SIGTERM"), "KillWait is long enough to save"


def test_a_typo_fails_the_job_immediately(cluster: Cluster, tmp_path: Path) -> None:
    begun = time.monotonic()
    job = Job(cluster, tmp_path, *TWO_NODES, arguments=("optim.lrr=1",))
    job.wait_for("FAILED")
    assert time.monotonic() - begun < 60
    assert cluster.show(job.id)["ExitCode"] == "2:0"
    assert job.log.splitlines()[-1].endswith("error: optim.lrr is not a key of the config; did you mean optim.lr?")
    assert not job.run_dir.exists()


def test_a_user_error_that_the_dry_run_cannot_find_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(32):
                (tmp_path / split / name / f"{i}.png").write_text("no image")
    job = Job(cluster, tmp_path, *TWO_NODES, arguments=("data.name=imagefolder", f"data.root={tmp_path}"))
    job.wait_for("FAILED")
    assert cluster.show(job.id)["ExitCode"] == "2:0"
    assert cluster.restarts(job.id) == 0
    assert re.match(r"\[rank \d\] error: .*0\.png cannot be decoded", job.log.splitlines()[-1])


def test_a_failed_run_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "--nodes=1", "--gpus-per-node=2", arguments=("optim.lr=1e30", "optim.warmup_epochs=0"))
    job.wait_for("FAILED")
    assert cluster.show(job.id)["ExitCode"] == "1:0"
    assert cluster.restarts(job.id) == 0
    assert job.status.startswith("failed: "), job.log
    assert "] error: " in job.log.splitlines()[-1]


def test_a_run_that_cannot_start_is_requeued_once(cluster: Cluster, tmp_path: Path) -> None:
    """After a node is lost, the file server may keep its lock for a while. Here, another process holds the lock."""
    job = Job(cluster, tmp_path, "--nodes=1", arguments=("train.epochs=20",))
    job.wait_under_way()
    cluster.cancel(job.id, "--batch", "--signal=USR1")
    cluster.wait_until(lambda: job.status.startswith("stopped"), 60, job.id)
    with open(job.run_dir / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("pid 1 on node1\n")
        lock.flush()
        job.wait_for("FAILED")
    assert cluster.restarts(job.id) == 2
    assert "the run did not start; requeuing the job" in job.log
    assert "is in use by pid 1 on node1" in job.log.splitlines()[-1]


def test_only_the_stopped_task_of_an_array_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path)
    line = (*ARGUMENTS, "train.epochs=1", "train.global_batch_size=16", "run_dir=run %a")
    (array,) = submit(cluster, copy, README["array"], *line)
    cluster.wait_until(lambda: any((copy / "run 2").glob("checkpoints/step_*.pt")), 120, array)
    cluster.cancel(f"{array}_2", "--batch", "--signal=USR1")
    cluster.wait_for(array, "COMPLETED", timeout=200)
    assert [cluster.restarts(f"{array}_{task}") for task in (1, 2, 3)] == [0, 1, 0]
    for task in (1, 2, 3):
        state = load_checkpoint(copy / f"run {task}" / "checkpoints" / "latest.pt")
        assert state["config"]["seed"] == task
        assert (copy / f"run {task}" / "status").read_text() == "finished\n"
    assert sorted(path.name for path in copy.glob("slurm-*")) == [f"slurm-{array}_{task}.out" for task in (1, 2, 3)]


def test_a_canceled_sweep_continues_with_the_unfinished_runs(cluster: Cluster, tmp_path: Path) -> None:
    """The sweep is canceled in its second run, when the first is finished and two have not started."""
    copy = copy_checkout(tmp_path)
    line = (*ARGUMENTS, *SHORT, "run_dir=a sweep")
    names = [f"lr={lr},seed={seed}" for lr in ("5e-4", "1e-3") for seed in (0, 1)]
    runs = [copy / "a sweep" / name for name in names]
    (array,) = submit(cluster, copy, f"AT_ONCE=1 {README['sweep']}", *line)
    refused = cluster.run("bash", "-c", f"{README['sweep']} {shlex.join(line)}", cwd=copy, timeout=90, check=False)
    assert refused.returncode == 2
    assert f"error: this sweep is already queued (job {array})" in refused.stderr
    cluster.wait_until(lambda: any(runs[1].glob("checkpoints/step_*.pt")), 120, array)
    cluster.cancel(array)
    cluster.wait_for(array, "COMPLETED", "CANCELLED", timeout=90)
    assert (runs[0] / "status").read_text() == "finished\n"
    assert not runs[2].exists()

    said = cluster.run("bash", "-c", f"{README['sweep']} {shlex.join(line)}", cwd=copy, timeout=90).stdout
    assert "submitted 3 of 4 runs" in said
    (array,) = re.findall(r"^Submitted batch job (\d+)$", said, re.MULTILINE)
    cluster.wait_for(array, "COMPLETED", timeout=200)
    assert {(run / "status").read_text() for run in runs} == {"finished\n"}
    starts = [(run / "starts.jsonl").read_text().splitlines() for run in runs]
    assert [len(rows) for rows in starts] == [1, 2, 1, 1]
    assert json.loads(starts[1][1])["step"] > 0
    configs = [load_checkpoint(run / "checkpoints" / "latest.pt")["config"] for run in runs]
    assert [(config["optim"]["lr"], config["seed"]) for config in configs] == [
        (5e-4, 0),
        (5e-4, 1),
        (1e-3, 0),
        (1e-3, 1),
    ]
    said = cluster.run("bash", "-c", f"{README['sweep']} {shlex.join(line)}", cwd=copy, timeout=90).stdout
    assert said == "all 4 runs are finished\n"

    (runs_file,) = (copy / "a sweep").glob("runs-*")
    beyond = cluster.sbatch("--array=5", TRAIN, f"@{runs_file}", cwd=tmp_path)
    cluster.wait_for(beyond, "FAILED")
    assert "expected a file with the arguments of task 5" in cluster.log(beyond)


def test_the_number_of_requeues_is_limited(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_REQUEUES", "1")
    job = Job(cluster, tmp_path, *TWO_NODES, arguments=("train.epochs=40",))
    job.wait_under_way()
    cluster.cancel(job.id, "--batch", "--signal=USR1")
    job.wait_requeued()
    cluster.wait_until(lambda: (job.run_dir / "starts.jsonl").read_text().count("\n") == 2, 90, job.id)
    cluster.cancel(job.id, "--batch", "--signal=USR1")
    job.wait_for("FAILED")
    assert cluster.restarts(job.id) == 1
    assert (
        "and the job was already requeued 1 times (MAX_REQUEUES); to resume, submit it again with run_dir="
        in job.log.splitlines()[-1]
    )
    assert job.status.startswith("stopped: SIGUSR1")


def test_a_run_on_three_nodes_finishes(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "--nodes=3", arguments=("train.epochs=1", "train.global_batch_size=24"))
    job.finish()
    assert "24 images per step = 3 ranks x 1 micro-batch of 8 images" in job.log
    assert {path.name for path in job.run_dir.glob("logs/*")} == {f"rank_{i}.log" for i in range(3)}


def test_the_scripts_of_a_copy_run_that_copy_with_its_site_settings(cluster: Cluster, tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path)
    (copy / "slurm" / "site.sh").write_text("export NPROC_PER_NODE=2; echo 'the site was here'\n")
    with open(copy / "ddp_cifar" / "__init__.py", "a") as file:
        file.write("print('this is the copy')\n")
    (job,) = submit(cluster, copy, README["plain"], *ARGUMENTS, "train.max_steps=2")
    cluster.wait_for(job, "COMPLETED", timeout=60)
    log = cluster.log(job)
    assert "the site was here" in log
    assert "0: this is the copy" in log
    assert "32 images per step = 2 ranks x 2 micro-batches of 8 images (16 per rank)" in log
    assert f"run_dir: runs/ddp_cifar-{job}\nto follow: tail -f {copy}/slurm-{job}.out\n" in log
    run_dir = copy / "runs" / f"ddp_cifar-{job}"
    assert (run_dir / "status").read_text() == "finished\n"

    (evaluation,) = submit(
        cluster, copy, README["evaluate"].replace("runs/demo", str(run_dir.relative_to(copy))), "device=cpu", "--trust"
    )
    cluster.wait_for(evaluation, "COMPLETED", timeout=60)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (accuracy,) = [row["test/accuracy"] for row in rows if "test/accuracy" in row]
    assert json.loads((copy / "evaluation.json").read_text())["accuracy"] == accuracy

    wrong = cluster.sbatch(*TWO_NODES, str(copy / "slurm" / "evaluate.sh"), "nowhere", cwd=tmp_path)
    cluster.wait_for(wrong, "FAILED", timeout=60)
    assert cluster.show(wrong)["ExitCode"] == "2:0"
    assert cluster.log(wrong).splitlines()[-1].startswith("[rank ")
    assert "error: there is no checkpoint nowhere: expected" in cluster.log(wrong).splitlines()[-1]
    assert not list(tmp_path.glob(".evaluate-*"))


def test_scripts_in_a_folder_without_a_checkout_run_the_installed_package(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run("python", "-m", "ddp_cifar.scripts", "the scripts", cwd=tmp_path)
    script = README["plain"].replace("slurm/train.sh", "'the scripts/slurm/train.sh'")
    (job,) = submit(cluster, tmp_path, script, "demo", *ARGUMENTS, "train.max_steps=2")
    cluster.wait_for(job, "COMPLETED", timeout=60)
    assert (tmp_path / "runs" / f"ddp_cifar-{job}" / "status").read_text() == "finished\n"


def test_run_directly_the_script_checks_the_run_and_then_submits(cluster: Cluster, tmp_path: Path) -> None:
    line = (*ARGUMENTS, "train.max_steps=2", "run_dir=run here")
    options = ("--nodes", "2", "--gpus-per-node=a-kind:2", "-o", "a folder/%j.out")
    typo = cluster.run(TRAIN, *options, "--", *line, "optim.lrr=1", cwd=tmp_path, check=False)
    assert typo.returncode == 2
    assert "did you mean optim.lr?" in typo.stderr.splitlines()[-1]
    many = cluster.run(TRAIN, "-N33", "--", *line, cwd=tmp_path, check=False)
    assert "is less than the number of ranks (33)" in many.stderr.splitlines()[-1]
    mixed = cluster.run(TRAIN, "--nodes=2", *line, cwd=tmp_path, check=False)
    assert (mixed.returncode, "put -- between sbatch's options" in mixed.stderr) == (2, True)
    percent = cluster.run(TRAIN, "--output=%x/%j.out", "--", *line, cwd=tmp_path, check=False)
    assert "contains a % pattern" in percent.stderr
    assert cluster.run("squeue", "--noheader").stdout == "", "none of them was submitted"
    (array,) = submit(cluster, tmp_path, f"{TRAIN} --array=2-3 --hold -- seed=%a", *line)
    assert {task["JobState"] for task in cluster.tasks(array)} == {"PENDING"}
    cluster.cancel(array)

    copy = copy_checkout(tmp_path)
    command = README["by_hand"].replace(" -- ", " -o 'a folder/%j.out' -- ")
    (job,) = submit(cluster, copy, command, *line)
    cluster.wait_for(job, "COMPLETED", timeout=60)
    log = (copy / "a folder" / f"{job}.out").read_text()
    assert "4 (2 nodes x 2)" in log
    assert (copy / "run here" / "status").read_text() == "finished\n"


def test_a_run_in_an_interactive_allocation_finishes(cluster: Cluster, tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path)
    command = f"{README['salloc']} {shlex.join((*ARGUMENTS, 'train.max_steps=2', 'run_dir=run'))}"
    done = cluster.run("bash", "-c", command, cwd=copy, timeout=60)
    assert "32 images per step = 4 ranks x 1 micro-batch of 8 images" in done.stdout
    assert "to follow: this terminal\n" in done.stdout
    assert (copy / "run" / "status").read_text() == "finished\n"


def test_a_chain_resumes_without_requeues_and_cancels_the_remaining_jobs(cluster: Cluster, tmp_path: Path) -> None:
    copy = copy_checkout(tmp_path)
    first, second, *others = submit(cluster, copy, README["chain"], *ARGUMENTS, *SHORT)
    assert len(others) == 6
    cluster.wait_until(lambda: any(copy.glob("runs/chain-*/checkpoints/step_*.pt")), 120, first)
    assert cluster.show(second)["Reason"] == "Dependency"
    cluster.cancel(first, "--batch", "--signal=USR1")
    cluster.wait_for(first, "COMPLETED", timeout=60)
    assert "; the next job of the chain resumes it" in cluster.log(first)
    cluster.wait_for(second, "COMPLETED", timeout=120)
    for job in others:
        cluster.wait_for(job, "CANCELLED")
    (run_dir,) = copy.glob("runs/chain-*")
    assert (run_dir / "status").read_text() == "finished\n"
    assert [cluster.restarts(job) for job in (first, second)] == [0, 0]


def test_nodes_that_are_started_by_hand_form_one_run(cluster: Cluster, tmp_path: Path) -> None:
    """The command of launch/README.md on two nodes, without Slurm."""
    copy = copy_checkout(tmp_path)
    command = command_of("launch/README.md", "^HEAD=\\S+ NNODES=2 launch")
    line = f"cd {shlex.quote(str(copy))}; {command} {shlex.join(ARGUMENTS)} train.max_steps=2 run_dir=runs/by-hand"
    with ThreadPoolExecutor() as machines:
        done = list(machines.map(lambda node: cluster.on(node, "bash", "-c", line), ("node1", "node2")))
    assert "32 images per step = 2 ranks x 2 micro-batches of 8 images (16 per rank)" in "".join(
        each.stdout for each in done
    )
    assert (copy / "runs" / "by-hand" / "status").read_text() == "finished\n"
