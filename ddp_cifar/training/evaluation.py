"""Evaluation of a split over all ranks: each image counts once, on any number of ranks."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ddp_cifar.config import EvalConfig
from ddp_cifar.data.loader import EvalLoader, TrainLoader
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import RunError
from ddp_cifar.training.loss import LossFunction
from ddp_cifar.training.precision import autocast
from ddp_cifar.training.progress import Progress
from ddp_cifar.training.totals import ImageCounter, Totals

Forward = Callable[[Tensor], Tensor]
"""(B, C, H, W) normalized float32 images -> (B, classes) float32 logits."""


def flip_tta(model: nn.Module, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, classes): the mean logits of each image and its mirror image."""
    logits: Tensor = (model(images).float() + model(images.flip(3)).float()) / 2
    return logits


def forward_pass(
    model: nn.Module, precision: str, device: torch.device, *, mirror: bool = False, compiled: bool = False
) -> Forward:
    """Return the model as a function in `precision`; with `mirror`, logits are averaged over each image and its mirror image.

    `compiled`: the model is compiled, and the logits are valid until the next call.
    """

    @torch.inference_mode()
    def forward(images: Tensor) -> Tensor:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()  # otherwise each call would add CUDA graphs to those of the last one
        with autocast(precision, device):
            logits: Tensor = flip_tta(model, images) if mirror else model(images).float()
        return logits

    return forward


@torch.inference_mode()
def evaluate_split(
    forward: Forward,
    loader: EvalLoader,
    world: World,
    batch_size: int,
    loss: LossFunction,
    *,
    augmentations: Tensor | None = None,
    logits: Tensor | None = None,
    on_batch: Callable[[], object] = lambda: None,
) -> Totals:
    """Return loss and accuracy over all images of a split. Every rank must call it.

    `loss` gives the loss per image. If given, `augmentations` (num_ids, 3 or 5) augment the images. `logits`, (N, classes)
    zeros on the device, receives the logits of this rank's images; sum it over ranks to get all. `on_batch` is called equally
    often on every rank. Raises `RunError` if an image was not counted, or was counted twice.
    """
    counter = ImageCounter(world.device)
    for batch in loader.evaluation_batches(world, batch_size, augmentations):
        if batch is not None:
            found = forward(batch.images)
            counter.add(loss(found, batch.labels), found, batch.labels)
            if logits is not None:
                logits[int(batch.indices[0]) : int(batch.indices[-1]) + 1] = found  # indices are consecutive
        on_batch()
    totals = counter.reduce(world)
    if totals.images != len(loader):
        raise RunError(f"the evaluation counted {totals.images} images, expected {len(loader)}")
    return totals


class Evaluator:
    """Evaluates the model of a run in eval mode; with `train.ema_decay`, its averaged weights."""

    def __init__(
        self,
        world: World,
        config: EvalConfig,
        model: nn.Module,
        loss: LossFunction,
        precision: str,
        num_classes: int,
        *,
        train: TrainLoader,
        val: EvalLoader | None,
        test: EvalLoader | None,
        evaluating: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        compiled: bool = False,
    ) -> None:
        """`evaluating()` is open while the model evaluates: a schedule-free optimizer then puts other weights into it.

        `compiled`: the model is compiled.
        """
        self.world = world
        self.config = config
        self.model = model
        self.loss = loss
        self.precision = precision
        self.num_classes = num_classes
        self.train = train
        self.evaluating = evaluating
        self.compiled = compiled
        self.held_out = {name: loader for name, loader in (("val", val), ("test", test)) if loader is not None}
        """The existing ones of `val`, which selects the best checkpoint, and `test`."""

    def evaluate(
        self,
        loader: EvalLoader,
        *,
        augmentations: Tensor | None = None,
        logits: Tensor | None = None,
        on_batch: Callable[[], object] = lambda: None,
    ) -> Totals:
        """Evaluate one split, as `evaluate_split` does."""
        self.model.eval()
        forward = forward_pass(self.model, self.precision, self.world.device, compiled=self.compiled)
        with self.evaluating():
            return evaluate_split(
                forward,
                loader,
                self.world,
                self.config.batch_size,
                self.loss,
                augmentations=augmentations,
                logits=logits,
                on_batch=on_batch,
            )

    def run(
        self, progress: Progress, *, keep_logits_of: str = "", on_batch: Callable[[], object] = lambda: None
    ) -> tuple[dict[str, float], Tensor | None]:
        """Evaluate after an epoch. Every rank must call it.

        Returns scalars by tag, such as `test/accuracy`, and the (N, classes) logits of the split `keep_logits_of`.
        """
        logits: Tensor | None = None
        results = {"train/accuracy": progress.totals.accuracy}
        if self.config.train_accuracy == "full":
            # crops and flips differ from those of training, and are drawn for this epoch
            augmentations = self.train.augmentations(progress.epoch, purpose="augment for the training accuracy")
            totals = self.evaluate(self.train, augmentations=augmentations, on_batch=on_batch)
            results["train/accuracy"] = totals.accuracy
        for name, loader in self.held_out.items():
            own = None
            if name == keep_logits_of:
                own = torch.zeros(len(loader), self.num_classes, device=self.world.device)
            totals = self.evaluate(loader, logits=own, on_batch=on_batch)
            if own is not None:
                logits = self.world.sum(own)
            results |= {f"{name}/loss": totals.mean_loss, f"{name}/accuracy": totals.accuracy}
        return results, logits
