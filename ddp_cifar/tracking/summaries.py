"""Functions for `Dashboard` that draw a picture, or add a text, curves or a page to TensorBoard's SummaryWriter.

docs/dashboard.md lists the tags.
"""

import copy
import time
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_cifar.config import Config, as_typed, fields, flatten, keys_with_role, to_dict, to_yaml
from ddp_cifar.data.dataset import Split
from ddp_cifar.data.loader import TrainLoader
from ddp_cifar.data.normalization import Normalization
from ddp_cifar.run.run_dir import Start
from ddp_cifar.tracking.base import Picture
from ddp_cifar.tracking.figures import (
    MAX_CLASSES,
    as_rgb,
    captioned_grid,
    confusion_figure,
    pixels,
    plain,
    rank_times_figure,
)
from ddp_cifar.tracking.quality import Quality
from ddp_cifar.tracking.rank_times import RankTimes

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

GRID_IMAGES = 32
"""The number of images in a picture of training images or of misclassified images."""

PROJECTED_IMAGES, SPRITE = 1000, 64
"""The number of points in the projector, and the largest width of their pictures in pixels."""

COLUMNS = ("model.name", "optim.lr", "seed")
"""Settings that the HPARAMS tab shows by default, in addition to those of a sweep."""

LAYOUT = {
    "1. Learning": {
        "loss per epoch": ["train/epoch_loss", "val/loss", "test/loss"],
        "accuracy": ["train/accuracy", "val/accuracy", "test/accuracy"],
        "training loss since the last row": ["train/loss"],
    },
    "2. Optimization": {
        "learning rate, and Adam's effective learning rate": ["train/lr", "train/effective_lr"],
        "gradient norm": ["train/grad_norm"],
        "weight norm": ["train/weight_norm"],
    },
    "3. Speed": {
        "images per second, total and per rank": ["train/images_per_s", "train/rank_images_per_s"],
        "seconds per step by phase": ["time/data_s", "time/forward_s", "time/backward_s", "time/optimizer_s"],
        "seconds of local work per step, slowest and fastest rank": ["time/slowest_rank_s", "time/fastest_rank_s"],
        "peak memory, MB, rank 0 and largest": ["run/peak_memory_mb", "run/max_peak_memory_mb"],
    },
    "4. Restarts": {
        "goodput": ["run/goodput"],
        "restarts and lost steps": ["run/restarts", "run/steps_lost"],
        "downtime, s": ["run/downtime_s"],
    },
}
"""The page of custom scalars: the title and tags of each chart."""


def add_layout(board: "SummaryWriter") -> None:
    """Add the page of custom scalars."""
    board.add_custom_scalars(
        {
            page: {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in charts.items()}
            for page, charts in LAYOUT.items()
        }
    )


def add_config(board: "SummaryWriter", config: Config, step: int) -> None:
    """Add the resolved config as text."""
    board.add_text("config", f"```yaml\n{to_yaml(config)}```", step)


def add_environment(
    board: "SummaryWriter", versions: Mapping[str, str], places: Sequence[tuple[str, str]], step: int
) -> None:
    """Add the versions, and the host and device of each rank."""
    ranks = [(str(rank), host, device) for rank, (host, device) in enumerate(places)]
    text = [_markdown(("", "version"), versions.items()), _markdown(("rank", "host", "device"), ranks)]
    board.add_text("environment", "\n\n".join(text), step)


def add_history(board: "SummaryWriter", starts: Sequence[Start], outcome: str, step: int) -> None:
    """Add a table with a row for each start of the run and its outcome; `outcome` is that of the last start."""
    ends = [start.found or "-" for start in starts[1:]] + [outcome]
    rows = [
        (
            str(number),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.time)),
            str(start.step),
            str(start.world_size),
            "crashed" if end == "running" and number < len(starts) else end,
            str(start.steps_lost),
            f"{start.downtime_s:.0f}",
        )
        for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1)
    ]
    head = ("start", "time", "from step", "ranks", "outcome", "steps lost so far", "downtime so far, s")
    board.add_text("history", _markdown(head, rows), step)


