"""Export a trained network: `python -m ddp_cifar.export CHECKPOINT --format onnx|pt2 [key=value ...]`.

The exported network maps images (B, C, H, W) uint8, for any B, to logits (B, classes) float32; it includes the normalization.
Its metadata has the class names: `classes`, a JSON list. Before the file is written to its final name, it is loaded and
compared with the checkpoint on images of the test split; the largest difference is printed.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ddp_cifar.command import Arguments, check_counts, run_command
from ddp_cifar.config import load_config
from ddp_cifar.errors import UserError
from ddp_cifar.log import log

TOLERANCE = 1e-4
"""Largest difference of a logit that rounding in another runtime explains."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments. Raises `UserError`."""
    parser = Arguments("ddp_cifar.export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or a run_dir")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="config changes, such as data.root for the comparison"
    )
    parser.add_argument("--format", choices=("onnx", "pt2"), required=True, help="ONNX, or torch.export's pt2")
    parser.add_argument("--output", type=Path, help="output file (default: model.onnx or model.pt2)")
    parser.add_argument("--images", type=int, default=1000, help="number of test images to compare on (default: 1000)")
    options = parser.parse_intermixed_args(argv)
    check_counts(options, "images")
    return options


def main(argv: Sequence[str]) -> int:
    """Export with the arguments `argv`, and return the exit status."""
    options = parse(argv)
    arguments = ["device=cpu", "train.channels_last=false", *options.overrides]
    load_config(arguments)  # reports a user error before the import of torch, which takes seconds

    import torch

    from ddp_cifar.data import build_dataset
    from ddp_cifar.data.normalization import normalization_of
    from ddp_cifar.inference import TrainedNetwork, check_classes, open_trained, trained_model
    from ddp_cifar.inference.formats import FORMATS, largest_difference

    output = options.output or Path(f"model.{options.format}")
    with open_trained(options.checkpoint, arguments) as (world, loaded, config):
        if world.world_size > 1:
            raise UserError(f"export needs one process, found {world.world_size}: start it with python, not torchrun")
        dataset = build_dataset(config.data, world)
        check_classes(loaded, dataset.classes, config.data.name)
        split = dataset.test or dataset.val or dataset.train
        model = trained_model(loaded, config, len(dataset.classes), split.image_shape, torch.device("cpu"))
        normalization = normalization_of(loaded.state)
        exported = TrainedNetwork(model, dataset.classes, split.image_shape, normalization).eval()
        metadata = {"classes": json.dumps(dataset.classes), "image_shape": json.dumps(split.image_shape)}
        write, read = FORMATS[options.format]
        try:
            with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
                temporary = Path(folder) / output.name
                write(exported, metadata, temporary)
                difference, count = largest_difference(read(temporary), model, normalization, split, options.images)
                found = f"largest difference of a logit on {count} images: {difference:.1e}"
                if not difference <= TOLERANCE:
                    raise UserError(f"{output} was not written: {found}, expected at most {TOLERANCE:g}")
                os.replace(temporary, output)
        except OSError as error:
            raise UserError(f"cannot write {output} ({error.strerror}): choose another file with --output") from error
        log.info(f"wrote {output}: {len(dataset.classes)} classes, images of shape {split.image_shape}; {found}")
    return 0


if __name__ == "__main__":
    run_command(main)
