"""Evaluate a trained network: `[torchrun ...] python -m ddp_cifar.evaluate CHECKPOINT [key=value ...]`.

CHECKPOINT is a checkpoint file, or a run_dir, whose newest valid checkpoint is used. The config is the checkpoint's;
`key=value` changes it, for example data.root or eval.batch_size. Each image counts once on any number of ranks.

--output writes one row per image, in the order of the split: its file, relative to data.root (its index, if the data set has no
files), its label, the predicted class, and the probability of that class.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ddp_cifar.command import TRUST_HELP, Arguments, percent, run_command, writing
from ddp_cifar.config import load_config
from ddp_cifar.errors import UserError
from ddp_cifar.log import show


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments. Raises `UserError`."""
    parser = Arguments("ddp_cifar.evaluate", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or a run_dir")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="config changes")
    parser.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="split to evaluate (default: test)"
    )
    parser.add_argument("--mirror", action="store_true", help="average the logits of each image and its mirror image")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--output", type=Path, help="write the prediction of each image to this file")
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="of --output (default: csv)")
    parser.add_argument("--png", type=Path, help="plot the confusion matrix to this file")
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str]) -> int:
    """Evaluate with the arguments `argv`, print the table on rank 0, and return the exit status."""
    options = parse(argv)
    load_config(options.overrides)  # reports a user error before the import of torch, which takes seconds

    import torch

    from ddp_cifar.data.dataset import choose_data_device, is_same_data
    from ddp_cifar.data.loader import EvalLoader
    from ddp_cifar.data.normalization import normalization_of
    from ddp_cifar.inference import check_classes, open_trained, trained_model
    from ddp_cifar.inference.rows import write_evaluated
    from ddp_cifar.tracking.figures import confusion_figure
    from ddp_cifar.tracking.quality import Quality
    from ddp_cifar.training.evaluation import evaluate_split, forward_pass
    from ddp_cifar.training.loss import loss_function
    from ddp_cifar.training.precision import pick_precision

    uses = ["model.name", "data.name", "train.loss"]
    with open_trained(options.checkpoint, options.overrides, uses, trust=options.trust) as trained:
        world, loaded, config, _ = trained
        dataset = trained.build_dataset(options.split)
        check_classes(loaded, dataset.classes, config.data.name)
        split = {"test": dataset.test, "val": dataset.val, "train": dataset.train}[options.split]
        if split is None:
            raise UserError(f"--split {options.split}: data.name={config.data.name} has no {options.split} images")
        trained_on = loaded.state["progress"].get("data", "")  # absent in older checkpoints
        if options.split == "val" and trained_on and not is_same_data(trained_on, dataset.describe()):
            raise UserError(
                f"--split val would not be the images held out in training: the checkpoint was trained on {trained_on}; "
                f"found {dataset.describe()}: use the same data and data.val_images as in training"
            )
        model = trained_model(loaded, config, len(dataset.classes), split.image_shape, world.device)
        precision = pick_precision(config.precision, world)
        place = choose_data_device([split], world.device, config.data.residency)
        loader = EvalLoader(split.to(place), normalization_of(loaded.state), config.train.channels_last, world.device)
        forward = forward_pass(model, precision, world.device, mirror=options.mirror)
        logits = torch.zeros(len(split), len(dataset.classes), device=world.device)
        size, loss = config.eval.batch_size, loss_function(config.train)
        batches_per_rank = math.ceil(len(split) / (size * world.world_size))
        with tqdm(total=batches_per_rank, unit="batch", leave=False, disable=None if world.is_main else True) as bar:
            totals = evaluate_split(forward, loader, world, size, loss, logits=logits, on_batch=bar.update)
        logits = world.sum(logits).cpu()  # each row is zero on all ranks but one, so the sum is exact
        quality = Quality.of(logits, split.labels)

        def report() -> None:
            """Print the table and write the files, on rank 0."""
            progress = loaded.state["progress"]
            result: dict[str, Any] = {
                "checkpoint": str(loaded.path),
                "step": progress["step"],
                "epoch": progress["epoch"],
                "split": options.split,
                "mirror": options.mirror,
                "precision": precision,
                "images": totals.images,
                "loss": totals.mean_loss,
                "accuracy": totals.accuracy,
            }
            result |= quality.as_dict(dataset.classes)
            show(_table(result))
            if options.json:
                with writing(options.json):
                    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            if options.output:
                write_evaluated(options.output, options.format, split, logits, dataset.classes)
            if options.png:
                with writing(options.png):
                    confusion_figure(quality, dataset.classes).savefig(options.png, format="png")

        world.on_main(report)
    return 0


def _table(result: dict[str, Any]) -> str:
    width = max(len("class"), *(len(row["name"]) for row in result["classes"]))
    lines = [
        f"{result['checkpoint']} (epoch {result['epoch']}, step {result['step']}), {result['split']}: {result['images']} images",
        f"loss {result['loss']:.4f}, accuracy {percent(result['accuracy'])}, "
        f"top-5 {percent(result['top5_accuracy'])}, calibration error {percent(result['calibration_error'])}",
        f"balanced accuracy {percent(result['balanced_accuracy'])}, macro F1 {percent(result['macro_f1'])}",
        "",
        f"{'class':<{width}} {'images':>7} {'precision':>9} {'recall':>7}  most often mistaken for",
    ]
    for i, row in enumerate(result["classes"]):
        wrong = [
            (count, result["classes"][j]["name"]) for j, count in enumerate(result["confusion"][i]) if j != i and count
        ]
        most = max(wrong, default=None)
        note = f"{most[1]} ({most[0]})" if most else "-"
        lines.append(
            f"{row['name']:<{width}} {row['images']:>7} {percent(row['precision']):>9} {percent(row['recall']):>7}  {note}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
