"""A look at a run before it waits in a queue: `python -m ddp_cifar.train --dry-run [--nodes N] [--nproc-per-node N] ...`.

On one process, without a GPU: the config is valid, data and checkpoints are there and fit, the batch divides over the ranks, the
model and the optimizer make a step. Prints what the run would be.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ddp_cifar.checkpoint import Checkpoints, Loaded, check_same_run, find_checkpoint, load_init, load_weights
from ddp_cifar.command import Arguments, check_counts, megabytes, show
from ddp_cifar.config import Config, load_config
from ddp_cifar.data import DataSet, outline_dataset
from ddp_cifar.data.sampler import BatchPlan, check_batch_size, plan_batches
from ddp_cifar.distributed import open_world_alone, place_from_environment
from ddp_cifar.errors import UserError
from ddp_cifar.models import build_model
from ddp_cifar.optim import build_optimizer
from ddp_cifar.precision import autocast
from ddp_cifar.run_dir import RunDir
from ddp_cifar.train import TABLES
from ddp_cifar.trainer import Progress

FLAG = "--dry-run"


def dry_run(argv: Sequence[str]) -> int:
    """Look at the run that `argv` describes, print what it would be, and return the exit status. Raises `UserError`."""
    parser = Arguments("ddp_cifar.train", __doc__)
    parser.add_argument(FLAG, action="store_true")
    parser.add_argument("--nodes", type=int, default=1, help="of the run (1)")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", type=int, default=1, help="ranks of each (1)")
    parser.add_argument("arguments", metavar="CONFIG.yaml key=value", nargs="*", help="as train takes them")
    options = parser.parse_intermixed_args(argv)
    check_counts(options, "nodes", "nproc_per_node")
    if (found := place_from_environment()[1]) > 1:
        raise UserError(f"{FLAG} runs on one process, found {found}: start it with python, not with torchrun")

    config = load_config(options.arguments, TABLES)
    world_size = options.nodes * options.nproc_per_node
    check_batch_size(config.train, world_size)
    run_dir = RunDir(config.run_dir)
    resumed = find_checkpoint(config.resume, Checkpoints(run_dir.checkpoints, config.checkpoint.keep), mend=False)
    if resumed:
        check_same_run(resumed, config)
    with open_world_alone() as world:
        dataset = outline_dataset(config.data, world)
    plan = plan_batches(config.train, world_size, len(dataset.train))
    model = build_model(config.model, len(dataset.classes), dataset.train.image_size)
    if not resumed and config.model.init != "random":
        load_weights(model, load_init(config.model.init), config.model.init, new_head=True)
    footprint = footprint_of(config, plan.micro_batch_size, dataset, model)
    size = functools.partial(megabytes, digits=0)
    lines = {
        "run_dir": f"{config.run_dir} ({_state(config, resumed)})",
        "data": f"{config.data.name}: {_sizes(dataset)}",
        "model": f"{config.model.name}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters",
        "ranks": f"{world_size} ({options.nodes} nodes x {options.nproc_per_node})",
        "a step": str(plan),
        "in all": _steps(config, plan),
        "memory a rank": f"about {size(footprint.memory)}, beside what the backend takes: weights, gradients and optimizer "
        f"{size(footprint.state)}, activations of a micro-batch {size(footprint.activations)}, images {size(footprint.images)}",
        "a checkpoint": f"{size(footprint.checkpoint)}; {config.checkpoint.keep} are kept: "
        f"{size(footprint.checkpoint * config.checkpoint.keep)}",
    }
    show("\n".join(f"{name:<14} {text}" for name, text in lines.items()))
    return 0


def _state(config: Config, resumed: Loaded | None) -> str:
    if not resumed:
        return "new"
    progress = Progress()
    progress.load_state_dict(resumed.state["progress"])
    return f"finished: {progress}" if progress.is_finished(config.train) else f"goes on from {progress}"


def _sizes(dataset: DataSet) -> str:
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items() if split)
    size = dataset.train.image_size
    return f"{sizes} images of {len(dataset.classes)} classes, {size} x {size} pixels"


def _steps(config: Config, plan: BatchPlan) -> str:
    steps = config.train.epochs * plan.steps_per_epoch
    limit = config.train.max_steps
    if limit is not None and limit < steps:
        return f"{limit:,} steps (train.max_steps)"
    return f"{config.train.epochs} epochs, {steps:,} steps"


@dataclass(frozen=True)
class Footprint:
    """What a rank holds on its device, and what a checkpoint holds, in bytes."""

    state: float
    """Weights, gradients, the optimizer's own, and the average of the weights."""
    activations: float
    """Of a micro-batch: what autograd keeps for the backward pass."""
    images: float
    checkpoint: float

    @property
    def memory(self) -> float:
        return self.state + self.activations + self.images


def footprint_of(config: Config, micro_batch_size: int, dataset: DataSet, model: nn.Module) -> Footprint:
    """By one forward pass over two images and one over four, and an update, on the CPU; the model is changed by it."""
    optimizer = build_optimizer(model, config.optim)
    weights = _num_bytes(model.state_dict())
    gradients = _num_bytes([parameter for parameter in model.parameters() if parameter.requires_grad])
    two, four = (_saved_bytes(model, count, dataset.train.image_size, config.precision) for count in (2, 4))
    an_image = (four - two) / 2
    optimizer.step()
    moments = _num_bytes(optimizer.state_dict())
    average = weights if config.train.ema_decay else 0
    return Footprint(
        state=weights + gradients + moments + average,
        activations=two + an_image * (micro_batch_size - 2),
        images=_num_bytes([split.images for split in (dataset.train, dataset.test) if split]),
        checkpoint=weights + moments + average,
    )


def _saved_bytes(model: nn.Module, count: int, image_size: int, precision: str) -> int:
    """Bytes that autograd keeps of a forward pass over `count` images, beside the parameters; and go the way back."""
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    # most GPUs compute in bf16; here it is slow, which does not matter for so few
    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        autocast("bf16" if precision == "auto" else precision, torch.device("cpu")),
    ):
        logits = model.train()(torch.zeros(count, 3, image_size, image_size))
    logits.float().sum().backward()
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)


def _num_bytes(state: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(state))


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)
