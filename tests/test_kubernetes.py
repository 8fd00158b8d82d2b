"""launch/kubernetes/: the manifest is valid and consistent, and its command survives lost pods. No Kubernetes is needed."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from documented import command_of
from launched import ARGUMENTS, CHECKOUT, rows_of
from pods import MANIFEST, Job, manifest, why_not

SERVICE, JOB = manifest()
SPEC = JOB["spec"]
POD = SPEC["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {each["name"]: each for each in CONTAINER["env"]}


@pytest.mark.parametrize("version", ["1.31.0", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("part", [SERVICE, JOB], ids=["Service", "Job"])
def test_the_manifest_is_valid(part: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(part, version, strict=True)


def test_the_oldest_version_is_the_first_that_has_all_policies() -> None:
    with pytest.raises(kubernetes_validate.ValidationError, match="successPolicy"):
        kubernetes_validate.validate(JOB, "1.29.0", strict=True)
    assert "Requires Kubernetes 1.31 or later" in MANIFEST.read_text()


def test_the_policies_fulfil_the_rules_that_only_the_api_server_checks() -> None:
    assert SPEC["completionMode"] == "Indexed"  # for successPolicy and backoffLimitPerIndex
    assert POD["restartPolicy"] == "Never"  # for podFailurePolicy and backoffLimitPerIndex
    assert SPEC["podReplacementPolicy"] == "Failed"  # the only value with podFailurePolicy
    assert 0 <= SPEC["maxFailedIndexes"] <= SPEC["completions"]
    assert "backoffLimitPerIndex" in SPEC  # for maxFailedIndexes
    for rule in SPEC["podFailurePolicy"]["rules"]:
        assert len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == CONTAINER["name"]
            assert codes["values"] == sorted(set(codes["values"]) - {0})
    requests, limits = CONTAINER["resources"]["requests"], CONTAINER["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == requests.get("nvidia.com/gpu", limits["nvidia.com/gpu"])


def test_the_names_of_job_and_service_fit_together() -> None:
    name, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["clusterIP"] == "None"  # otherwise pods have no names
    assert SERVICE["spec"]["selector"].items() <= SPEC["template"]["metadata"]["labels"].items()
    assert POD["subdomain"] == ENVIRONMENT["SERVICE"]["value"] == service
    (port,), (container_port,) = SERVICE["spec"]["ports"], CONTAINER["ports"]
    assert port["port"] == container_port["containerPort"]
    assert ENVIRONMENT["HEAD"]["value"] == f"{name}-0.{service}:{port['port']}"
    assert ENVIRONMENT["LOCAL_ADDR"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"


def test_one_number_of_nodes_one_volume_and_files_of_the_image() -> None:
    assert ENVIRONMENT["NNODES"]["value"] == str(SPEC["completions"]) == str(SPEC["parallelism"])
    assert SPEC["successPolicy"]["rules"] == [{"succeededCount": 1}]
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in POD["volumes"]}
    config, *arguments = CONTAINER["args"]
    values = dict(argument.split("=") for argument in arguments)
    assert values.keys() == {"data.root", "run_dir"}
    assert all(value.startswith(mounts["shared"] + "/") for value in values.values())
    for name in (config, *CONTAINER["command"]):
        assert (CHECKOUT / name).exists()
    assert POD["terminationGracePeriodSeconds"] > 60  # launch/node.sh waits up to 60 s for ranks that shut down


def test_a_renamed_job_keeps_its_volume_and_its_names_fit_together() -> None:
    rename = command_of("launch/kubernetes/README.md", "^sed ").partition(" | ")[0]
    text = subprocess.run(["bash", "-c", rename], cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout
    service, job = yaml.safe_load_all(text)
    assert service["metadata"]["name"] == job["metadata"]["name"] == "second"
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == "second"
    assert {each["name"]: each for each in pod["containers"][0]["env"]}["HEAD"]["value"] == "second-0.second:29500"
    assert pod["volumes"] == POD["volumes"]
    assert "ddp-cifar" not in text.replace("claimName: ddp-cifar", "")


def test_every_value_to_edit_is_marked() -> None:
    marked = [line.partition("#")[0].strip() for line in MANIFEST.read_text().splitlines() if "# EDIT" in line]
    assert [line.partition(":")[0] for line in marked] == [
        *("completions", "parallelism", "image", "args", "value", "cpu", "memory", "nvidia.com/gpu", "claimName")
    ]


# -- the command of the manifest, in pods

StartJob = Callable[..., Job]
LONG = ("train.epochs=400",)


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[StartJob]:
    if reason := why_not():
        pytest.skip(reason)
    jobs: list[Job] = []

    def start(*arguments: str, nodes: int = 3, pods: tuple[int, ...] = (), **environment: str) -> Job:
        jobs.append(Job(tmp_path, *ARGUMENTS, *arguments, nodes=nodes, **environment))
        jobs[0].start(*pods)
        return jobs[0]

    yield start
    for job in jobs:
        job.close()


def run_dir_of(job: Job) -> Path:
    return job.volume / "runs" / "cifar10"


def starts_of(job: Job) -> list[dict[str, Any]]:
    path = run_dir_of(job) / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status_of(job: Job) -> str:
    path = run_dir_of(job) / "status"
    return path.read_text().strip() if path.exists() else ""


def run_past_a_checkpoint(job: Job, starts: int) -> None:
    """Run the Job until the given start of the run has saved a new checkpoint."""
    checkpoints = run_dir_of(job) / "checkpoints"
    newest = lambda: max((path.name for path in checkpoints.glob("step_*.pt")), default="")  # noqa: E731
    job.run_until(lambda: len(starts_of(job)) >= starts, 120)
    before = newest()
    job.run_until(lambda: newest() != before, 60)


def finish_after_a_kill(job: Job) -> None:
    """Run the Job to its end, which it must reach from a checkpoint of the first start."""
    assert job.finish() == "Complete", job.report()
    assert status_of(job) == "finished"
    first, second = starts_of(job)
    assert first["step"] == 0 < second["step"], "the run resumed"
    assert first["world_size"] == second["world_size"] == 3
    steps = [row["step"] for row in rows_of(run_dir_of(job)) if "train/epoch" not in row]
    assert steps == sorted(set(steps)), "each step once, in order"


@pytest.mark.slow
def test_a_killed_pod_is_replaced_and_the_others_restart_their_ranks(start_job: StartJob) -> None:
    job = start_job("train.epochs=4")
    run_past_a_checkpoint(job, starts=1)
    others = [job.pods[0], job.pods[2]]
    job.pods[1].send(signal.SIGKILL)
    run_past_a_checkpoint(job, starts=2)
    assert job.outcomes == [(1, 137, "Count")], job.report()
    assert [job.pods[0], job.pods[2]] == others
    finish_after_a_kill(job)


@pytest.mark.slow
def test_if_the_pod_with_the_rendezvous_is_killed_all_pods_are_replaced(start_job: StartJob) -> None:
    job = start_job("train.epochs=4")
    run_past_a_checkpoint(job, starts=1)
    job.pods[0].send(signal.SIGKILL)
    run_past_a_checkpoint(job, starts=2)
    assert sorted(job.outcomes) == [(0, 137, "Count"), (1, 1, "Count"), (2, 1, "Count")], job.report()
    finish_after_a_kill(job)


@pytest.mark.slow
def test_a_pod_ends_if_the_rendezvous_is_lost_without_a_closed_connection(start_job: StartJob) -> None:
    """As when the node of pod 0 loses its power. torchrun alone would wait for 15 minutes."""
    job = start_job(*LONG, nodes=2, CHECK_EVERY_S="1")
    run_past_a_checkpoint(job, starts=1)
    job.pods[0].cut_off()
    job.run_until(lambda: job.outcomes, 60)
    assert job.outcomes == [(1, 1, "Count")]
    assert f"error: the rendezvous on {job.pods[0].address}:29500 does not respond" in job.report()


@pytest.mark.slow
def test_a_drained_pod_stops_all_and_none_counts_as_failed_or_succeeded(start_job: StartJob) -> None:
    """Then the file STOP ends the Job."""
    job = start_job(*LONG)
    run_past_a_checkpoint(job, starts=1)
    job.disrupted.add(1)
    job.pods[1].send(signal.SIGTERM)
    job.run_until(lambda: len(job.outcomes) == 3, 60)
    assert sorted(job.outcomes) == [(index, 75, "Ignore") for index in range(3)], job.report()
    assert status_of(job).startswith("stopped: SIGTERM")
    run_past_a_checkpoint(job, starts=2)
    assert starts_of(job)[1]["steps_lost"] == 0
    (run_dir_of(job) / "STOP").touch()
    assert job.finish() == "Complete", job.report()
    assert status_of(job).startswith("stopped: the file STOP")


@pytest.mark.slow
def test_a_user_error_fails_the_job_before_the_other_pods_are_up(start_job: StartJob) -> None:
    job = start_job("optim.lrr=1", pods=(0,))
    assert job.finish() == "Failed", job.report()
    assert job.outcomes == [(0, 2, "FailJob")]
    assert "did you mean optim.lr?" in job.report()


@pytest.mark.slow
def test_pods_wait_for_each_other_and_a_signal_ends_the_wait(start_job: StartJob) -> None:
    job = start_job(pods=(0, 1))
    job.run_until(lambda: "waiting until 3 pods are up" in job.report(), 60)
    assert job.report().count("waiting for the rendezvous on ddp-cifar-0.ddp-cifar:29500") == 1
    for index in (0, 1):
        job.pods[index].send(signal.SIGTERM)
    assert [job.pods[index].process.wait(10) for index in (0, 1)] == [75, 75]
