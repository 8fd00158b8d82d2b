"""Real runs that are killed, with MLflow's own tracking server and with W&B offline: one run, each step once."""

import contextlib
import functools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launched import CHECKOUT, Run, environment_of, free_port, processes, send, wait_until

from ddp_cifar.compare import main as compare
from ddp_cifar.run.run_dir import read_rows
from ddp_cifar.tracking.base import TIME

pytestmark = pytest.mark.slow

ALL = ("tracking.pictures_every=2", "tracking.artifacts=true")


class Server:
    """MLflow's tracking server with SQLite, on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [
            *(
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--workers",
                "1",
            ),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        with open(self.folder / "server.log", "ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        assert wait_until(self.answers, 120), (self.folder / "server.log").read_text()

    def client(self) -> Any:
        from mlflow import MlflowClient  # takes two seconds

        return MlflowClient(self.uri)

    def answers(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200)
        return False

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.stop()


def kill_all(run: Run) -> None:
    """Kill every process of a run, so that no rank saves the last completed step."""
    send([pid for group in processes(run.path).values() for pid in group], signal.SIGKILL)
    assert wait_until(lambda: not any(processes(run.path).values()), 30)


def logged(run: Run) -> dict[str, dict[int, float]]:
    """The numbers of metrics.jsonl, by tag and step."""
    found: dict[str, dict[int, float]] = {}
    for row in read_rows(run.path / "metrics.jsonl"):
        for tag, value in row.items():
            if isinstance(value, int | float) and tag not in ("step", TIME):
                found.setdefault(tag, {})[row["step"]] = value
    return found


def is_measured(tag: str) -> bool:
    """True for a number that is another one when a step is computed again: a time, a speed, or a count of starts."""
    return bool(re.match(r".*_s$|run/", tag))


def check(run: Run, sent: dict[str, list[tuple[int, float]]]) -> None:
    """The service has the same numbers, each once, in the order of steps.

    A measured number may be at steps without one: the step was sent, lost by the run, and computed again. The first row of a
    start has no time of the slowest rank.
    """
    expected = logged(run)
    all_steps = {step for points in expected.values() for step in points}
    assert sent.keys() == expected.keys()
    for tag, points in sent.items():
        if is_measured(tag):
            steps = [step for step, _ in points]
            assert steps == sorted(set(steps)), tag
            assert set(expected[tag]) <= set(steps) <= all_steps, tag
        else:
            assert points == list(expected[tag].items()), tag


def test_a_run_in_mlflow_through_three_kills_and_a_server_that_is_away(server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    both = (
        "tracking.name=[mlflow, wandb]",
        "tracking.args.wandb.project=tests",
        "tracking.args.mlflow.registered_model=network",
        "train.epochs=10",
        *ALL,
    )
    environment = {"MLFLOW_TRACKING_URI": server.uri, "WANDB_MODE": "offline"}
    client = server.client()

    def runs() -> list[Any]:
        experiment = client.get_experiment_by_name("ddp_cifar")
        return client.search_runs([experiment.experiment_id]) if experiment else []

    def last_step() -> int:
        return int(runs()[0].data.tags.get("ddp_cifar.step", -1)) if runs() else -1

    for kill in range(3):
        before = last_step()
        run.start(*both, **environment)
        if kill == 1:
            server.stop()  # in mid-run
        else:
            assert wait_until(functools.partial(lambda before: last_step() > before, before), 60), run.terminal
        kill_all(run)
        if kill == 1:
            server.start()
    run.launch(*both, **environment)
    assert run.end(300) == 0, run.terminal

    (found,) = runs()
    assert (found.info.status, found.data.tags["ddp_cifar.outcome"]) == ("FINISHED", "finished")
    history = {tag: client.get_metric_history(found.info.run_id, tag) for tag in found.data.metrics}
    best = {tag: history.pop(tag) for tag in list(history) if tag.startswith("best_")}
    check(run, {tag: [(point.step, point.value) for point in points] for tag, points in history.items()})
    accuracies = logged(run)["val/accuracy"]
    assert best["best_val_accuracy"][-1].value == max(accuracies.values())
    assert found.data.params["optim.lr"] == "0.001"
    assert {"recipe", "hosts", "ranks", "torch"} <= found.data.tags.keys()
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"pictures", "checkpoint"}
    (version,) = client.search_model_versions("name = 'network'")
    assert version.run_id == found.info.run_id
    names = [item.path for item in client.list_artifacts(found.info.run_id, "pictures")]
    pictures = {path.name for path in (run.path / "pictures").iterdir()}
    assert {Path(name).name for name in names} == pictures
    assert {name.partition("-")[2] for name in pictures} >= {
        "train--images.png",
        "test--confusion.png",
        "test--wrong.png",
    }

    (folder,) = run.path.glob("wandb/offline-run-*")
    rows = list(history_of(folder))
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    numbers: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for tag, value in row.items():
            if not tag.startswith("_") and isinstance(value, int | float):
                numbers.setdefault(tag, []).append((row["_step"], value))
    check(run, numbers)
    times = {row["step"]: row[TIME] for row in read_rows(run.path / "metrics.jsonl")}
    assert all(row["_timestamp"] == times.get(row["_step"], row["_timestamp"]) for row in rows)


def test_the_other_ranks_exit_while_rank_0_still_sends(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.finish("tracking.name=launched:WaitsForOthers", "train.epochs=1")
    assert (run.path / "alone").read_text() == "True", run.terminal


def history_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows in a folder of W&B: its file has records of protobuf in the format of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data = path.read_bytes()
    position, parts = 7, b""  # after W&B's own header
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = struct.unpack("<4xHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if record.HasField("history"):
                names = [item.key or "/".join(item.nested_key) for item in record.history.item]
                row = dict(zip(names, (json.loads(item.value_json) for item in record.history.item), strict=True))
                pictures = [name.removesuffix("/_type") for name in names if name.endswith("/_type")]
                yield {name: value for name, value in row.items() if name.rpartition("/")[0] not in pictures}


def test_a_run_without_a_tracker_is_sent_afterwards(server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.finish("train.epochs=2")
    command = [sys.executable, "-m", "ddp_cifar.sync", str(run.path)]
    arguments = ["tracking.name=mlflow", f"tracking.args.uri={server.uri}", "tracking.args.experiment=later"]

    def sync(*extra: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*command, *extra], cwd=CHECKOUT, env=environment_of(), capture_output=True, text=True)

    assert "has no tracker: add one" in sync().stderr
    for _ in range(2):  # the second time, there is nothing to send
        done = sync(*arguments)
        assert done.returncode == 0, done.stderr
        assert f"mlflow has all metrics of {run.path}" in done.stdout
    client = server.client()
    (found,) = client.search_runs([client.get_experiment_by_name("later").experiment_id])
    history = {tag: client.get_metric_history(found.info.run_id, tag) for tag in logged(run)}
    check(run, {tag: [(point.step, point.value) for point in points] for tag, points in history.items()})
    failed = sync(arguments[0], f"tracking.args.uri=http://127.0.0.1:{free_port()}")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].count("cannot send metrics to mlflow (MlflowException") == 1


def test_a_sweep_in_mlflow_is_a_parent_run_and_its_table_equals_that_of_compare(server: Server, tmp_path: Path) -> None:
    sweep = tmp_path / "rates.yaml"
    sweep.write_text("config: demo\ngrid:\n  optim.lr: [1e-3, 1e-2]\n  seed: [0, 1]\n")
    small = ("data.shapes.train_images=256", "data.shapes.test_images=64", "train.epochs=1", "train.max_steps=2")
    tracked = ("tracking.name=mlflow", "tracking.args.experiment=sweep", "tracking.pictures_every=null")
    command = [str(CHECKOUT / "launch" / "sweep.sh"), str(sweep), *small, *tracked, f"run_dir={tmp_path / 'runs'}"]
    environment = environment_of(MLFLOW_TRACKING_URI=server.uri, NPROC_PER_NODE="1")
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    folders = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    compared = tmp_path / "table.json"
    assert compare([*map(str, folders), "--json", str(compared)]) == 0
    expected = {row["run_dir"]: (row["seed"], row["step"], row["accuracy"]) for row in json.loads(compared.read_text())}
    client = server.client()
    runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_name == "rates"
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    table = {
        child.data.params["run_dir"]: (
            int(child.data.params["seed"]),
            int(child.data.tags["ddp_cifar.step"]),
            child.data.metrics["test/accuracy"],
        )
        for child in children
    }
    assert table == expected
    assert len(table) == 4
