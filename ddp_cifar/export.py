"""Export a trained network: `python -m ddp_cifar.export CHECKPOINT --format onnx|pt2|safetensors [key=value ...]`.

An onnx or pt2 file has a network that maps images (B, C, H, W) uint8, for any B, to logits (B, classes) float32; it includes the
normalization. Before the file is written to its final name, it is loaded and compared with the checkpoint on images of the test
split, or on random images if the data set cannot be read; the largest difference is printed.

A safetensors file has only the weights: the averaged ones if the run has them. They are read back and must be bitwise identical.
To start a run from them, use model.init=FILE.safetensors.

All files have the metadata `classes` and `image_shape` (channels, height, width), as JSON lists. A safetensors file also has
`model` and `model_args`, and `mean` and `std` (JSON lists): the input of the network is (pixel / 255 - mean) / std.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ddp_cifar.command import TRUST_HELP, Arguments, check_counts, run_command
from ddp_cifar.config import load_config
from ddp_cifar.errors import UserError
from ddp_cifar.log import log


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments. Raises `UserError`."""
    parser = Arguments("ddp_cifar.export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or a run_dir")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="config changes, such as data.root for the comparison"
    )
    parser.add_argument(
        "--format",
        choices=("onnx", "pt2", "safetensors"),
        required=True,
        help="ONNX, torch.export's pt2, or weights only",
    )
    parser.add_argument("--output", type=Path, help="output file (default: model.FORMAT)")
    parser.add_argument("--images", type=int, default=1000, help="number of test images to compare on (default: 1000)")
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    options = parser.parse_intermixed_args(argv)
    check_counts(options, "images")
    options.output = options.output or Path(f"model.{options.format}")
    if options.format == "safetensors" and options.output.suffix != ".safetensors":
        raise UserError(f"--output {options.output} must end with .safetensors, so that model.init can read it")
    return options


def main(argv: Sequence[str]) -> int:
    """Export with the arguments `argv`, and return the exit status."""
    options = parse(argv)
    arguments = ["device=cpu", "train.channels_last=false", *options.overrides]
    load_config(arguments)  # reports a user error before the import of torch, which takes seconds

    import torch

    from ddp_cifar.data.normalization import normalization_of
    from ddp_cifar.inference import TrainedNetwork, classes_and_image_shape, open_trained, trained_model
    from ddp_cifar.inference.formats import READERS, WRITERS, compare_logits, compare_weights, comparison_images

    output = options.output
    with open_trained(options.checkpoint, arguments, ["model.name", "data.name"], trust=options.trust) as trained:
        world, loaded, config, _ = trained
        if world.world_size > 1:
            raise UserError(f"export needs one process, found {world.world_size}: start it with python, not torchrun")
        classes, image_shape = classes_and_image_shape(loaded)
        images = None
        if options.format in READERS:
            images = comparison_images(trained, options.images)
            image_shape = images.shape[1], images.shape[2], images.shape[3]
        metadata = {"classes": json.dumps(classes), "image_shape": json.dumps(image_shape)}
        normalization = normalization_of(loaded.state)
        if images is None:
            metadata |= {"model": config.model.name, "model_args": json.dumps(config.model.args)}
            metadata |= {key: json.dumps(value) for key, value in normalization.state_dict().items()}
        model = trained_model(loaded, config, len(classes), image_shape, torch.device("cpu"))
        exported = TrainedNetwork(model, classes, image_shape, normalization).eval()
        try:
            with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
                temporary = Path(folder) / output.name
                WRITERS[options.format](exported, metadata, temporary)
                try:
                    if images is None:
                        found = compare_weights(temporary, exported)
                    else:
                        found = compare_logits(READERS[options.format](temporary), exported, images)
                except UserError as error:
                    raise UserError(f"{output} was not written: {error}") from error
                os.replace(temporary, output)
        except OSError as error:
            raise UserError(f"cannot write {output} ({error.strerror}): choose another file with --output") from error
        log.info(f"wrote {output}: {len(classes)} classes, images of shape {image_shape}; {found}")
    return 0


if __name__ == "__main__":
    run_command(main)
