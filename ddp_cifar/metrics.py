"""Sums over images, reduced over ranks, and where the time of a step goes."""

import contextlib
import math
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ddp_cifar.distributed import World
from ddp_cifar.seeding import generator

T = TypeVar("T")


LOSS_UNIT = 2.0**-28
"""Losses are added up as whole numbers of this. A sum of integers is the same in any order: over any number of ranks, and
through any interruption. It rounds the loss of an image by 2e-9."""
LOSS_LIMIT = 2.0**14
"""What the loss of one image counts at most, so that the sum over a hundred million images fits 63 bits."""


@dataclass(frozen=True)
class Totals:
    """Sums over images, which can be added up and divided at any time. All are integers, and so exact."""

    loss_units: int = 0
    """The sum of all losses that are finite, in `LOSS_UNIT`."""
    correct: int = 0
    images: int = 0
    nonfinite: int = 0
    """Images whose loss is not finite."""
    ledger: int = 0
    """The sum of the `ledger_numbers` of the images: which ones they were, in any order."""

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        """nan where that of any image is not finite"""
        return self.loss_units * LOSS_UNIT if self.nonfinite == 0 else math.nan

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1, self.images)

    @property
    def accuracy(self) -> float:
        """0 to 1"""
        return self.correct / max(1, self.images)


def ledger_numbers(num_ids: int) -> Tensor:
    """(num_ids,) int64: a number of 40 random bits for each sample id.

    Sums of them tell sets of images apart: if one image stands for another, or is there twice, two sums agree by a chance
    of about 2^-40. The numbers of 2^22 images fit 63 bits.
    """
    return torch.randint(2**40, (num_ids,), generator=generator("ledger"))


class Counter:
    """Counts losses, correct predictions and images on the device; nothing waits until `reduce`."""

    def __init__(self, device: torch.device, ledger: Tensor | None = None) -> None:
        """`ledger`: the number of each sample id, where it is to be known which images were counted."""
        self.sums = torch.zeros(5, dtype=torch.int64, device=device)
        self.ledger = ledger

    def add(self, losses: Tensor, logits: Tensor, labels: Tensor, sample_ids: Tensor | None = None) -> None:
        """Count a batch: (B,) losses, (B, classes) logits, (B,) labels, (B,) sample ids for the ledger."""
        with torch.no_grad():
            finite = losses.isfinite()
            units = (losses.float().where(finite, 0.0).clamp(max=LOSS_LIMIT) / LOSS_UNIT).round().long()
            correct = logits.argmax(1) == labels
            count = torch.full((), len(labels), dtype=torch.int64, device=self.sums.device)
            numbers = count.new_zeros(1) if self.ledger is None or sample_ids is None else self.ledger[sample_ids]
            self.sums += torch.stack([units.sum(), correct.sum(), count, count - finite.sum(), numbers.sum()])

    def reduce(self, world: World) -> Totals:
        """The sums over all ranks since the last call. Waits for the device; every rank must call it."""
        self.own = self.sums.clone()
        totals = Totals(*world.sum(self.sums).tolist())
        self.sums = torch.zeros_like(self.sums)
        return totals

    def own_nonfinite(self) -> int:
        """Of what the last `reduce` summed, this rank's part of `nonfinite`."""
        return int(self.own[3])


class Span:
    """Steps and images since its making."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.steps = 0
        self.images = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class PhaseTimer:
    """Adds up the seconds of named phases. On CUDA they are taken between events on the stream, so nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body."""
        if self.on_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - started

    def timed(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The same items, the making of each one timed."""
        iterator = iter(items)
        while True:
            with self.phase(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def read(self) -> dict[str, float]:
        """Seconds a phase since the last call. On CUDA it waits for the device."""
        for name, start, end in self.events:
            end.synchronize()
            self.seconds[name] += start.elapsed_time(end) / 1000  # milliseconds
        self.events.clear()
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had at most: of the device's memory on CUDA, else of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
