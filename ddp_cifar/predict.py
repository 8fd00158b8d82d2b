"""Classify images with a trained network: `[torchrun ...] python -m ddp_cifar.predict CHECKPOINT IMAGE|FOLDER ...`.

Writes one row per file, as CSV or JSON lines: the most likely class and the probability of every class, or of the K most likely
ones with --top-k. Images may have any size and mode; they are converted as by data.name=imagefolder. Folders are searched
recursively. A file that cannot be decoded causes a warning and has the error in its row; the other files are not affected. Rows
are written batch by batch, in the order of the files.
"""

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ddp_cifar.command import TRUST_HELP, Arguments, check_counts, run_command
from ddp_cifar.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments. Raises `UserError`."""
    parser = Arguments("ddp_cifar.predict", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or a run_dir")
    parser.add_argument("paths", metavar="IMAGE|FOLDER", nargs="+", type=Path)
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="CSV or JSON lines (default: csv)")
    parser.add_argument("--output", type=Path, help="write to this file (default: stdout)")
    parser.add_argument("--top-k", type=int, metavar="K", help="write only the K most likely classes (default: all)")
    parser.add_argument("--mirror", action="store_true", help="average the logits of each image and its mirror image")
    parser.add_argument("--batch-size", type=int, default=500, help="images per forward pass (default: 500)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="device (default: auto)"
    )
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    options = parser.parse_intermixed_args(argv)
    check_counts(options, "batch_size", "top_k")
    return options


def main(argv: Sequence[str]) -> int:
    """Predict with the arguments `argv`, write the rows on rank 0, and return the exit status."""
    options = parse(argv)

    # importing torch takes seconds: only after --help and wrong arguments are handled
    import torch

    from ddp_cifar.data.decode import decode_all
    from ddp_cifar.data.normalization import normalization_of
    from ddp_cifar.inference import classes_and_image_shape, open_trained, trained_model
    from ddp_cifar.inference.images import find_images, read_batch
    from ddp_cifar.inference.rows import Output, Row, add_predictions, prediction_columns
    from ddp_cifar.training.evaluation import forward_pass
    from ddp_cifar.training.precision import pick_precision

    arguments = [f"device={options.device}"]
    with open_trained(options.checkpoint, arguments, ["model.name"], trust=options.trust) as trained:
        world, loaded, config, _ = trained
        classes, image_shape = classes_and_image_shape(loaded)
        if image_shape[0] not in (1, 3):
            raise UserError(
                f"{loaded.path} was trained on images of {image_shape[0]} channels: image files have 1 or 3; use "
                f"ddp_cifar.load_trained in a program"
            )
        if options.top_k is not None and options.top_k > len(classes):
            raise UserError(
                f"--top-k {options.top_k} is out of range: expected 1 to {len(classes)}, the number of classes"
            )
        files = world.on_main(lambda: find_images(options.paths))
        model = trained_model(loaded, config, len(classes), image_shape, world.device)
        normalization = normalization_of(loaded.state)
        precision = pick_precision(config.precision, world)
        forward = forward_pass(model, precision, world.device, mirror=options.mirror)
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format

        size = options.batch_size
        batches = [files[start : start + size] for start in range(0, len(files), size)]
        own_batches = batches[world.rank :: world.world_size]
        own_files = [file for batch in own_batches for file in batch]

        def predict(batch: Sequence[str]) -> list[Row]:
            rows, images = read_batch(batch, decoded, image_shape)
            good = [row for row in rows if "error" not in row]
            if good:
                logits = forward(normalization.normalize(images.to(world.device), memory_format))
                add_predictions(good, logits, classes, options.top_k)
            return rows

        output = Output(options.output, options.format, ["file", *prediction_columns(classes, options.top_k), "error"])
        shows_rows = options.output is None and sys.stdout.isatty()
        with (
            contextlib.closing(decode_all(own_files, image_shape, num_workers=torch.get_num_threads())) as decoded,
            tqdm(
                total=len(files), unit="file", leave=False, disable=True if shows_rows or not world.is_main else None
            ) as bar,
        ):
            for i in range(math.ceil(len(batches) / world.world_size)):  # a batch per rank
                gathered = world.gather_objects(predict(own_batches[i] if i < len(own_batches) else []))
                rows = [row for rank_rows in gathered for row in rank_rows]
                world.on_main(functools.partial(output.write, rows))
                bar.update(len(rows))
        world.on_main(output.close)
    return 0


if __name__ == "__main__":
    run_command(main)
