"""Sums over images: exact integers, reduced over ranks."""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from ddp_cifar.distributed.world import World
from ddp_cifar.seeding import generator

LOSS_UNIT = 2.0**-28
"""Losses are summed as integer multiples of this unit. A sum of integers is the same in any order, so it does not depend on the
number of ranks or on interruptions. The unit rounds the loss of an image by 2e-9."""


LOSS_LIMIT = 2.0**14
"""The upper limit on the loss of one image. The sum over two million images at this limit fits 63 bits."""


@dataclass(frozen=True)
class Totals:
    """Sums over images. All are integers, and so exact. Sums can be added."""

    loss_units: int = 0
    """The sum of all finite losses, in `LOSS_UNIT`."""
    correct: int = 0
    images: int = 0
    nonfinite: int = 0
    """The number of images whose loss is not finite."""
    ledger: int = 0
    """The sum of the `sample_hashes` of the images. It identifies the set of images, in any order."""

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        """The sum of the losses; nan if the loss of any image is not finite."""
        return self.loss_units * LOSS_UNIT if self.nonfinite == 0 else math.nan

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1, self.images)

    @property
    def accuracy(self) -> float:
        """The share of correct predictions, 0 to 1."""
        return self.correct / max(1, self.images)


def sample_hashes(num_ids: int) -> Tensor:
    """(num_ids,) int64: a random 40-bit hash for each sample id.

    The sum of hashes identifies a set of images. If one image replaces another, or is trained twice, the sums are equal with
    a probability of about 2^-40. The sum over 2^22 images fits 63 bits.
    """
    return torch.randint(2**40, (num_ids,), generator=generator("ledger"))


class ImageCounter:
    """Counts losses, correct predictions and images on the device. Only `read` and `reduce` wait for the device."""

    def __init__(self, device: torch.device, ledger: Tensor | None = None) -> None:
        """`ledger`: the hash of each sample id; if given, the counter also sums the hashes of the counted images."""
        self.sums = torch.zeros(len(fields(Totals)), dtype=torch.int64, device=device)
        """Sums over the images that this rank has counted since the last reduction."""
        self.own = torch.zeros_like(self.sums)
        """Sums over the images of this rank since the last `clear`."""
        self.total = torch.zeros_like(self.sums)
        """Sums over the images of all ranks since the last `clear`."""
        self.ledger = ledger

    def add(self, losses: Tensor, logits: Tensor, labels: Tensor, sample_ids: Tensor | None = None) -> None:
        """Count a batch: (B,) losses, (B, classes) logits, (B,) labels, (B,) sample ids for the ledger."""
        with torch.no_grad():
            finite = losses.isfinite()
            units = (losses.float().where(finite, 0.0).clamp(max=LOSS_LIMIT) / LOSS_UNIT).round().long()
            correct = logits.argmax(1) == labels
            count = torch.full((), len(labels), dtype=torch.int64, device=self.sums.device)
            hashes = count.new_zeros(1) if self.ledger is None or sample_ids is None else self.ledger[sample_ids]
            # in the order of the fields of Totals
            self.sums += torch.stack([units.sum(), correct.sum(), count, count - finite.sum(), hashes.sum()])

    def start_reducing(self, world: World) -> Callable[[], None]:
        """Start summing over ranks what was counted since the last call; return a function that adds the sums to `total`.

        Every rank must call both.
        """
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        own = sums.clone()
        wait = world.sum_async(sums)

        def finish() -> None:
            wait()
            self.own += own
            self.total += sums

        return finish

    def read(self) -> tuple[Totals, Totals]:
        """Return the sums over all ranks and over this rank since the last `clear`. Waits for the device."""
        return Totals(*self.total.tolist()), Totals(*self.own.tolist())

    def clear(self) -> None:
        """Start new sums."""
        self.own, self.total = torch.zeros_like(self.own), torch.zeros_like(self.total)

    def reduce(self, world: World) -> Totals:
        """Return the sums over all ranks since the last call. Waits for the device; every rank must call it."""
        self.start_reducing(world)()
        totals, _ = self.read()
        self.clear()
        return totals
