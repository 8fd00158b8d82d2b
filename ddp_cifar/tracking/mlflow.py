"""Runs in MLflow, on a tracking server or in a local store. Needs the package mlflow-skinny, or mlflow."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ddp_cifar.config import as_typed, flatten
from ddp_cifar.log import log
from ddp_cifar.run.run_dir import lock_file
from ddp_cifar.tracking.records import Record
from ddp_cifar.tracking.sender import best_name, run_id, without_secrets

if TYPE_CHECKING:
    from mlflow.entities import Metric

T = TypeVar("T")

ID, GROUP, STEP, OUTCOME = "ddp_cifar.id", "ddp_cifar.group", "ddp_cifar.step", "ddp_cifar.outcome"
"""Tags of a run: its id in RUN_DIR/tracking, its group, the last step that the server has, and the run's status."""

PARENT = "mlflow.parentRunId"

MAX_METRICS, MAX_PARAMS, MAX_VALUE = 1000, 100, 6000
"""The most in a request, and the longest value of a parameter. Source: MLflow's REST API, "Log Batch"."""

STATUS = {"finished": "FINISHED", "stopped": "KILLED"}
"""MLflow's status of a run by ours. Any other one is a failure."""


class MLflow:
    """A run in MLflow. Numbers have the step and the time at which the run logged them.

    `uri`: the tracking server; default: MLFLOW_TRACKING_URI. `experiment`: default: MLFLOW_EXPERIMENT_NAME, or ddp_cifar.
    `registered_model`: with tracking.artifacts, also register the checkpoint under this name.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        run_dir: str,
        uri: str | None = None,
        experiment: str | None = None,
        registered_model: str | None = None,
    ) -> None:
        # the sender tries again, and must notice a failure soon
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient  # takes two seconds

        self.registered_model = registered_model
        self.client = MlflowClient(uri)
        self.experiment = self._experiment(experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "ddp_cifar")
        tags = {ID: run_id(run_dir)}
        if group := config["tracking"]["group"]:
            tags |= {GROUP: group, PARENT: self._parent(group, Path(run_dir).parent)}
        run = self._find(f"tags.`{ID}` = '{tags[ID]}'") or self.client.create_run(
            self.experiment, run_name=Path(run_dir).name, tags=tags
        )
        self.id = run.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        address = without_secrets(self.client.tracking_uri)
        log.info(f"the run in MLflow: {address}/#/experiments/{self.experiment}/runs/{self.id}")
        self._set_params({key: as_typed(value) for key, value in flatten(config).items()}, run.data.params)
        self.last_step = int(run.data.tags.get(STEP, -1))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._log(tags=tags)

    def log_steps(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        for record in records:
            for path in record.pictures.values():
                self.client.log_artifact(self.id, str(path), "pictures")
        metrics: list[Metric] = []
        for record in records:
            more = [Metric(tag, value, milliseconds(record.time), record.step) for tag, value in record.scalars.items()]
            if metrics and len(metrics) + len(more) > MAX_METRICS:
                self._send(metrics, metrics[-1].step)
                metrics = []
            metrics += more
        self._send(metrics, records[-1].step)

    def end(self, outcome: str, best: Mapping[str, Record], checkpoint: Path | None) -> None:
        from mlflow.entities import Metric

        for tag, record in best.items():
            metric = Metric(best_name(tag), record.scalars[tag], milliseconds(record.time), record.step)
            self.client.log_batch(self.id, metrics=[metric])
        if checkpoint:
            self.client.log_artifact(self.id, str(checkpoint), "checkpoint")
            if self.registered_model:
                self._register(self.registered_model)
        self._log(tags={OUTCOME: outcome})
        self.client.set_terminated(self.id, STATUS.get(outcome.partition(":")[0], "FAILED"))

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if found := self.client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self.client.create_experiment(name))
        except MlflowException:  # another run of a sweep has just created it
            if found := self.client.get_experiment_by_name(name):
                return str(found.experiment_id)
            raise

    def _find(self, condition: str) -> Any:
        """Return the run of this experiment that fulfills the condition; None if there is none."""
        return next(iter(self.client.search_runs([self.experiment], condition, max_results=1)), None)

    def _parent(self, group: str, folder: Path) -> str:
        """Return the id of the group's run. The runs of a sweep, which share a folder, create it once."""
        group = group.replace("'", " ")  # it ends a text in a search
        with open(folder / ".lock_of_group", "w") as lock:
            with contextlib.suppress(OSError):  # without lock support, there may be two parents
                lock_file(lock, timeout_s=60)
            run = self._find(f"tags.`{GROUP}` = '{group}' and tags.`{ID}` = 'group'")
            if not run:
                run = self.client.create_run(self.experiment, run_name=group, tags={GROUP: group, ID: "group"})
                self.client.set_terminated(run.info.run_id)  # it has no metrics of its own
        return str(run.info.run_id)

    def _set_params(self, params: Mapping[str, str], known: Mapping[str, str]) -> None:
        """Log the parameters. MLflow does not let them change: a value that a resume has changed becomes a tag."""
        from mlflow.entities import Param

        new = [Param(key, value[:MAX_VALUE]) for key, value in params.items() if key not in known]
        for some in chunks(new, MAX_PARAMS):
            self.client.log_batch(self.id, params=some)
        self._log(tags={f"now.{key}": params[key] for key in known.keys() & params.keys() if known[key] != params[key]})

    def _send(self, metrics: "Sequence[Metric]", step: int) -> None:
        """Send the metrics up to `step`, and that the server has them, in one request: nothing can come between.

        MLflow keeps a metric once only if it has the same time. After a crash, the step may be computed again, at another time.
        """
        from mlflow.entities import RunTag

        for some in chunks(metrics[:-MAX_METRICS], MAX_METRICS):  # a single step with more metrics than fit
            self.client.log_batch(self.id, metrics=some)
        self.client.log_batch(self.id, metrics=metrics[-MAX_METRICS:], tags=[RunTag(STEP, str(step))])

    def _log(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _register(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self.client.get_run(self.id).info.artifact_uri}/checkpoint"
        self.client.create_model_version(name, source, self.id, await_creation_for=0)


def milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def chunks(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Split a sequence into parts of at most `most` items."""
    return (items[start : start + most] for start in range(0, len(items), most))
