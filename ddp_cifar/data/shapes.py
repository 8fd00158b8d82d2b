"""The generated data set: ten classes of shapes in 32 x 32 color images. No download; a seed determines all images.

The class is the shape; its color, position, size and rotation are random. Background, clutter and noise make the task hard
for a linear model.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.data.source import Source
from ddp_cifar.distributed.world import World
from ddp_cifar.seeding import generator

SIZE = 32
CHUNK = 1000  # images whose random numbers are drawn at once, which limits memory
BLOCK = 100  # images painted at once
# Radians in both directions: no single pixel reveals the class, and a minute on two cores is enough to learn.
MAX_ANGLE = 0.4


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.2


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.8


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * math.cos(math.pi / 6) + y * 0.5, -y) - 0.5


def _plus(x: Tensor, y: Tensor) -> Tensor:
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - 1.0, short - 0.28)


def _star(x: Tensor, y: Tensor) -> Tensor:
    ripple = torch.cos(5 * torch.atan2(x, y))
    return torch.hypot(x, y) - (0.68 + 0.36 * ripple)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.75 - torch.hypot(x - 0.5, y))


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() - 1.05, y.abs() - 0.3)


def _hourglass(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() - y.abs() * 0.9 - 0.05, y.abs() - 0.85)


def _two_dots(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x.abs() - 0.6, y) - 0.4


# Approximate signed distance of each point to the shape, negative inside. Coordinates are in units of the shape's size.
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "plus": _plus,
    "star": _star,
    "crescent": _crescent,
    "bar": _bar,
    "hourglass": _hourglass,
    "two_dots": _two_dots,
}


class Shapes(Source):
    """Generated images: config.shapes.train_images and test_images. Class counts differ by at most one."""

    image_size = SIZE

    def read(self, world: World) -> DataSet:
        """Generate all images; the ranks share the work."""
        shapes = self.config.shapes
        same = world.gather([shapes.train_images, shapes.test_images, shapes.seed])
        shared = world if same.count(same[0]) == len(same) else None  # else the caller finds that the data differ
        train = self._draw_split(shapes.train_images, generator("shapes train", shapes.seed), shared)
        test = self._draw_split(shapes.test_images, generator("shapes test", shapes.seed), shared)
        return DataSet(train, test, tuple(FORMS))

    def metadata(self, world: World) -> DataSet:
        """Return the shapes of the tensors, without images."""
        counts = self.config.shapes.train_images, self.config.shapes.test_images
        train, test = (Split.metadata_only(count, self.config.image_shape) for count in counts)
        return DataSet(train, test, tuple(FORMS))

    def _draw_split(self, num_images: int, random: torch.Generator, shared: World | None) -> Split:
        """Draw a split; with `shared`, its ranks share the work."""
        labels = torch.arange(num_images) % len(FORMS)
        labels = labels[torch.randperm(num_images, generator=random)]
        rank, world_size = (shared.rank, shared.world_size) if shared else (0, 1)
        turns = itertools.cycle(range(world_size))
        images = torch.cat([_draw(chunk, random, lambda: next(turns) == rank) for chunk in labels.split(CHUNK)])
        if shared:
            shared.sum_on_cpu(images)
        return Split.of(self.to_channels(images), labels)


def _draw(labels: Tensor, random: torch.Generator, is_mine: Callable[[], bool]) -> Tensor:
    """(B,) labels -> (B, 3, 32, 32) uint8, in blocks small enough for the processor's cache.

    A block for which `is_mine()` is False is left at 0. The random numbers are drawn for all.
    """
    drawn: list[Tensor] = []

    def paint(block: slice) -> Tensor:
        count = itertools.count()

        def rand(*shape: int) -> Tensor:
            """Return this block's part of the next random numbers; the first call draws them for all blocks."""
            if (number := next(count)) == len(drawn):
                drawn.append(torch.rand(len(labels), *shape, generator=random, dtype=torch.float64))
            return drawn[number][block]

        return _paint(labels[block], rand)

    paint(slice(0, 0))
    images = torch.zeros(len(labels), 3, SIZE, SIZE, dtype=torch.uint8)
    for first in range(0, len(labels), BLOCK):
        if is_mine():
            images[first : first + BLOCK] = paint(slice(first, first + BLOCK))
    return images


def _paint(labels: Tensor, rand: Callable[..., Tensor]) -> Tensor:
    """(B,) labels -> (B, 3, 32, 32) uint8; `rand(*shape)` returns (B, *shape) random numbers from 0 to 1."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * rand(*shape, 1, 1)

    axis = torch.arange(SIZE, dtype=torch.float64) - (SIZE - 1) / 2
    y, x = axis.view(1, SIZE, 1), axis.view(1, 1, SIZE)

    def local(size: Tensor, spread: float) -> tuple[Tensor, Tensor]:
        """Return coordinates (n, 32, 32) with a random position and rotation per image, scaled by `size`."""
        angle = uniform(-MAX_ANGLE, MAX_ANGLE)
        dx, dy = x - uniform(-spread, spread), y - uniform(-spread, spread)
        return (dx * angle.cos() + dy * angle.sin()) / size, (dy * angle.cos() - dx * angle.sin()) / size

    def cover(distance: Tensor, size: Tensor) -> Tensor:
        """Return the fraction of each pixel that a shape covers, (n, 1, 32, 32); its edge is one pixel wide."""
        return (0.5 - distance * size).clamp(0, 1).unsqueeze(1)

    # Background: a color gradient across the image
    start, end = uniform(0, 1, 3), uniform(0, 1, 3)
    across, _ = local(torch.tensor(SIZE / 2.0), 0)
    canvas = start + (end - start) * (across.unsqueeze(1) + 1) / 2

    # Clutter: short lines and dots, smaller than any shape
    for _ in range(3):
        size = uniform(1.5, 3.0)
        u, v = local(size, 14)
        bit = torch.where(uniform(0, 1) < 0.5, torch.hypot(u, v) - 0.7, torch.maximum(u.abs() - 1.2, v.abs() - 0.35))
        canvas = canvas.lerp(uniform(0, 1, 3).expand_as(canvas), cover(bit, size))

    size = uniform(7.5, 11)
    u, v = local(size, 3.5)
    distance = torch.empty_like(u)
    for label, form in enumerate(FORMS.values()):
        mine = labels == label
        distance[mine] = form(u[mine], v[mine])
    # A color that differs from the mean of the image: darker if the mean is bright, else brighter
    middle = canvas.mean(dim=(2, 3), keepdim=True)
    color = (middle + uniform(0.3, 0.55, 3) * torch.where(middle > 0.5, -1.0, 1.0)).clamp(0, 1)
    canvas = canvas.lerp(color.expand_as(canvas), cover(distance, size))

    noise = rand(3, SIZE, SIZE) - 0.5
    canvas = canvas + noise * uniform(0.05, 0.2, 1)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
