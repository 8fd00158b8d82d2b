"""A trained network for other programs: `python -m ddp_cifar.export CHECKPOINT --format onnx|pt2 [key=value ...]`.

The file takes images (B, 3, S, S) uint8, as they are in a picture, for any B, and gives logits (B, classes) float32:
normalisation is inside. Names of classes are in its metadata: `classes`, a JSON list. It is read back and compared with the
checkpoint on images of the test split before it gets its name; the largest difference is printed.
"""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ddp_cifar.command import Arguments, check_counts, run_command
from ddp_cifar.config import Tables
from ddp_cifar.data import DATASETS, build_dataset
from ddp_cifar.data.augment import channel_scale_and_shift, normalize
from ddp_cifar.data.dataset import Split
from ddp_cifar.errors import UserError
from ddp_cifar.inference import check_classes, open_trained, trained_model
from ddp_cifar.log import log
from ddp_cifar.models import MODELS

TABLES: Tables = {"data.name": DATASETS, "model.name": MODELS}

TOLERANCE = 1e-4
"""Largest difference of a logit that another runtime's rounding explains."""
BATCH = 64  # of the comparison, but for the last one, which is smaller: the file must take any

Network = Callable[[Tensor], Tensor]
"""(B, 3, S, S) uint8 -> (B, classes) float32."""


class Exported(nn.Module):
    """The network with its normalisation in front."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        scale, shift = channel_scale_and_shift()
        self.register_buffer("scale", scale.view(1, 3, 1, 1))
        self.register_buffer("shift", shift.view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.to(torch.float32) * self.scale + self.shift)
        return logits


def main(argv: Sequence[str]) -> int:
    """Export as `argv` says, and return the exit status."""
    parser = Arguments("ddp_cifar.export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the run_dir of a run")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="such as data.root, of the images to compare on"
    )
    parser.add_argument("--format", choices=("onnx", "pt2"), required=True, help="ONNX, or torch.export's")
    parser.add_argument("--output", type=Path, help="the file (model.onnx or model.pt2)")
    parser.add_argument("--images", type=int, default=1000, help="of the test split, to compare on (1000)")
    options = parser.parse_intermixed_args(argv)
    output = options.output or Path(f"model.{options.format}")
    check_counts(options, "images")

    arguments = ["device=cpu", "train.channels_last=false", *options.overrides]
    with open_trained(options.checkpoint, arguments, TABLES) as (world, loaded, config):
        if world.world_size > 1:
            raise UserError(
                f"export runs on one process, found {world.world_size}: start it with python, not with torchrun"
            )
        dataset = build_dataset(config.data, world)
        check_classes(loaded, dataset.classes, config.data.name)
        split = dataset.test or dataset.val or dataset.train
        model = trained_model(loaded, config, len(dataset.classes), split.image_size, torch.device("cpu"))
        exported = Exported(model).eval()
        metadata = {"classes": json.dumps(dataset.classes), "image_size": str(split.image_size)}
        write, read = {"onnx": (write_onnx, read_onnx), "pt2": (write_pt2, read_pt2)}[options.format]
        try:
            with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
                temporary = Path(folder) / output.name
                write(exported, split.image_size, metadata, temporary)
                difference, count = largest_difference(read(temporary), model, split, options.images)
                found = f"largest difference of a logit on {count} images: {difference:.1e}"
                if not difference <= TOLERANCE:
                    raise UserError(f"{output} is not written: {found}, expected {TOLERANCE:g} at most")
                os.replace(temporary, output)
        except OSError as error:
            raise UserError(f"cannot write {output} ({error.strerror}): choose another file with --output") from error
        log.info(
            f"wrote {output}: {len(dataset.classes)} classes, images of {split.image_size} x {split.image_size}; {found}"
        )
    return 0


@torch.inference_mode()
def largest_difference(network: Network, model: nn.Module, split: Split, num_images: int) -> tuple[float, int]:
    """Over the logits of the split's first images; and how many images these are."""
    images = split.images[split.sample_ids[:num_images]]
    largest = 0.0
    for batch in images.split(BATCH):
        difference = (network(batch.contiguous()) - model(normalize(batch))).abs().max().item()
        largest = difference if difference != difference else max(largest, difference)  # nan is the largest
        if largest != largest:
            break
    return largest, len(images)


def _program(exported: Exported, image_size: int) -> torch.export.ExportedProgram:
    """The network as a graph for any number of images."""
    example = torch.zeros(4, 3, image_size, image_size, dtype=torch.uint8)
    try:
        return torch.export.export(exported, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    except Exception as error:  # torch.export raises many kinds
        raise UserError(f"torch.export cannot take the model: {str(error).strip().splitlines()[0]}") from error


def write_pt2(exported: Exported, image_size: int, metadata: dict[str, str], path: Path) -> None:
    torch.export.save(_program(exported, image_size), path, extra_files=dict(metadata))


def read_pt2(path: Path) -> Network:
    module: Network = torch.export.load(path).module()
    return module


def write_onnx(exported: Exported, image_size: int, metadata: dict[str, str], path: Path) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401 - for the comparison; missing, it shall be said before the work
        import onnxscript  # noqa: F401 - torch's exporter asks for it
    except ImportError as error:
        raise UserError(f"--format onnx needs the package {error.name}: pip install 'ddp_cifar[onnx]'") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            _program(exported, image_size), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def read_onnx(path: Path) -> Network:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


if __name__ == "__main__":
    run_command(main)
