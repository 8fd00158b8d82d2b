"""The test cluster behaves like a real one."""

from pathlib import Path

import pytest
from slurm_cluster import Cluster


def script(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_every_node_is_a_separate_host(cluster: Cluster) -> None:
    assert cluster.nodes() == dict.fromkeys(("node1", "node2", "node3"), "idle")
    assert sorted(cluster.run("srun", "--nodes=3", "hostname").stdout.split()) == ["node1", "node2", "node3"]
    assert cluster.on("node2", "hostname", "-I").stdout.split() == ["10.77.0.12"]
    assert cluster.on("node2", "ps", "-C", "slurmd,slurmctld", "-o", "args=").stdout == "slurmd -N node2\n"


def test_a_job_runs_with_the_environment_of_its_submission(cluster: Cluster, tmp_path: Path) -> None:
    job_script = script(tmp_path, "job.sh", 'echo "$WORD"; srun printenv CUDA_VISIBLE_DEVICES')
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=2", job_script, cwd=tmp_path, env={"WORD": "two, words"})
    cluster.wait_for(job, "COMPLETED")
    assert cluster.log(job) == "two, words\n0,1\n0,1\n"
    assert cluster.restarts(job) == 0
    cluster.wait_idle()


def test_the_tasks_of_an_array_are_separate_jobs(cluster: Cluster, tmp_path: Path) -> None:
    array = cluster.sbatch("--array=1-3", "--wrap=exit $((SLURM_ARRAY_TASK_ID == 2))", cwd=tmp_path)
    cluster.wait_for(array, "COMPLETED", "FAILED")
    assert [cluster.state(f"{array}_{task}") for task in (1, 2, 3)] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert len(cluster.tasks(array)) == 3


def test_waiting_for_an_impossible_state_fails_with_the_log_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--wrap=echo its last line; exit 1", cwd=tmp_path)
    with pytest.raises(AssertionError, match=r"(?s)FAILED rather than COMPLETED.*its last line.*slurmctld.log"):
        cluster.wait_for(job, "COMPLETED")


def test_a_canceled_job_ends(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--nodes=3", "--wrap=srun sleep 1000", cwd=tmp_path)
    cluster.wait_for(job, "RUNNING")
    cluster.cancel(job)
    cluster.wait_for(job, "CANCELLED")
    cluster.wait_idle()


def test_a_signal_reaches_only_the_tasks_of_slurm(cluster: Cluster, tmp_path: Path) -> None:
    child = script(tmp_path, "child.sh", "trap 'echo CHILD' USR1; echo READY; for i in {1..30}; do sleep 0.1; done")
    task = script(tmp_path, "task.sh", f"trap 'echo TASK' USR1; {child} & while ! wait; do :; done")
    job = cluster.sbatch(script(tmp_path, "job.sh", f"trap 'echo SHELL' USR1; srun {task}"), cwd=tmp_path)
    cluster.wait_until(lambda: "READY" in cluster.log(job), 30, job)
    cluster.cancel(job, "--signal=USR1")
    cluster.wait_for(job, "COMPLETED")
    reached = set(cluster.log(job).split()) & {"SHELL", "TASK", "CHILD"}
    # without a freezer cgroup, Slurm tracks the process tree, and also signals the children of its tasks
    followed = "proctrack/linuxproc" in cluster.run("scontrol", "show", "config").stdout
    assert reached == ({"TASK", "CHILD"} if followed else {"TASK"})


def test_a_job_that_loses_a_node_is_requeued_on_other_nodes(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--nodes=2", "--requeue", "--wrap=srun sh -c 'hostname; sleep 1000'", cwd=tmp_path)
    # a node that is lost before its task has started would fail the job
    cluster.wait_until(lambda: sorted(cluster.log(job).split()) == ["node1", "node2"], 30, job)
    cluster.crash("node2")
    cluster.wait_until(lambda: cluster.restarts(job) == 1, 60, job)
    cluster.wait_for(job, "RUNNING")
    assert cluster.show(job)["NodeList"] == "node[1,3]"
    assert cluster.nodes()["node2"] == "down*"
    cluster.boot("node2")
    cluster.wait_until(lambda: cluster.nodes()["node2"] == "idle", 10)


def test_an_urgent_job_preempts_another_which_requeues_itself(cluster: Cluster, tmp_path: Path) -> None:
    text = '[ -n "$SLURM_RESTART_COUNT" ] || trap "" TERM; srun sleep 1000 || scontrol requeue "$SLURM_JOB_ID"'
    job = cluster.sbatch("--nodes=3", "--exclusive", script(tmp_path, "job.sh", text), cwd=tmp_path)
    cluster.wait_for(job, "RUNNING")
    urgent = cluster.sbatch("--partition=urgent", "--wrap=hostname", cwd=tmp_path)
    cluster.wait_for(urgent, "COMPLETED")
    assert cluster.restarts(job) == 1
    cluster.wait_for(job, "RUNNING")
