"""What a service receives of a run: each step once, whatever fails, and nothing that is secret."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import config_of
from launched import wait_until

from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.run.run_dir import RunDir
from ddp_cifar.tracking import build_senders, build_tracker, connections, mlflow, sender
from ddp_cifar.tracking.base import TIME, Tracker
from ddp_cifar.tracking.records import Record, Records
from ddp_cifar.tracking.sender import Sender, run_id, without_secrets


class Store:
    """A service in memory, which outlives the starts of a run."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.calls: list[object] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def connect(self) -> "Store":
        if self.error:
            raise self.error
        return self

    @property
    def last_step(self) -> int:
        return self.records[-1].step if self.records else -1

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.calls.append(dict(tags))

    def log_steps(self, records: Sequence[Record]) -> None:
        self.gate.wait()
        if self.error:
            raise self.error
        self.records += records

    def end(self, outcome: str, best: Mapping[str, Record], checkpoint: Path | None) -> None:
        self.calls.append((outcome, {tag: record.scalars[tag] for tag, record in best.items()}, checkpoint))

    @property
    def steps(self) -> list[int]:
        return [record.step for record in self.records]


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.gate.set()


@pytest.fixture(autouse=True)
def _propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "level", logging.INFO)


def start(folder: Path, store: Store, step: int = 0, **options: Any) -> tuple[Tracker, Sender]:
    """Start a run after `step` steps, with a sender to the store."""
    run_dir = RunDir(str(folder))
    one = Sender("store", store.connect, run_dir, {"recipe": "demo"}, **options)
    return build_tracker(run_dir.metrics, run_dir.tensorboard, step, senders=[one]), one


def row(tracker: Tracker, step: int, **scalars: float | str) -> None:
    tracker.log({**scalars, TIME: 1000.0 + step}, step)


def test_the_rows_of_a_step_are_sent_together_once_a_later_step_begins(tmp_path: Path, store: Store) -> None:
    tracker, _ = start(tmp_path, store)
    tracker.show_image("train/images", lambda: np.zeros((2, 3, 3), np.uint8), 0)
    row(tracker, 4, **{"train/loss": 2.0, "fingerprint": "ab"})
    row(tracker, 4, **{"val/accuracy": 0.5, "train/bad": float("nan")})
    tracker.show_image("val/confusion", lambda: np.zeros((2, 3, 3), np.uint8), 4)
    row(tracker, 8, **{"train/loss": 1.0})
    assert wait_until(lambda: store.steps == [0, 4], 10)
    tracker.end("finished")
    tracker.close()
    assert store.steps == [0, 4, 8]
    first, second, _ = store.records
    assert (second.scalars, second.time) == ({"train/loss": 2.0, "val/accuracy": 0.5}, 1004.0)
    assert [*first.pictures, *second.pictures] == ["train/images", "val/confusion"]
    assert store.calls == [{"recipe": "demo"}, ("finished", {"val/accuracy": 0.5}, None)]


def test_each_step_is_sent_once_though_a_crash_takes_steps_back(tmp_path: Path, store: Store) -> None:
    tracker, _ = start(tmp_path, store)
    for step in (4, 8, 12):
        row(tracker, step, loss=1.0)
    assert wait_until(lambda: store.steps == [4, 8], 10)
    again, _ = start(tmp_path, store, step=4)  # the first one was killed
    for step in (8, 12, 16):
        row(again, step, loss=1.0)
    again.end("finished")
    again.close()
    assert store.steps == [4, 8, 12, 16]


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_last_step_of_a_run_that_stops_is_held_back_if_rows_of_it_will_follow(
    tmp_path: Path, store: Store, is_whole: bool
) -> None:
    tracker, _ = start(tmp_path, store, is_step_whole=lambda: is_whole)
    row(tracker, 4, loss=1.0)
    row(tracker, 8, loss=1.0)
    tracker.end("stopped: SIGTERM")
    tracker.close()
    assert store.steps == ([4, 8] if is_whole else [4])
    tracker, _ = start(tmp_path, store, step=8)
    row(tracker, 8 if not is_whole else 12, accuracy=1.0)
    tracker.end("finished")
    tracker.close()
    assert store.steps == ([4, 8, 12] if is_whole else [4, 8])
    assert set(store.records[-1].scalars) == ({"accuracy"} if is_whole else {"loss", "accuracy"})


