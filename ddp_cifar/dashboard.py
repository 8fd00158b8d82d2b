"""What TensorBoard shows of a run beside its scalars: pictures, texts, and the order of the first page.

Each function puts something into a SummaryWriter, on rank 0, where `Tracker.show` calls it. docs/dashboard.md lists the tags.
"""

import copy
import time
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_cifar.config import ELSEWHERE, Config, as_typed, fields, flatten, to_dict, to_yaml
from ddp_cifar.data.augment import augment, normalize
from ddp_cifar.data.dataset import Split
from ddp_cifar.data.loader import TrainLoader
from ddp_cifar.inference import Quality
from ddp_cifar.run_dir import Start

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

GRID_IMAGES = 32
"""Of a picture of training images, and of wrong ones ..."""
GRID_COLUMNS = 8
CELL = 112
"""... each of which is so many pixels wide."""
MOST_CLASSES, MOST_NAMES = 20, 60
"""So many classes have a curve of precision and recall each, and numbers in the confusion matrix; and names there."""
PROJECTED_IMAGES, SPRITE = 1000, 64
"""Points of the projector, and the most pixels that their pictures are wide."""
COLUMNS = ("model.name", "optim.lr", "seed")
"""Settings that the HPARAMS tab shows at first, with those of a sweep."""

LAYOUT = {
    "1. Does it learn?": {
        "loss of an epoch": ["train/epoch_loss", "val/loss", "test/loss"],
        "accuracy": ["train/accuracy", "val/accuracy", "test/accuracy"],
        "loss of the last steps": ["train/loss"],
    },
    "2. Is it healthy?": {
        "learning rate, and Adam's effective one": ["train/lr", "train/effective_lr"],
        "norm of the gradient": ["train/grad_norm"],
        "norm of the weights": ["train/weight_norm"],
    },
    "3. Is it fast?": {
        "images a second, of all ranks and of one": ["train/images_per_s", "train/rank_images_per_s"],
        "seconds of a step": ["time/data_s", "time/forward_s", "time/backward_s", "time/optimizer_s"],
        "a step's own work, slowest and fastest rank, seconds": ["time/slowest_rank_s", "time/fastest_rank_s"],
        "peak memory, MB": ["run/peak_memory_mb"],
    },
    "4. What did it go through?": {
        "goodput": ["run/goodput"],
        "restarts, and steps lost by them": ["run/restarts", "run/steps_lost"],
    },
}
"""The page of custom scalars: what a chart is called, and its tags."""


# -- at a start


def add_layout(board: "SummaryWriter") -> None:
    """The page of custom scalars."""
    board.add_custom_scalars(
        {
            page: {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in charts.items()}
            for page, charts in LAYOUT.items()
        }
    )


def add_config(board: "SummaryWriter", config: Config, step: int) -> None:
    """The resolved config as text."""
    board.add_text("config", f"```yaml\n{to_yaml(config)}```", step)


def add_environment(
    board: "SummaryWriter", versions: Mapping[str, str], places: Sequence[tuple[str, str]], step: int
) -> None:
    """Versions, and each rank's host and device."""
    ranks = [(str(rank), host, device) for rank, (host, device) in enumerate(places)]
    text = [_markdown(("", "version"), versions.items()), _markdown(("rank", "host", "device"), ranks)]
    board.add_text("environment", "\n\n".join(text), step)


def add_history(board: "SummaryWriter", starts: Sequence[Start], ended: str, step: int) -> None:
    """A row for each start of the run, and what became of it; of the last one, `ended`."""
    ends = [start.found or "-" for start in starts[1:]] + [ended]
    rows = [
        (
            str(number),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.time)),
            str(start.step),
            str(start.world_size),
            "crashed" if end == "running" and number < len(starts) else end,
            str(start.steps_lost),
        )
        for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1)
    ]
    head = ("start", "time", "from step", "ranks", "became of it", "steps lost so far")
    board.add_text("history", _markdown(head, rows), step)


