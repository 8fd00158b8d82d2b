"""A trained network put to use: its logits for a whole split, over ranks, and what they say about it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_cifar.checkpoint import Loaded, load_checkpoint, load_newest, load_weights
from ddp_cifar.config import Config, Tables, flatten, load_config
from ddp_cifar.data.loader import EvalLoader
from ddp_cifar.distributed import World, open_world
from ddp_cifar.errors import UserError
from ddp_cifar.metrics import Counter, Totals
from ddp_cifar.models import build_model
from ddp_cifar.precision import autocast, missing_for

Forward = Callable[[Tensor], Tensor]
"""(B, 3, S, S) float32 images, normalised -> (B, classes) float32 logits."""

CALIBRATION_BINS = 15  # as in Guo et al., On Calibration of Modern Neural Networks (ICML 2017)


OF_THE_MACHINE = ("device", "backend", "train.threads")
"""Keys of a checkpoint's config that say where it was trained, not what it is."""


@contextlib.contextmanager
def open_trained(source: str, arguments: Sequence[str], tables: Tables) -> Iterator[tuple[World, Loaded, Config]]:
    """Open the ranks' world, the checkpoint at `source`, the same one on every rank, and its config with `arguments` over it.

    Of a run_dir the newest good checkpoint is taken. Device and backend are this machine's, and the precision is where
    the machine has it. Raises `UserError` for wrong arguments, before a group opens, and if there is no checkpoint.
    """
    asked = load_config(arguments, tables)
    with open_world(asked.device, asked.backend) as world:
        loaded = world.on_main(lambda: _read(Path(source)))
        trained = {key: value for key, value in flatten(loaded.state["config"]).items() if key not in OF_THE_MACHINE}
        if missing_for(str(trained["precision"]), world.device):
            trained["precision"] = "auto"
        yield world, loaded, load_config(arguments, tables, base=trained)


def _read(path: Path) -> Loaded:
    return load_newest(path, "CHECKPOINT") if path.is_dir() else Loaded(path, load_checkpoint(path))


def check_classes(loaded: Loaded, classes: tuple[str, ...], source: str) -> None:
    """Raise `UserError` if the data's classes are not those that the checkpoint was trained on."""
    trained = loaded.state.get("classes", list(classes))  # older checkpoints do not name theirs
    if list(classes) != trained:
        raise UserError(
            f"data.name={source} has the classes {', '.join(classes[:10])}, but {loaded.path} was trained on "
            f"{', '.join(trained[:10])}: give it data of the same classes, with data.name or data.root"
        )


def trained_model(loaded: Loaded, config: Config, num_classes: int, image_size: int, device: torch.device) -> nn.Module:
    """The checkpoint's network on a device, in eval mode, with its averaged weights where it has some.

    Raises `UserError` if the weights do not fit what `config` builds.
    """
    model = build_model(config.model, num_classes, image_size)
    weights: Mapping[str, Tensor] = loaded.state["ema" if "ema" in loaded.state else "model"]
    load_weights(model, weights, str(loaded.path))
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device).eval()


def mirrored_mean(model: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, classes): the mean of the logits of each image and of its mirror image."""
    logits: Tensor = (model(images).float() + model(images.flip(3)).float()) / 2
    return logits


def forward_pass(model: nn.Module, precision: str, device: torch.device, *, mirror: bool = False) -> Forward:
    """The model as a function, in `precision`; with `mirror`, averaged over each image and its mirror image."""

    @torch.inference_mode()
    def forward(images: Tensor) -> Tensor:
        with autocast(precision, device):
            logits: Tensor = mirrored_mean(model, images) if mirror else model(images).float()
        return logits

    return forward


def count_batches(
    forward: Forward,
    loader: EvalLoader,
    counter: Counter,
    world: World,
    batch_size: int,
    augmentations: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor] | None]:
    """Evaluate this rank's batches of a split, one a turn, and count losses and correct predictions.

    Gives each batch's places in the split (B,) and its logits (B, classes), and None in a turn that has no batch for this rank:
    every rank has as many turns.
    """
    for batch in loader.evaluation_batches(world, batch_size, augmentations):
        if batch is None:
            yield None
            continue
        logits = forward(batch.images)
        counter.add(F.cross_entropy(logits, batch.labels, reduction="none"), logits, batch.labels)
        yield batch.indices, logits


def put_in_place(logits: Tensor, found: tuple[Tensor, Tensor] | None) -> None:
    """Copy a turn's logits to the (N, classes) logits of the whole split. Nothing waits for the device."""
    if found:
        indices, own = found  # neighbours, in order
        logits[int(indices[0]) : int(indices[-1]) + 1] = own


@torch.inference_mode()
def split_logits(
    forward: Forward, loader: EvalLoader, num_classes: int, world: World, batch_size: int
) -> tuple[Tensor, Totals]:
    """(N, classes) float32 logits of a split's images in their order, on the CPU of every rank; and loss and accuracy.

    Every rank must call it.
    """
    counter = Counter(world.device)
    logits = torch.zeros(len(loader), num_classes, device=world.device)
    for found in count_batches(forward, loader, counter, world, batch_size):
        put_in_place(logits, found)
    totals = counter.reduce(world)
    # each row is zero on all ranks but one, so that the sum is exact
    return world.sum(logits).cpu(), totals


@dataclass(frozen=True)
class Quality:
    """What a split's logits say, beside loss and accuracy. Shares are 0 to 1."""

    top5_accuracy: float
    """Images whose true class is among the five likeliest; nan for five classes and fewer."""
    calibration_error: float
    """Expected calibration error over 15 equal bins of confidence (Guo et al., ICML 2017)."""
    confusion: Tensor
    """(classes, classes) int64: images of each true class (row) by predicted class (column)."""

    @staticmethod
    def of(logits: Tensor, labels: Tensor) -> "Quality":
        """Of (N, classes) logits and (N,) labels."""
        num_classes = logits.shape[1]
        predicted = logits.argmax(1)
        confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        top5 = float("nan")
        if num_classes > 5:
            top5 = (logits.topk(5, 1).indices == labels[:, None]).any(1).double().mean().item()
        return Quality(top5, _calibration_error(logits, labels), confusion.view(num_classes, num_classes))

    @property
    def recall(self) -> Tensor:
        """(classes,) of each class's images, the share that is predicted as it; nan for a class without images."""
        return self.confusion.diagonal() / self.confusion.sum(1)

    @property
    def precision(self) -> Tensor:
        """(classes,) of what is predicted as a class, the share that is of it; nan where nothing is."""
        return self.confusion.diagonal() / self.confusion.sum(0)

    def as_dict(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """For JSON, which has no nan: null stands for it."""

        def number(value: float) -> float | None:
            return None if value != value else value

        rows = zip(classes, self.confusion.sum(1).tolist(), self.precision.tolist(), self.recall.tolist(), strict=True)
        return {
            "top5_accuracy": number(self.top5_accuracy),
            "calibration_error": self.calibration_error,
            "classes": [
                {"name": name, "images": images, "precision": number(precision), "recall": number(recall)}
                for name, images, precision, recall in rows
            ],
            "confusion": self.confusion.tolist(),
        }


def _calibration_error(logits: Tensor, labels: Tensor) -> float:
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double()
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1  # (0, 1/15], (1/15, 2/15] ...
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return gaps.abs().sum().item() / len(labels)