def test_a_service_that_fails_costs_a_warning_and_receives_everything_later(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RETRY_S", 0.1)
    monkeypatch.setenv("SOME_API_KEY", "hunter22")
    store.error = ConnectionError("no route to http://me:secret@host for hunter22\nTraceback")
    tracker, _ = start(tmp_path, store)
    for step in (4, 8, 12):
        row(tracker, step, loss=1.0)
    assert wait_until(lambda: "cannot send" in caplog.text, 10)
    assert "store (ConnectionError: no route to http://***@host for ***); training continues" in caplog.text
    store.error = None
    assert wait_until(lambda: "works again" in caplog.text, 10)
    assert store.steps == [4, 8]
    store.error = ConnectionError("again")
    row(tracker, 16, loss=1.0)
    tracker.end("finished")
    tracker.close()
    assert f"python -m ddp_cifar.sync {tmp_path}" in caplog.records[-1].getMessage()
    assert caplog.text.count("no route") == 1
    store.error = None
    (one,) = [Sender("store", store.connect, RunDir(str(tmp_path)), {})]
    one.end("finished")
    one.finish()
    assert store.steps == [4, 8, 12, 16]


def test_no_step_waits_for_a_slow_service(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "STOP_TIMEOUT_S", 0.2)
    store.gate.clear()
    tracker, _ = start(tmp_path, store)
    began = time.monotonic()
    for step in range(1, 50):
        row(tracker, step, loss=1.0)
    tracker.close()
    assert time.monotonic() - began < 5
    assert "store lacks a part of this run" in caplog.text


def test_the_best_checkpoint_is_sent_when_the_run_has_finished(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step_00000004.pt").touch()
    (folder / "latest.pt").symlink_to("step_00000004.pt")
    for outcome, sent in (("stopped: SIGTERM", None), ("finished", folder / "step_00000004.pt")):
        tracker, _ = start(tmp_path, store, artifacts=True)
        row(tracker, 4, loss=1.0)
        tracker.end(outcome)
        tracker.close()
        assert store.calls[-1] == (outcome, {}, sent)


def test_a_failed_run_and_a_crashed_one_end_with_their_status(tmp_path: Path, store: Store) -> None:
    for status, outcome in (("failed: a reason", "failed: a reason"), ("running", "crashed")):
        (tmp_path / "status").write_text(status + "\n")
        tracker, _ = start(tmp_path, store)
        tracker.close()
        assert store.calls[-1] == (outcome, {}, None)


def test_an_incomplete_row_and_pictures_of_steps_that_were_taken_back_wait(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    run_dir.pictures.mkdir()
    (run_dir.pictures / "00000050-val--wrong.png").touch()
    run_dir.metrics.write_text('{"step": 4, "loss": 1.0}\n{"step": 8, "loss"')
    records = Records(run_dir)
    assert [record.step for record in records.read(with_last=True)] == [4]
    with open(run_dir.metrics, "a") as file:
        file.write(": 2.0}\nnot a row\n")
    assert [record.step for record in records.read(with_last=True)] == [8]


# -- a class with log and close

SEEN: list[tuple[str, object]] = []


class Simple:
    def __init__(self, config: dict[str, Any], run_dir: str, prefix: str = "") -> None:
        self.prefix = prefix

    def log(self, scalars: dict[str, float], step: int) -> None:
        if step == 8 and "fail" in self.prefix:
            raise OSError("full")
        SEEN.append((self.prefix, step))

    def close(self) -> None:
        SEEN.append((self.prefix, "closed"))


class Other(Simple):
    pass


def simple(config: dict[str, Any], run_dir: str) -> object:
    return object()


def of_config(tmp_path: Path, *arguments: str, step: int = 0) -> Tracker:
    config = config_of(f"run_dir={tmp_path}", *arguments)
    return build_tracker(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", step, senders=build_senders(config, {}))


def test_a_users_class_receives_each_step_once_over_all_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SEEN.clear()
    name = "tracking.name=test_senders:Simple"
    for prefix, steps in (("fail", (4, 8)), ("b", (12, 16))):
        tracker = of_config(tmp_path, name, f"tracking.args.prefix={prefix}", step=8)
        for step in steps:
            row(tracker, step, loss=1.0)
        tracker.close()
    assert SEEN == [("fail", 4), ("b", 8), ("b", 12), ("b", 16), ("b", "closed")]
    assert "cannot send metrics to test_senders:Simple (OSError: full)" in caplog.text


def test_several_trackers_have_arguments_by_name(tmp_path: Path) -> None:
    SEEN.clear()
    names = "tracking.name=[test_senders:Simple, test_senders:Other]"
    tracker = of_config(tmp_path, names, "tracking.args.test_senders:Other.prefix=x")
    row(tracker, 4, loss=1.0)
    tracker.close()
    assert sorted(SEEN, key=str) == [("", "closed"), ("", 4), ("x", "closed"), ("x", 4)]
    wrong = config_of(names, "tracking.args.test_senders:Other.size=1")
    with pytest.raises(UserError, match=r"does not accept the arguments .*size=1"):
        connections(wrong)


def test_a_factory_that_returns_something_else_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = of_config(tmp_path, "tracking.name=test_senders:simple")
    row(tracker, 4, loss=1.0)
    tracker.close()
    assert "simple has no log and no close; expected log(scalars, step) and close()" in caplog.text


# -- secrets, ids


@pytest.mark.parametrize(
    "argument",
    [
        "tracking.args.api_key=hunter22",
        "tracking.args.mlflow.token=hunter22",
        "tracking.args.uri=http://me:hunter22@host:5000",
    ],
)
def test_secrets_are_rejected_without_being_shown(argument: str) -> None:
    with pytest.raises(UserError) as error:
        config_of("tracking.name=mlflow", argument)
    assert str(error.value).startswith(argument.split("=")[0] + " has a secret")
    assert "hunter22" not in str(error.value)


def test_a_missing_package_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"tracking.name=wandb needs the package wandb.*pip install 'ddp_cifar\[wandb\]'"
    ):
        config_of("tracking.name=[wandb]")


def test_the_id_of_a_run_is_made_once(tmp_path: Path) -> None:
    assert run_id(str(tmp_path)) == run_id(str(tmp_path))
    assert without_secrets("https://a:b@c/d and //x@y") == "https://***@c/d and //***@y"


class Requests:
    """MLflow's client, as far as `log_steps` needs it. Keeps the metrics and tags of each request."""

    def __init__(self) -> None:
        self.requests: list[tuple[list[tuple[str, int]], dict[str, str]]] = []

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), tags: Sequence[Any] = ()) -> None:
        self.requests.append(([(item.key, item.step) for item in metrics], {item.key: item.value for item in tags}))


def test_after_each_request_mlflow_has_whole_steps_and_knows_which() -> None:
    """So a run that is killed between two requests repeats no step."""
    service = mlflow.MLflow.__new__(mlflow.MLflow)
    service.id, service.client = "run", Requests()
    sizes = {5: 700, 6: 299, 7: 2, 8: 0, 9: 1000, 10: 1}
    records = [Record(step, 1.0, {f"m{number}": 0.0 for number in range(size)}) for step, size in sizes.items()]
    service.log_steps(records)
    sent: list[tuple[str, int]] = []
    for metrics, tags in service.client.requests:
        assert len(metrics) <= mlflow.MAX_METRICS
        sent += metrics
        known = int(tags[mlflow.STEP])
        assert sent == [(tag, record.step) for record in records if record.step <= known for tag in record.scalars]
    assert [int(tags[mlflow.STEP]) for _, tags in service.client.requests] == [6, 7, 9, 10]
    service.log_steps([Record(11, 1.0, {f"m{number}": 0.0 for number in range(2500)})])
    assert [(len(metrics), tags.get(mlflow.STEP)) for metrics, tags in service.client.requests[4:]] == [
        (1000, None),
        (500, None),
        (1000, "11"),
    ]
