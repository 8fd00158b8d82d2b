"""Classify images with a trained network: `[torchrun ...] python -m ddp_cifar.predict CHECKPOINT IMAGE|FOLDER ...`.

Writes one row per file, as CSV or JSON lines: the most likely class and the probability of every class. Images may have any
size and mode; they are converted as by data.name=imagefolder. Folders are searched recursively. A file that cannot be decoded
causes a warning and has the error in its row; the other files are not affected. Rows are written batch by batch, in the order
of the files.
"""

import argparse
import csv
import functools
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ddp_cifar.command import Arguments, check_counts, run_command, writing_part
from ddp_cifar.errors import UserError
from ddp_cifar.log import log, show

Row = dict[str, Any]
"""`file`, then `class` and `probabilities`, or `error`."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments. Raises `UserError`."""
    parser = Arguments("ddp_cifar.predict", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint file, or a run_dir")
    parser.add_argument("paths", metavar="IMAGE|FOLDER", nargs="+", type=Path)
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="CSV or JSON lines (default: csv)")
    parser.add_argument("--output", type=Path, help="write to this file (default: stdout)")
    parser.add_argument("--mirror", action="store_true", help="average the logits of each image and its mirror image")
    parser.add_argument("--batch-size", type=int, default=500, help="images per forward pass (default: 500)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="device (default: auto)"
    )
    options = parser.parse_intermixed_args(argv)
    check_counts(options, "batch_size")
    return options


def main(argv: Sequence[str]) -> int:
    """Predict with the arguments `argv`, write the rows on rank 0, and return the exit status."""
    options = parse(argv)

    # importing torch takes seconds: only after --help and wrong arguments are handled
    import torch

    from ddp_cifar.data.normalization import normalization_of
    from ddp_cifar.inference import classes_and_image_shape, open_trained, trained_model
    from ddp_cifar.inference.images import find_images, name_classes, read_batch
    from ddp_cifar.training.evaluation import forward_pass
    from ddp_cifar.training.precision import pick_precision

    files = list(find_images(options.paths))
    with open_trained(options.checkpoint, [f"device={options.device}"]) as (world, loaded, config):
        classes, image_shape = classes_and_image_shape(loaded)
        model = trained_model(loaded, config, len(classes), image_shape, world.device)
        normalization = normalization_of(loaded.state)
        precision = pick_precision(config.precision, world)
        forward = forward_pass(model, precision, world.device, mirror=options.mirror)
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format

        def predict(batch: Sequence[Path]) -> list[Row]:
            rows, images = read_batch(batch, image_shape)
            good = [row for row in rows if "error" not in row]
            if good:
                name_classes(good, forward(normalization.normalize(images.to(world.device), memory_format)), classes)
            return rows

        output = Output(options.output, options.format, classes)
        size = options.batch_size
        shows_rows = options.output is None and sys.stdout.isatty()
        with tqdm(
            total=len(files), unit="file", leave=False, disable=True if shows_rows or not world.is_main else None
        ) as bar:
            for start in range(0, len(files), size * world.world_size):  # a batch per rank
                first = start + world.rank * size
                gathered = world.gather_objects(predict(files[first : first + size]))
                rows = [row for rank_rows in gathered for row in rank_rows]
                world.on_main(functools.partial(output.write, rows))
                bar.update(len(rows))
        world.on_main(output.close)
    return 0


class Output:
    """Writes the rows batch by batch, on rank 0: CSV (file, class, one column of probabilities per class, error) or JSON lines.

    Methods raise `UserError` if `path` cannot be written.
    """

    def __init__(self, path: Path | None, form: str, classes: Sequence[str]) -> None:
        self.path = path
        self.form = form
        self.classes = classes
        self.num_rows = self.num_errors = 0

    def write(self, rows: Sequence[Row]) -> None:
        """Append `rows`. The first call replaces the file."""
        text = io.StringIO()
        if self.form == "csv":
            writer = csv.writer(text, lineterminator="\n")
            if not self.num_rows:
                writer.writerow(["file", "class", *self.classes, "error"])
            writer.writerows(self._cells(row) for row in rows)
        else:
            text.writelines(json.dumps(row) + "\n" for row in rows)
        if self.path is None:
            show(text.getvalue().rstrip("\n"))
        else:
            mode = "a" if self.num_rows else "w"
            with (
                writing_part(self.path),
                open(self.path, mode, newline="", encoding="utf-8", errors="surrogateescape") as file,
            ):
                file.write(text.getvalue())
        self.num_rows += len(rows)
        for row in rows:
            if "error" in row:
                self.num_errors += 1
                log.warning(f"{row['file']} is skipped: {row['error']}")

    def close(self) -> None:
        """Log the file. Raises `UserError` if no file could be decoded."""
        if self.num_errors == self.num_rows:
            raise UserError(f"none of the {self.num_rows} files can be decoded as an image: expected at least one")
        if self.path is not None:
            log.info(f"wrote {self.path}")

    def _cells(self, row: Row) -> list[str]:
        shares = row.get("probabilities", {})
        numbers = [f"{shares[name]:.6f}" if shares else "" for name in self.classes]
        return [row["file"], row.get("class", ""), *numbers, row.get("error", "")]


if __name__ == "__main__":
    run_command(main)
