"""Sums over images, reduced over ranks, and where the time of a step goes."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ddp_cifar.distributed import World

T = TypeVar("T")


@dataclass(frozen=True)
class Totals:
    """Sums over images, which can be added up and divided at any time."""

    loss: float = 0.0
    correct: float = 0.0
    images: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.loss + other.loss, self.correct + other.correct, self.images + other.images)

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1, self.images)

    @property
    def accuracy(self) -> float:
        """0 to 1"""
        return self.correct / max(1, self.images)


class Counter:
    """Counts loss and correct predictions on the device; nothing waits until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        # (loss, correct, images); float64 counts every image exactly, and mps has no float64
        self.sums = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def add(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: (B,) losses, (B, classes) logits, (B,) labels."""
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            images = torch.full_like(correct, len(labels))
            self.sums += torch.stack([losses.to(self.sums.dtype).sum(), correct, images])

    def reduce(self, world: World) -> Totals:
        """The sums over all ranks since the last call. Waits for the device; every rank must call it."""
        loss, correct, images = world.sum(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        return Totals(loss, correct, int(images))


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
