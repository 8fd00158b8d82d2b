"""Counters behind each row of metrics: sums over images, gradient norms, and the time of each phase."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ddp_cifar.data.loader import StepBatch, TrainLoader
from ddp_cifar.distributed.world import World
from ddp_cifar.run.memory import peak_host_memory
from ddp_cifar.tracking.base import Scalars
from ddp_cifar.training.progress import Failed, Progress
from ddp_cifar.training.totals import ImageCounter, Totals, sample_hashes

T = TypeVar("T")

PHASES = ("data", "forward", "backward", "optimizer")
"""The phases of a step."""


class Span:
    """The steps and images since this object was created."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.steps = 0
        self.images = 0
        self.passes = 0
        """Micro-batches of this rank, plus one dummy pass for each step without any."""
        self.micro_batches = 0
        """Micro-batches of all ranks."""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class PhaseTimer:
    """Times the named phases of each step. On CUDA it records events on the stream, so nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.seconds: list[dict[str, float]] = [defaultdict(float)]
        """The seconds of each phase, for each step since the last row. On CUDA, `read` adds those of `events`."""
        self.events: list[tuple[dict[str, float], str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body."""
        if self.on_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((self.seconds[-1], name, start, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds[-1][name] += time.perf_counter() - started

    def timed(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the same items, and time how long each one takes to produce."""
        iterator = iter(items)
        while True:
            with self.phase(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def end_step(self) -> None:
        """Count the next phases to another step."""
        self.seconds.append(defaultdict(float))

    def read(self) -> list[dict[str, float]]:
        """Return the seconds per phase of each step completed since the last call. On CUDA it waits for the device."""
        for step, name, start, end in self.events:
            end.synchronize()
            step[name] += start.elapsed_time(end) / 1000  # milliseconds
        self.events.clear()
        steps, self.seconds = self.seconds[:-1], [defaultdict(float)]
        return steps


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: device memory on CUDA, otherwise host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_host_memory()


class Work(NamedTuple):
    """A rank's mean seconds per step in each phase of a row.

    Data and forward are scaled to the average number of micro-batches, as a rank that has one more than others is not slow.
    """

    data_s: float
    forward_s: float
    optimizer_s: float
    backward_s: float
    """Computation, the exchange of gradients, and the wait for slower ranks."""
    least_backward_s: float
    """The least `backward_s` of a single step."""


class TrainMetrics:
    """Counts images, losses and seconds of training, since the last row and since the start of the epoch.

    A resume needs only the part in `progress`: `flush` adds the sums over all ranks there.
    """

    def __init__(
        self, world: World, progress: Progress, train: TrainLoader, *, finite_losses: bool, finite_gradients: bool
    ) -> None:
        """`finite_losses`, `finite_gradients`: let `flush` raise if a loss or gradient is not finite."""
        self.world = world
        self.progress = progress
        self.finite_losses, self.finite_gradients = finite_losses, finite_gradients
        self.train = train
        self.hashes = sample_hashes(len(train.split.images))
        self.counter = ImageCounter(world.device, self.hashes.to(world.device))
        self.timer = PhaseTimer(world.device)
        self.norms: list[Tensor] = []
        self.last_norm = 0.0
        self.epoch, self.window = Span(), Span()
        self.epoch_s = 0.0

    def start_epoch(self) -> None:
        """Start the timers of the epoch and of its first row."""
        self.epoch, self.window = Span(), Span()

    def start_window(self) -> None:
        """Start the timer of the next row."""
        self.window = Span()

    def add_step(self, grad_norm: Tensor, batch: StepBatch) -> None:
        """Count a completed step. Does not wait for the device."""
        self.norms.append(grad_norm)
        self.timer.end_step()
        for span in (self.epoch, self.window):
            span.steps += 1
            span.images += batch.num_images
            span.passes += len(batch) or 1
            span.micro_batches += batch.num_micro_batches

    def flush(self) -> None:
        """Add the counts of all ranks since the last call to `progress.window`.

        Waits for the device; every rank must call it. Raises `Failed` if a loss or gradient is not finite.
        """
        if self.norms:
            norms = torch.stack(self.norms).tolist()
            self.last_norm = norms[-1]
            self._check_gradients(norms)
            self.norms.clear()
        new, own = self.counter.read()
        self._check_losses(new, own)
        self.counter.clear()
        self.progress.window += new

    def are_finite(self, counts: Totals) -> bool:
        """True if `flush` would find no loss in `counts`, and no gradient, that is not finite. Waits for the device."""
        norms = [norm.item() for norm in self.norms] if self.finite_gradients else []
        return not (self.finite_losses and counts.nonfinite) and all(map(math.isfinite, norms))

    def window_row(self) -> tuple[dict[str, float], Work]:
        """Return the scalars of the steps since the last row (or the start of the epoch), and this rank's times in them.

        Waits for the device; every rank must call it. Raises `Failed` as `flush` does.
        """
        self.flush()
        progress, totals = self.progress, self.progress.window
        progress.train += totals
        progress.window = Totals()
        seconds, steps = self.window.seconds, self.window.steps
        times = self.timer.read()
        data, forward, backward, optimizer = (sum(step[name] for step in times) / steps for name in PHASES)
        scale = self.window.micro_batches / self.world.world_size / self.window.passes
        work = Work(data * scale, forward * scale, optimizer, backward, min(step["backward"] for step in times))
        images_per_s = self.window.images / seconds
        return {
            "train/loss": totals.mean_loss,
            "train/batch_accuracy": totals.accuracy,
            "train/grad_norm": self.last_norm,
            "train/images_per_s": images_per_s,
            "train/rank_images_per_s": images_per_s / self.world.world_size,
            "time/step_s": seconds / steps,
            "time/data_s": data,
            "time/forward_s": forward,
            "time/backward_s": backward,
            "time/optimizer_s": optimizer,
            "run/peak_memory_mb": peak_memory(self.world.device) / 1e6,
        }, work

    def stop_epoch(self) -> None:
        """Stop the epoch's timer and flush. Call it after the last step of the epoch."""
        self.epoch_s = self.epoch.seconds
        self.flush()
        self.timer.read()

    def epoch_row(self, *, is_whole: bool) -> dict[str, float | str]:
        """Return the scalars of the epoch. Raises `Failed` if a complete epoch did not count each of its images once."""
        totals, epoch = self.progress.totals, self.progress.epoch
        if is_whole:
            expected = int(self.hashes[self.train.sample_ids(epoch).cpu()].sum())
            if (totals.images, totals.ledger) != (len(self.train), expected):
                raise Failed(
                    f"the sample ledger of epoch {epoch + 1} is wrong: trained on {totals.images} images with hash sum "
                    f"{totals.ledger:016x}; expected each of {len(self.train)} images once, hash sum {expected:016x}"
                )
        row: dict[str, float | str] = {"train/epoch": epoch + 1, "train/epoch_loss": totals.mean_loss}
        row |= {"ledger/images": totals.images, "ledger/sum": f"{totals.ledger:016x}"}
        if self.epoch.images:  # none if this start only had the evaluation left to do
            row["train/epoch_images_per_s"] = self.epoch.images / self.epoch_s
        return row | {"time/epoch_s": self.epoch_s}

    def _check_gradients(self, norms: list[float]) -> None:
        """Raise `Failed` if one of the gradient norms of the last steps is not finite."""
        bad = [i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        if bad and self.finite_gradients:
            first = self.progress.step - len(norms) + 1
            raise Failed(
                f"the gradient of step {first + bad[0]} is not finite ({norms[bad[0]]}); {len(bad)} of the gradients of "
                f"steps {first} to {self.progress.step} are not finite"
            )

    def _check_losses(self, new: Totals, own: Totals) -> None:
        """Raise `Failed` if the loss of one of the last images is not finite."""
        if new.nonfinite and self.finite_losses:
            where = self.world.gather([own.nonfinite])
            ranks = ", ".join(f"{count} on rank {rank}" for rank, (count,) in enumerate(where) if count)
            raise Failed(
                f"the loss of {new.nonfinite} images is not finite, found at step {self.progress.step} ({ranks})"
            )


def epoch_line(scalars: Scalars, note: str) -> str:
    """Return the log line of an epoch: loss, accuracies, speed and the fingerprint of the weights."""
    values = {tag: float(value) for tag, value in scalars.items() if not isinstance(value, str)}
    parts = [f"loss {values['train/epoch_loss']:.4f}"]
    names = {"train/accuracy": "train", "val/accuracy": "val", "test/accuracy": "test"}
    parts += [f"{name} accuracy {100 * values[tag]:.2f}%" for tag, name in names.items() if tag in values]
    seconds = f"{values['time/epoch_s']:.1f} s"
    if "time/evaluation_s" in values:
        seconds += f" + {values['time/evaluation_s']:.1f} s evaluation"
    if "train/epoch_images_per_s" in values:
        parts.append(f"{values['train/epoch_images_per_s']:.0f} images/s")
    parts += [seconds, f"fingerprint {scalars['fingerprint']}"]
    return f"Epoch {values['train/epoch']:.0f}{note}: {', '.join(parts)}"
