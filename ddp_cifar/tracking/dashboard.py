"""The TensorBoard content of a run besides its scalars, and when it is written. docs/dashboard.md lists the tags."""

from collections.abc import Sequence

from torch import Tensor, nn

from ddp_cifar.config import Config
from ddp_cifar.data.dataset import DataSet
from ddp_cifar.data.loader import TrainLoader
from ddp_cifar.data.normalization import Normalization
from ddp_cifar.run.environment import versions
from ddp_cifar.run.run_dir import Start
from ddp_cifar.tracking import summaries
from ddp_cifar.tracking.base import Tracker
from ddp_cifar.tracking.rank_times import RankTimes

MAX_LOGITS = 50_000_000
"""The most logits (images times classes) for which an evaluation has pictures. They use 200 MB of memory per rank."""


class Dashboard:
    """Shows a run in TensorBoard: pictures, curves and texts.

    Every rank has one, as all ranks compute the logits of an evaluation. Only the tracker of rank 0 draws. The dashboard shows
    the evaluation of the test images or, without test images, of the validation images.
    """

    def __init__(self, tracker: Tracker, config: Config, dataset: DataSet) -> None:
        self.tracker = tracker
        self.config = config
        self.classes = dataset.classes
        self.split_name = "test" if dataset.test else "val"
        self.split = dataset.test or dataset.val
        self.hosts: Sequence[str] = ()
        """The host of each rank, if it is known."""

    def show_start(
        self,
        step: int,
        places: Sequence[tuple[str, str]],
        starts: Sequence[Start],
        train: TrainLoader,
        model: nn.Module,
    ) -> None:
        """Show the information available before training (re)starts after `step` steps.

        `places` has the host and device of each rank. `starts` has all starts of the run, including this one.
        """
        show, tracking = self.tracker.show, self.config.tracking
        self.hosts = [host for host, _ in places]
        show(summaries.add_layout)
        show(lambda board: summaries.add_config(board, self.config, step))
        show(lambda board: summaries.add_environment(board, versions(), places, step))
        self.show_history(starts, "running", step)
        show(lambda board: summaries.add_hparams(board, self.config, self.split_name))
        if step == 0 and tracking.pictures_every:
            self.tracker.show_image("train/images", lambda: summaries.draw_training_images(train, self.classes), 0)
        if step == 0 and tracking.graph:
            show(lambda board: summaries.add_graph(board, model, train.image_shape))

    def show_history(self, starts: Sequence[Start], outcome: str, step: int) -> None:
        """Show all starts of the run; `outcome` is the outcome of the last one."""
        self.tracker.show(lambda board: summaries.add_history(board, starts, outcome, step))

    def show_histograms(self, model: nn.Module, step: int) -> None:
        """Show the weights and gradients of step `step`, if histograms are due."""
        every = self.config.tracking.histograms_every
        if every is not None and step % every == 0:
            self.tracker.show(lambda board: summaries.add_histograms(board, model, step))

    def split_to_show(self, epoch: int, *, is_last: bool) -> str:
        """Return the split whose logits `show_evaluation` needs after epoch `epoch` (from 1), or "" for none.

        The result is equal on all ranks.
        """
        is_due = self._has_pictures(epoch, is_last)
        if not is_due or self.split is None or len(self.split) * len(self.classes) > MAX_LOGITS:
            return ""
        return self.split_name

    def _has_pictures(self, epoch: int, is_last: bool) -> bool:
        every = self.config.tracking.pictures_every
        return every is not None and (is_last or epoch % every == 0)

    def show_evaluation(self, logits: Tensor | None, step: int) -> None:
        """Show the predictions for the split, from its (N, classes) logits, summed over ranks; None: not due."""
        name, split, classes = self.split_name, self.split, self.classes
        if logits is None or split is None:
            return
        show_image = self.tracker.show_image
        show_image(f"{name}/confusion", lambda: summaries.draw_confusion(split, logits, classes), step)
        show_image(f"{name}/wrong", lambda: summaries.draw_wrong_images(split, logits, classes), step)
        self.tracker.show(lambda board: summaries.add_curves(board, name, split, logits, classes, step))

    def show_ranks(self, times: RankTimes, epoch: int, step: int, *, is_last: bool) -> None:
        """Show the times of each rank after epoch `epoch` (from 1), if pictures are due and there are several ranks."""
        if times.num_ranks > 1 and self._has_pictures(epoch, is_last):
            self.tracker.show_image("time/ranks", lambda: summaries.draw_rank_times(times, self.hosts), step)

    def show_projector(self, model: nn.Module, normalization: Normalization, step: int) -> None:
        """Show the features of the split's first images, if `tracking.projector` is true. Call it at the end of a run."""
        if not self.config.tracking.projector or (split := self.split) is None:
            return
        batch_size = self.config.eval.batch_size
        self.tracker.show(
            lambda board: summaries.add_projector(board, split, normalization, model, self.classes, batch_size, step)
        )