def add_hparams(board: "SummaryWriter", config: Config, split: str) -> None:
    """The run's line in the HPARAMS tab, with its last results on `split`: within its own event file, no folder besides.

    It lists all settings, as TensorBoard takes any one run's list for all of them. A cell is empty where the value is null.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    flat = flatten(to_dict(config))
    types = {key: annotation for key, annotation, *_ in fields() if not key.startswith(ELSEWHERE)}
    values = {key: _as_hparam(flat[key]) for key in types}
    tags = (f"{split}/accuracy", f"{split}/loss", "train/epoch_loss", "train/epoch_images_per_s")
    # torch takes the types of the list's settings from values
    samples = {key: _sample(types[key]) if value is None else value for key, value in values.items()}
    listed, _, _ = hparams(samples, dict.fromkeys(tags, 0.0))
    list_data = listed.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(list_data.content)
    for setting in content.experiment.hparam_infos:
        setting.differs = setting.name in (*COLUMNS, *config.tracking.hparams)  # which TensorBoard shows first
    list_data.content = content.SerializeToString()
    _, line, _ = hparams({key: value for key, value in values.items() if value is not None}, {})
    for summary in (listed, line):
        board._get_file_writer().add_summary(summary)


def _as_hparam(value: object) -> float | str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number or value is None else as_typed(value)  # type: ignore[return-value]


def _sample(annotation: Any) -> float | str:
    """A value of a setting's type, as `_as_hparam` has it."""
    return 0.0 if {int, float} & set(typing.get_args(annotation)) else ""


def add_training_images(board: "SummaryWriter", loader: TrainLoader, classes: Sequence[str]) -> None:
    """Some of the run's first images, as they are trained on: cropped and mirrored."""
    split = loader.split
    first = next(loader.sampler.steps(0, 0, split.images.device)).micro_batches[0].indices[:GRID_IMAGES]
    ids = split.sample_ids[first]
    images = augment(split.images[ids], loader.augmentations(0)[ids])
    names = [(name,) for name in plain([classes[label] for label in split.labels[first].tolist()])]
    board.add_image("train/images", captioned_grid(images, names), 0, dataformats="HWC")


