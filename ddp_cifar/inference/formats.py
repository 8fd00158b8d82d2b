"""The file formats of an exported network, ONNX and torch.export's: write, read and compare."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ddp_cifar.data.dataset import Split
from ddp_cifar.data.normalization import Normalization
from ddp_cifar.errors import UserError, first_line
from ddp_cifar.inference import TrainedNetwork

BATCH = 64  # images per batch of the comparison; the last batch is smaller, which tests the dynamic batch size

Network = Callable[[Tensor], Tensor]
"""(B, C, H, W) uint8 -> (B, classes) float32."""


@torch.inference_mode()
def largest_difference(
    network: Network, model: nn.Module, normalization: Normalization, split: Split, num_images: int
) -> tuple[float, int]:
    """Return the largest difference of a logit over the split's first images, and the number of these images."""
    images = split.images[split.sample_ids[:num_images]]
    largest = 0.0
    for batch in images.split(BATCH):
        difference = (network(batch.contiguous()) - model(normalization.normalize(batch))).abs().max().item()
        largest = difference if difference != difference else max(largest, difference)  # nan counts as the largest
        if largest != largest:
            break
    return largest, len(images)


def _program(exported: TrainedNetwork) -> torch.export.ExportedProgram:
    """Export the network as a graph with a dynamic batch size."""
    example = torch.zeros(4, *exported.image_shape, dtype=torch.uint8)
    try:
        return torch.export.export(exported, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    except Exception as error:  # torch.export raises many kinds
        raise UserError(f"torch.export cannot export the model: {first_line(error)}") from error


def write_pt2(exported: TrainedNetwork, metadata: dict[str, str], path: Path) -> None:
    torch.export.save(_program(exported), path, extra_files=dict(metadata))


def read_pt2(path: Path) -> Network:
    module: Network = torch.export.load(path).module()
    return module


def write_onnx(exported: TrainedNetwork, metadata: dict[str, str], path: Path) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401 - used by the comparison; report it missing before the export
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UserError(f"--format onnx needs the package {error.name}: pip install 'ddp_cifar[onnx]'") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        program = torch.onnx.export(
            _program(exported), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
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


FORMATS: dict[str, tuple[Callable[[TrainedNetwork, dict[str, str], Path], None], Callable[[Path], Network]]] = {
    "onnx": (write_onnx, read_onnx),
    "pt2": (write_pt2, read_pt2),
}
"""Format name -> functions that write and read a file."""
