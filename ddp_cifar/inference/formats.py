"""The file formats of an exported network, ONNX, torch.export's and safetensors: write, read and compare."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ddp_cifar.errors import UserError, first_line
from ddp_cifar.inference import Trained, TrainedNetwork, check_classes, classes_and_image_shape
from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_file import digest
from ddp_cifar.run.resume import load_init
from ddp_cifar.seeding import generator

TOLERANCE = 1e-4
"""Largest difference of a logit that rounding in another runtime explains."""
BATCH = 64  # images per batch of the comparison; the last batch is smaller, which tests the dynamic batch size

Network = Callable[[Tensor], Tensor]
"""(B, C, H, W) uint8 -> (B, classes) float32."""


def comparison_images(trained: Trained, num_images: int) -> Tensor:
    """Return the test split's first images, or random ones if the data set cannot be read: (N, C, H, W) uint8.

    Raises `UserError` if the data set has other classes than the checkpoint.
    """
    try:
        dataset = trained.build_dataset()
    except UserError as error:
        log.warning(f"comparing on {num_images} random images, because the data set cannot be read: {error}")
        _, image_shape = classes_and_image_shape(trained.loaded)
        shape = (num_images, *image_shape)
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator("export"))
    check_classes(trained.loaded, dataset.classes, trained.config.data.name)
    split = dataset.test or dataset.val or dataset.train
    return split.images[split.sample_ids[:num_images]]


@torch.inference_mode()
def compare_logits(read: Network, exported: TrainedNetwork, images: Tensor) -> str:
    """Compare the logits of the network `read` from a file with the checkpoint's, and return the result in words.

    Raises `UserError` if they differ by more than rounding.
    """
    largest = 0.0
    for batch in tqdm(images.split(BATCH), desc="comparing", unit="batch", leave=False, disable=None):
        difference = (
            (read(batch.contiguous()) - exported.network(exported.normalization.normalize(batch))).abs().max().item()
        )
        largest = difference if difference != difference else max(largest, difference)  # nan counts as the largest
        if largest != largest:
            break
    found = f"largest difference of a logit on {len(images)} images: {largest:.1e}"
    if not largest <= TOLERANCE:
        raise UserError(f"{found}, expected at most {TOLERANCE:g}")
    return found


def compare_weights(path: Path, exported: TrainedNetwork) -> str:
    """Compare the weights in a safetensors file, as model.init reads it, with the checkpoint's, and return the result in words.

    Raises `UserError` if they are not bitwise identical.
    """
    read, expected = (
        dict(sorted(weights.items())) for weights in (load_init(str(path)), exported.network.state_dict())
    )
    if digest(read) != digest(expected):
        raise UserError(
            "the weights read back differ from the checkpoint's, expected bitwise identical ones: try another disk"
        )
    return f"{len(read)} tensors, read back bitwise identical"


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


def write_safetensors(exported: TrainedNetwork, metadata: dict[str, str], path: Path) -> None:
    """Write the weights under their names in the network, which does not include the normalization."""
    # copies, because safetensors rejects tensors that share memory
    weights = {name: tensor.clone().contiguous() for name, tensor in exported.network.state_dict().items()}
    path.write_bytes(save(weights, metadata))


WRITERS: dict[str, Callable[[TrainedNetwork, dict[str, str], Path], None]] = {
    "onnx": write_onnx,
    "pt2": write_pt2,
    "safetensors": write_safetensors,
}
READERS: dict[str, Callable[[Path], Network]] = {"onnx": read_onnx, "pt2": read_pt2}
"""The formats that contain the network; the others contain only its weights."""
