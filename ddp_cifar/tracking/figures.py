"""Pictures for TensorBoard, as arrays of pixels and matplotlib figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ddp_cifar.tracking.quality import Quality
from ddp_cifar.tracking.rank_times import RankTimes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


GRID_COLUMNS = 8

CELL = 112
"""The width and height of an image in a grid, in pixels."""

MAX_CLASSES = 20
"""The most classes for which there are precision-recall curves, and numbers in the confusion matrix."""

MAX_NAMES = 60
"""The most classes for which the confusion matrix has names."""

MAX_HOSTS = 32
"""The most ranks for which the picture of their times names the hosts."""

PANELS = ("data", "forward", "update", "backward, with the wait for slower ranks")
"""The panels of the picture of the ranks' times."""


def plain(classes: Sequence[str]) -> list[str]:
    """Return each name as one line of valid text. Class names come from folders, whose names can be any bytes."""
    return [" ".join(name.encode("utf-8", "replace").decode().split()) or "?" for name in classes]


def as_rgb(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 3, H, W): grayscale as color; the first three of more channels."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def captioned_grid(images: Tensor, captions: Sequence[Sequence[str]]) -> np.ndarray[Any, Any]:
    """(N, C, H, W) uint8 images, and lines of text for each -> (height, width, 3) uint8 grid with captions."""
    from PIL import Image, ImageDraw, ImageFont  # imported here, as the import is slow

    font, line_height = ImageFont.load_default(13), 16
    columns, num_lines = min(GRID_COLUMNS, len(images)), max(map(len, captions))
    pitch_x, pitch_y = CELL + 8, CELL + line_height * num_lines + 8
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * pitch_x, rows * pitch_y), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(as_rgb(images).permute(0, 2, 3, 1).cpu().numpy(), captions, strict=True)):
        left, top = i % columns * pitch_x + 4, i // columns * pitch_y + 4
        picture = Image.fromarray(image)
        scale = CELL / max(picture.size)
        size = round(picture.width * scale), round(picture.height * scale)
        sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (left, top))
        for j, line in enumerate(lines):
            while draw.textlength(line, font) > CELL:
                line = line[:-1]
            draw.text((left, top + CELL + j * line_height), line, fill="black", font=font)
    return np.asarray(sheet)


def confusion_figure(quality: Quality, classes: Sequence[str]) -> "Figure":
    """Return the confusion matrix, colored by the share of the true class."""
    from matplotlib.figure import Figure  # imported here, as the import is slow; not pyplot, which needs a display

    shares = quality.confusion / quality.confusion.sum(1, keepdim=True).clamp(min=1)
    size = min(20.0, max(4.0, 1.5 + 0.5 * len(classes)))
    figure = Figure(figsize=(size + 1, size), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class")
    if len(classes) <= MAX_NAMES:
        names = plain(classes)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= MAX_CLASSES:
        for i, row in enumerate(quality.confusion.tolist()):
            for j, count in enumerate(row):
                if count:
                    color = "white" if shares[i, j] > 0.5 else "black"
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color=color)
    return figure


def rank_times_figure(times: RankTimes, hosts: Sequence[str]) -> "Figure":
    """Return a heat map for each phase: ranks downwards, rows of scalars to the right.

    `hosts` has the host of each rank, or nothing. The color scale ends at three times the median, so that a slow rank is dark
    and the others are light.
    """
    from matplotlib.figure import Figure  # imported here, as the import is slow; not pyplot, which needs a display

    num_ranks, steps = times.num_ranks, list(times.steps)
    height = min(5.0, max(1.5, 0.2 * num_ranks))
    figure = Figure(figsize=(14, 2 * height + 1.5), dpi=100, layout="constrained")
    rows = figure.subplots(2, 2, sharex=True, sharey=True)
    bottom = len(times.columns[-1]) * times.ranks_per_band - 0.5
    ticks = range(0, len(steps), -(-len(steps) // 6))
    for axes, title, values in zip(rows.flat, PANELS, times.panels(), strict=True):
        end = max(1.0, 3 * float(np.median(values)))
        extent = (-0.5, len(steps) - 0.5, bottom, -0.5)
        picture = axes.imshow(
            values, cmap="Blues", vmin=0, vmax=end, aspect="auto", interpolation="nearest", extent=extent
        )
        figure.colorbar(picture, label="ms per step", extend="max")
        axes.set_title(title)
        axes.set_xticks(ticks, [str(steps[tick]) for tick in ticks])
    for axes in rows[1]:
        axes.set_xlabel("step")
    for axes in rows[:, 0]:
        if num_ranks <= MAX_HOSTS:
            names = [f"rank {rank} ({host})" for rank, host in enumerate(hosts)] or [
                f"rank {i}" for i in range(num_ranks)
            ]
            axes.set_yticks(range(num_ranks), plain(names), parse_math=False)
        else:
            axes.set_ylabel("rank" if times.ranks_per_band == 1 else f"rank (slowest of {times.ranks_per_band})")
    return figure


def pixels(figure: "Figure") -> np.ndarray[Any, Any]:
    """A matplotlib figure -> (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
