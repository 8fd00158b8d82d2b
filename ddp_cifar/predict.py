"""What a trained network sees in images: `[torchrun ...] python -m ddp_cifar.predict CHECKPOINT IMAGE|FOLDER ...`.

A row a file, as CSV or JSON lines: the likeliest class, and the probability of each. Images may have any size and mode; they
are brought to the network's as data.name=imagefolder does. Of a folder all images are taken, in folders inside as well. A
file that is no image has its error in its row and a warning, and the others go on.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ddp_cifar.command import Arguments, check_counts, run_command, show, writing
from ddp_cifar.config import Tables
from ddp_cifar.data.augment import normalize
from ddp_cifar.data.decode import SUFFIXES, ReadError, decode_all
from ddp_cifar.errors import UserError
from ddp_cifar.inference import forward_pass, open_trained, trained_model
from ddp_cifar.log import log
from ddp_cifar.models import MODELS
from ddp_cifar.precision import pick_precision

TABLES: Tables = {"model.name": MODELS}

Row = dict[str, Any]
"""`file`, then `class` and `probabilities`, or `error`."""


def main(argv: Sequence[str]) -> int:
    """Predict as `argv` says, write the rows on rank 0, and return the exit status."""
    parser = Arguments("ddp_cifar.predict", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the run_dir of a run")
    parser.add_argument("paths", metavar="IMAGE|FOLDER", nargs="+", type=Path)
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="CSV, or a JSON object a line (csv)")
    parser.add_argument("--output", type=Path, help="write to this file (else to the terminal)")
    parser.add_argument("--mirror", action="store_true", help="average each image's logits with its mirror image's")
    parser.add_argument("--batch-size", type=int, default=500, help="images of one forward pass (500)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(auto)")
    options = parser.parse_intermixed_args(argv)
    check_counts(options, "batch_size")

    files = list(find_images(options.paths))
    with open_trained(options.checkpoint, [f"device={options.device}"], TABLES) as (world, loaded, config):
        if "classes" not in loaded.state:
            raise UserError(
                f"{loaded.path} has no names of classes: it was made by an older ddp_cifar; resume its run once"
            )
        classes, image_size = loaded.state["classes"], loaded.state["image_size"]
        model = trained_model(loaded, config, len(classes), image_size, world.device)
        precision = pick_precision(config.precision, world)
        forward = forward_pass(model, precision, world.device, mirror=options.mirror)
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        batches = [files[start : start + options.batch_size] for start in range(0, len(files), options.batch_size)]
        own: list[list[Row]] = []
        for batch in batches[world.rank :: world.world_size]:
            rows, images = read_batch(batch, image_size)
            good = [row for row in rows if "error" not in row]
            if good:
                name_classes(good, forward(normalize(images.to(world.device), memory_format)), classes)
            own.append(rows)
        everyone = world.gather_objects(own)
        rows = [row for i in range(len(batches)) for row in everyone[i % world.world_size][i // world.world_size]]

        def tell() -> None:
            """On rank 0."""
            for row in rows:
                if "error" in row:
                    log.warning(f"{row['file']} is left out: {row['error']}")
            if all("error" in row for row in rows):
                raise UserError(f"none of the {len(rows)} files is an image that can be read")
            if options.output is None:
                write_rows(text := io.StringIO(), rows, classes, options.format)
                show(text.getvalue().rstrip("\n"))
                return
            with (
                writing(options.output),
                open(options.output, "w", newline="", encoding="utf-8", errors="surrogateescape") as output,
            ):
                write_rows(output, rows, classes, options.format)

        world.on_main(tell)
    return 0


def find_images(paths: Sequence[Path]) -> Iterator[Path]:
    """The files that are named, and all images in the folders that are. Raises `UserError` for what is not there."""
    for path in paths:
        if path.is_dir():
            found = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
            if not found:
                raise UserError(f"{path} has no images: expected files {', '.join(sorted(SUFFIXES))}")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise UserError(f"there is no {path}: expected an image or a folder of images")


def read_batch(files: Sequence[Path], image_size: int) -> tuple[list[Row], Tensor]:
    """A row for each file, with an `error` where it is no image; and the others' pixels, (B, 3, S, S) uint8."""
    rows: list[Row] = [{"file": str(path)} for path in files]
    pixels = bytearray()
    readable = []
    for row, path in zip(rows, files, strict=True):
        try:
            with open(path, "rb") as file:
                file.read(1)
            readable.append((row, path))
        except OSError as error:
            row["error"] = f"it cannot be read ({error.strerror})"
    decoded = decode_all([path for _, path in readable], image_size, num_workers=torch.get_num_threads())
    try:
        for (row, _), found in zip(readable, decoded, strict=True):
            if isinstance(found, str):
                row["error"] = found
            else:
                pixels += found
    except ReadError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
    flat = torch.frombuffer(pixels, dtype=torch.uint8) if pixels else torch.empty(0, dtype=torch.uint8)
    return rows, flat.view(-1, image_size, image_size, 3).permute(0, 3, 1, 2)


def name_classes(rows: Sequence[Row], logits: Tensor, classes: Sequence[str]) -> None:
    """Put the class and the probabilities of (B, classes) logits into their rows."""
    for row, shares in zip(rows, logits.double().softmax(1).tolist(), strict=True):
        likeliest = max(range(len(classes)), key=shares.__getitem__)
        row["class"] = classes[likeliest]
        row["probabilities"] = dict(zip(classes, shares, strict=True))


def write_rows(output: IO[str], rows: Sequence[Row], classes: Sequence[str], form: str) -> None:
    """As CSV (file, class, a column of probabilities for each class, error) or JSON lines."""
    if form == "jsonl":
        for row in rows:
            output.write(json.dumps(row) + "\n")
        return
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(["file", "class", *classes, "error"])
    for row in rows:
        shares = row.get("probabilities", {})
        numbers = [f"{shares[name]:.6f}" if shares else "" for name in classes]
        writer.writerow([row["file"], row.get("class", ""), *numbers, row.get("error", "")])


if __name__ == "__main__":
    run_command(main)
