"""How good a trained network is: `[torchrun ...] python -m ddp_cifar.evaluate CHECKPOINT [key=value ...]`.

CHECKPOINT is a file, or the run_dir of a run, whose newest good one is taken. The config is the checkpoint's; `key=value`
changes it, such as data.root, or eval.batch_size. On any number of ranks each image counts once.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_cifar.command import Arguments, percent, run_command, show, writing
from ddp_cifar.config import Tables
from ddp_cifar.dashboard import confusion_figure
from ddp_cifar.data import DATASETS, build_dataset
from ddp_cifar.data.dataset import place_of
from ddp_cifar.data.loader import EvalLoader
from ddp_cifar.errors import UserError
from ddp_cifar.inference import Quality, check_classes, forward_pass, open_trained, split_logits, trained_model
from ddp_cifar.models import MODELS
from ddp_cifar.precision import pick_precision

TABLES: Tables = {"data.name": DATASETS, "model.name": MODELS}


def main(argv: Sequence[str]) -> int:
    """Evaluate as `argv` says, print the table on rank 0, and return the exit status."""
    parser = Arguments("ddp_cifar.evaluate", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="whose images (test)")
    parser.add_argument("--mirror", action="store_true", help="average each image's logits with its mirror image's")
    parser.add_argument("--json", type=Path, help="write all of it to this file")
    parser.add_argument("--png", type=Path, help="draw the confusion matrix into this file")
    options = parser.parse_intermixed_args(argv)

    with open_trained(options.checkpoint, options.overrides, TABLES) as (world, loaded, config):
        dataset = build_dataset(config.data, world)
        check_classes(loaded, dataset.classes, config.data.name)
        split = {"test": dataset.test, "val": dataset.val, "train": dataset.train}[options.split]
        if split is None:
            raise UserError(f"--split {options.split}, but there are no such images in data.name={config.data.name}")
        trained_on = loaded.state["progress"].get("data", "")  # older checkpoints do not say it
        if options.split == "val" and trained_on and dataset.describe() != trained_on:
            raise UserError(
                f"--split val would be other images than those held out in training, which had {trained_on}; now "
                f"{dataset.describe()}: leave data.val_images and the data as they were"
            )
        model = trained_model(loaded, config, len(dataset.classes), split.image_size, world.device)
        precision = pick_precision(config.precision, world)
        place = place_of([split], world.device, config.data.residency)
        loader = EvalLoader(split.to(place), config.train.channels_last, world.device)
        forward = forward_pass(model, precision, world.device, mirror=options.mirror)
        logits, totals = split_logits(forward, loader, len(dataset.classes), world, config.eval.batch_size)
        if totals.images != len(split):
            raise UserError(f"the evaluation counted {totals.images} images of {len(split)}")
        quality = Quality.of(logits, split.labels)

        def tell() -> None:
            """On rank 0."""
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
            if options.png:
                with writing(options.png):
                    confusion_figure(quality, dataset.classes).savefig(options.png, format="png")

        world.on_main(tell)
    return 0


def _table(result: dict[str, Any]) -> str:
    width = max(len("class"), *(len(row["name"]) for row in result["classes"]))
    lines = [
        f"{result['checkpoint']} (epoch {result['epoch']}, step {result['step']}), {result['split']}: {result['images']} images",
        f"loss {result['loss']:.4f}, accuracy {percent(result['accuracy'])}, "
        f"top-5 {percent(result['top5_accuracy'])}, calibration error {percent(result['calibration_error'])}",
        "",
        f"{'class':<{width}} {'images':>7} {'precision':>9} {'recall':>7}  most often taken for",
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
