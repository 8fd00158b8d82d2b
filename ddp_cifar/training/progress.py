"""The progress of a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tqdm import tqdm

from ddp_cifar.config import Config
from ddp_cifar.data.dataset import is_same_data
from ddp_cifar.errors import FaultyReplica, NoRestart, RunError, UserError
from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_file import State
from ddp_cifar.training.totals import Totals


@dataclass
class Progress:
    """The progress of a run. A resume needs it, the config and the weights."""

    epoch: int = 0
    """Epochs completed."""
    step_in_epoch: int = 0
    """Steps completed in the current epoch."""
    step: int = 0
    """Steps completed in the run."""
    evaluating: bool = False
    """True if the steps of the epoch (or of the run) are completed and its evaluation is not."""
    train: Totals = dataclasses.field(default_factory=Totals)
    """Sums over the images that the current epoch has trained on, without those in `window`."""
    window: Totals = dataclasses.field(default_factory=Totals)
    """Sums over the images since the last row of scalars."""
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    """The scalars of the last evaluation, such as `test/accuracy`."""
    best_val_accuracy: float = -1.0
    best_step: int | None = None
    """The step of `best_val_accuracy`; None without validation images."""
    updates: int = 0
    """Steps whose update was not skipped."""
    data: str = ""
    """A description of the training data and a checksum of its labels. Steps and sample ids are only valid for these data."""
    conditions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Other conditions that affect results, derived from the hardware and the number of ranks."""

    def advance(self, end_of_epoch: int, *, updated: bool = True) -> None:
        """Count a step of an epoch that ends after `end_of_epoch` steps. `updated`: False if its update was skipped."""
        self.step += 1
        self.step_in_epoch += 1
        self.updates += updated
        self.evaluating = self.step_in_epoch == end_of_epoch

    def bar(self, steps_per_epoch: int, *, show: bool) -> "tqdm[NoReturn]":
        """Return the progress bar of the current epoch's steps."""
        return tqdm(
            total=steps_per_epoch,
            initial=self.step_in_epoch,
            desc=f"epoch {self.epoch + 1}",
            unit="step",
            leave=False,
            disable=not show,
        )

    @property
    def totals(self) -> Totals:
        """Sums over the images of the current epoch."""
        return self.train + self.window

    def record(self, results: dict[str, float]) -> bool:
        """Store the scalars of an evaluation; return True if its validation accuracy is the best so far."""
        self.results = results
        accuracy = results.get("val/accuracy", -1.0)
        if accuracy <= self.best_val_accuracy:
            return False
        self.best_val_accuracy, self.best_step = accuracy, self.step
        return True

    def end_epoch(self, *, is_whole: bool) -> None:
        """Mark the evaluation as done. If the epoch is complete, count it and reset the counters for the next one."""
        self.evaluating = False
        if is_whole:
            self.epoch += 1
            self.step_in_epoch = 0
            self.train = self.window = Totals()

    def is_finished(self, config: Config) -> bool:
        """True if `config` requires no further step and the last step has been evaluated."""
        train = config.train
        enough = self.epoch >= train.epochs or (train.max_steps is not None and self.step >= train.max_steps)
        return not self.evaluating and (enough or self.ends_early(config))

    def ends_early(self, config: Config) -> bool:
        """True if the last evaluation was at least `train.patience_epochs` epochs after the best one."""
        return not self.step_in_epoch and self._patience_is_over(config, self.epoch)

    def may_end_early(self, config: Config) -> bool:
        """True if the evaluation of this epoch, when its steps are done, ends the run unless it is the best one."""
        return self._patience_is_over(config, self.epoch + 1)

    def _patience_is_over(self, config: Config, epochs: int) -> bool:
        """True if an evaluation after `epochs` whole epochs is `train.patience_epochs` or more after the best one."""
        patience = config.train.patience_epochs
        if patience is None or self.best_step is None or epochs % config.eval.every:
            return False
        return (self.step - self.best_step) * epochs >= patience * self.step  # an epoch has step / epochs steps

    def state_dict(self) -> State:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load `state`. Fields that an older checkpoint lacks keep their values. Raises `UserError` for an unknown field."""
        fields = {"updates": state.get("step", 0), **state}  # older checkpoints do not count updates
        try:
            for name in {"train", "window"} & fields.keys():
                fields[name] = Totals(**fields[name])
            loaded = dataclasses.replace(self, **fields)
        except TypeError as error:
            raise UserError(
                f"the checkpoint was written by another version of ddp_cifar ({error}); resume with that version, or start "
                f"a new run from its weights with model.init"
            ) from error
        vars(self).update(vars(loaded))

    def resume(self, state: Mapping[str, Any], source: str) -> None:
        """Continue from the progress in the checkpoint `source`, and warn about conditions that change results.

        Conditions that only one side has are not compared. Raises `UserError` if the checkpoint is from other data.
        """
        before = Progress()
        before.load_state_dict(state)
        if not is_same_data(before.data, self.data):
            raise UserError(
                f"{source} was trained on other data ({before.data}), found {self.data}; "
                f"restore the original data, or start a new run with another run_dir"
            )
        for name, value in self.conditions.items():
            if (old := before.conditions.get(name, value)) != value:
                log.warning(f"{name} was {old} in {source} and is now {value}: results will differ")
        vars(self).update(vars(before) | {"conditions": self.conditions})

    def __str__(self) -> str:
        names = {"train/accuracy": "train", "val/accuracy": "val", "test/accuracy": "test"}
        accuracies = [
            f"{name} accuracy {100 * self.results[tag]:.2f}%" for tag, name in names.items() if tag in self.results
        ]
        return ", ".join([f"epoch {self.epoch}, step {self.step}", *accuracies])


class Stopped(Exception):
    """Stops all ranks at the same call. The message is the reason."""


class Failed(Exception):
    """Raised on all ranks at the same call if the run cannot continue. `faulty`: the ranks whose weights or device are wrong."""

    def __init__(
        self, message: str, faulty: Sequence[int] = (), *, ends_job: bool = False, wrong_since: int | None = None
    ) -> None:
        """`ends_job`: the run must not be started again by a launcher.

        `wrong_since`: checkpoints after the last verified one may be wrong; if none is verified, those after this step.
        """
        super().__init__(message)
        self.faulty = faulty
        self.ends_job = ends_job
        self.wrong_since = wrong_since

    def error_of(self, rank: int) -> type[RunError]:
        """Return the type of the error with which a rank ends."""
        if self.ends_job:
            return NoRestart
        return FaultyReplica if rank in self.faulty else RunError


def due(count: int, every: int | None) -> bool:
    """True at every `every`-th count; never for None."""
    return every is not None and count % every == 0