def add_graph(board: "SummaryWriter", model: nn.Module, image_shape: torch.Size) -> None:
    """The network's graph, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about torch's own modules
        board.add_graph(copy.deepcopy(model).cpu().eval(), torch.zeros(1, *image_shape))


# -- at an evaluation


def add_confusion(
    board: "SummaryWriter", name: str, split: Split, logits: Tensor, classes: Sequence[str], step: int
) -> None:
    """The confusion matrix of the split `name`, by its (N, classes) logits."""
    figure = confusion_figure(Quality.of(logits.float().cpu(), split.labels.cpu()), classes)
    board.add_image(f"{name}/confusion", _pixels(figure), step, dataformats="HWC")


def add_wrong_images(
    board: "SummaryWriter", name: str, split: Split, logits: Tensor, classes: Sequence[str], step: int
) -> None:
    """The images of the split `name` that the network is most sure of, and wrong about, by its (N, classes) logits."""
    labels, classes = split.labels.cpu(), plain(classes)
    confidence, predicted = logits.float().cpu().softmax(1).max(1)
    sure = confidence.where(predicted != labels, -1.0).argsort(descending=True, stable=True)
    wrong = sure[: min(GRID_IMAGES, int((predicted != labels).sum()))]
    if not len(wrong):
        return
    images = split.images[split.sample_ids[wrong.to(split.sample_ids.device)]]
    captions = [
        (f"{classes[label]}, not", f"{classes[guess]} ({100 * sureness:.0f} %)")
        for label, guess, sureness in zip(
            labels[wrong].tolist(), predicted[wrong].tolist(), confidence[wrong].tolist(), strict=True
        )
    ]
    board.add_image(f"{name}/wrong", captioned_grid(images, captions), step, dataformats="HWC")


def add_curves(
    board: "SummaryWriter", name: str, split: Split, logits: Tensor, classes: Sequence[str], step: int
) -> None:
    """A curve of precision and recall for each class of the split `name`, by its (N, classes) logits."""
    shares, labels = logits.float().cpu().softmax(1), split.labels.cpu()
    for label, class_name in enumerate(plain(classes[:MOST_CLASSES])):
        board.add_pr_curve(f"{name}/pr/{class_name}", (labels == label).numpy(), shares[:, label].numpy(), step)


def add_projector(
    board: "SummaryWriter", split: Split, model: nn.Module, classes: Sequence[str], batch_size: int, step: int
) -> None:
    """What goes into the network's last linear layer (or, without one, its logits) for the split's first images."""
    device = next(model.parameters()).device
    images = split.images[split.sample_ids[:PROJECTED_IMAGES]]
    inputs: list[Tensor] = []
    features: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.inference_mode():
            for some in images.split(batch_size):
                inputs.clear()
                logits = model.forward(normalize(some.to(device)))  # not the compiled one, which takes no hooks
                features.append((inputs[-1] if inputs else logits).flatten(1).float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
    names = plain([classes[label] for label in split.labels[:PROJECTED_IMAGES].tolist()])
    sprites = F.interpolate(images.cpu().float() / 255, size=min(split.image_size, SPRITE))
    board.add_embedding(torch.cat(features), names, sprites, step, "features")


# -- at a step


def add_histograms(board: "SummaryWriter", model: nn.Module, step: int) -> None:
    """Of each parameter, and of its gradient in the step just done."""
    for name, parameter in model.named_parameters():
        for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
            if values is not None and (finite := values.float()[values.isfinite()]).numel():
                board.add_histogram(f"{kind}/{name}", finite.cpu(), step)


# -- drawing


def plain(classes: Sequence[str]) -> list[str]:
    """Names as text of one line each, which the names of folders need not be."""
    return [" ".join(name.encode("utf-8", "replace").decode().split()) or "?" for name in classes]


def captioned_grid(images: Tensor, captions: Sequence[Sequence[str]]) -> np.ndarray[Any, Any]:
    """(N, 3, H, W) uint8 images with a few lines under each -> (height, width, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont  # here, as it takes a while

    font, line_height = ImageFont.load_default(13), 16
    columns, num_lines = min(GRID_COLUMNS, len(images)), max(map(len, captions))
    pitch_x, pitch_y = CELL + 8, CELL + line_height * num_lines + 8
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * pitch_x, rows * pitch_y), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images.permute(0, 2, 3, 1).cpu().numpy(), captions, strict=True)):
        left, top = i % columns * pitch_x + 4, i // columns * pitch_y + 4
        sheet.paste(Image.fromarray(image).resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
        for j, line in enumerate(lines):
            while draw.textlength(line, font) > CELL:
                line = line[:-1]
            draw.text((left, top + CELL + j * line_height), line, fill="black", font=font)
    return np.asarray(sheet)


def confusion_figure(quality: Quality, classes: Sequence[str]) -> "Figure":
    """The confusion matrix, each row as shares of its true class."""
    from matplotlib.figure import Figure  # here, as it takes a while; and without pyplot, which wants a display

    shares = quality.confusion / quality.confusion.sum(1, keepdim=True).clamp(min=1)
    size = min(20.0, max(4.0, 1.5 + 0.5 * len(classes)))
    figure = Figure(figsize=(size + 1, size), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class")
    if len(classes) <= MOST_NAMES:
        names = plain(classes)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= MOST_CLASSES:
        for i, row in enumerate(quality.confusion.tolist()):
            for j, count in enumerate(row):
                if count:
                    color = "white" if shares[i, j] > 0.5 else "black"
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color=color)
    return figure


def _pixels(figure: "Figure") -> np.ndarray[Any, Any]:
    """(height, width, 3) uint8"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