def add_hparams(board: "SummaryWriter", config: Config, split: str) -> None:
    """Add the run's row to the HPARAMS tab, with its last results on `split`. It is written to the run's own event file.

    The row lists all settings, as TensorBoard uses the list of one run for all runs. A cell is empty if the value is null.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    flat = flatten(to_dict(config))
    types = {key: annotation for key, annotation, *_ in fields() if key not in keys_with_role("non_result")}
    values = {key: _as_hparam(flat[key], types[key]) for key in types}
    tags = (f"{split}/accuracy", f"{split}/loss", "train/epoch_loss", "train/epoch_images_per_s")
    # torch derives the type of each setting from its value
    samples = {key: _sample(types[key]) if value is None else value for key, value in values.items()}
    listed, _, _ = hparams(samples, dict.fromkeys(tags, 0.0))
    list_data = listed.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(list_data.content)
    for setting in content.experiment.hparam_infos:
        setting.differs = setting.name in (*COLUMNS, *config.tracking.hparams)  # TensorBoard shows these by default
    list_data.content = content.SerializeToString()
    _, line, _ = hparams({key: value for key, value in values.items() if value is not None}, {})
    for summary in (listed, line):
        board._get_file_writer().add_summary(summary)


def _as_hparam(value: object, annotation: Any) -> float | str | None:
    """Return a number or a string; a string in all runs if the key may have values of several types."""
    if annotation is Any:
        return None if value is None else as_typed(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number or value is None else as_typed(value)  # type: ignore[return-value]


def _sample(annotation: Any) -> float | str:
    """Return a value of the type that `_as_hparam` returns for a setting."""
    return 0.0 if {int, float} & set(typing.get_args(annotation)) else ""


def draw_training_images(loader: TrainLoader, classes: Sequence[str]) -> Picture:
    """Draw some of the first training images after augmentation, as the model sees them."""
    batch = next(iter(next(loader.steps(0))))
    images = loader.normalization.to_pixels(batch.images[:GRID_IMAGES])
    names = [(name,) for name in plain([classes[label] for label in batch.labels[:GRID_IMAGES].tolist()])]
    return captioned_grid(images, names)


def add_graph(board: "SummaryWriter", model: nn.Module, image_shape: Sequence[int]) -> None:
    """Add the model's graph, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about torch's own modules
        board.add_graph(copy.deepcopy(model).cpu().eval(), torch.zeros(1, *image_shape))


def draw_confusion(split: Split, logits: Tensor, classes: Sequence[str]) -> Picture:
    """Draw the confusion matrix of a split, from its (N, classes) logits."""
    return pixels(confusion_figure(Quality.of(logits.float().cpu(), split.labels.cpu()), classes))


def draw_wrong_images(split: Split, logits: Tensor, classes: Sequence[str]) -> Picture | None:
    """Draw the misclassified images of a split with the highest confidence, from its (N, classes) logits; None without any."""
    labels, classes = split.labels.cpu(), plain(classes)
    confidence, predicted = logits.float().cpu().softmax(1).max(1)
    ranked = confidence.where(predicted != labels, -1.0).argsort(descending=True, stable=True)
    wrong = ranked[: min(GRID_IMAGES, int((predicted != labels).sum()))]
    if not len(wrong):
        return None
    images = split.images[split.sample_ids[wrong.to(split.sample_ids.device)]]
    captions = [
        (f"{classes[label]}, not", f"{classes[guess]} ({100 * share:.0f} %)")
        for label, guess, share in zip(
            labels[wrong].tolist(), predicted[wrong].tolist(), confidence[wrong].tolist(), strict=True
        )
    ]
    return captioned_grid(images, captions)


def add_curves(
    board: "SummaryWriter", name: str, split: Split, logits: Tensor, classes: Sequence[str], step: int
) -> None:
    """Add a precision-recall curve for each class of the split `name`, from its (N, classes) logits."""
    shares, labels = logits.float().cpu().softmax(1), split.labels.cpu()
    for label, class_name in enumerate(plain(classes[:MAX_CLASSES])):
        board.add_pr_curve(f"{name}/pr/{class_name}", (labels == label).numpy(), shares[:, label].numpy(), step)


def draw_rank_times(times: RankTimes, hosts: Sequence[str]) -> Picture:
    """Draw the times of each rank in the last rows. `hosts` has the host of each rank, or nothing."""
    return pixels(rank_times_figure(times, hosts))


def add_projector(
    board: "SummaryWriter",
    split: Split,
    normalization: Normalization,
    model: nn.Module,
    classes: Sequence[str],
    batch_size: int,
    step: int,
) -> None:
    """Add the inputs of the model's last linear layer (or its logits, without one) for the split's first images."""
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
                normalized = normalization.normalize(some.to(device))
                logits = model.forward(normalized)  # not the compiled model: it runs no hooks
                features.append((inputs[-1] if inputs else logits).flatten(1).float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
    names = plain([classes[label] for label in split.labels[:PROJECTED_IMAGES].tolist()])
    sprites = F.interpolate(as_rgb(images.cpu()).float() / 255, size=min(*split.image_shape[1:], SPRITE))
    board.add_embedding(torch.cat(features), names, sprites, step, "features")


def add_histograms(board: "SummaryWriter", model: nn.Module, step: int) -> None:
    """Add a histogram of each parameter, and of its gradient in the last step."""
    for name, parameter in model.named_parameters():
        for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
            if values is not None and (finite := values.float()[values.isfinite()]).numel():
                board.add_histogram(f"{kind}/{name}", finite.cpu(), step)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
