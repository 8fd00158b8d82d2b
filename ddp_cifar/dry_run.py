"""The description of a run by `python -m ddp_cifar.train --dry-run`, made on one process without a GPU."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ddp_cifar.command import megabytes
from ddp_cifar.config import Config, ImageShape, flatten, to_dict
from ddp_cifar.data import DataSet, dataset_metadata
from ddp_cifar.data.batch_plan import BatchPlan, advice, check_batch_size, plan_batches
from ddp_cifar.data.normalization import given_values
from ddp_cifar.distributed.rendezvous import open_world_alone
from ddp_cifar.models import build_model
from ddp_cifar.models.weights import load_weights
from ddp_cifar.registry import user_defined_names
from ddp_cifar.run.checkpoint_store import Checkpoints, Loaded
from ddp_cifar.run.resume import check_same_run, find_checkpoint
from ddp_cifar.run.run_dir import RunDir
from ddp_cifar.tracking import connections
from ddp_cifar.training.build import check_micro_batches, initial_weights, source_of_weights
from ddp_cifar.training.loss import class_weights
from ddp_cifar.training.optim import build_optimizer
from ddp_cifar.training.parameters import describe_groups, freeze
from ddp_cifar.training.precision import autocast
from ddp_cifar.training.progress import Progress
from ddp_cifar.training.schedule import Schedule
from ddp_cifar.training.trial import try_training


def describe_run(config: Config, nodes: int, nproc_per_node: int) -> str:
    """Describe the run of `config` on `nodes` x `nproc_per_node` ranks, one line per topic.

    Raises `UserError` if the run could not start: if data or checkpoints do not match, or if a step cannot be divided among
    the ranks.
    """
    world_size = nodes * nproc_per_node
    check_batch_size(config.train, world_size)
    trackers = connections(config)
    run_dir = RunDir(config.run_dir)
    resumed = find_checkpoint(config.resume, Checkpoints(run_dir.checkpoints, config.checkpoint.keep), fix_links=False)
    if resumed:
        check_same_run(resumed, config)
    with open_world_alone() as world:
        dataset = dataset_metadata(config.data, world)
    given_values(config.data, dataset.train.image_shape[0])  # only its checks
    if isinstance(config.train.class_weights, list):
        class_weights(config.train.class_weights, dataset.train.labels, len(dataset.classes))
    plan = plan_batches(config.train, world_size, len(dataset.train))
    model = build_model(config.model, len(dataset.classes), dataset.train.image_shape)
    frozen = freeze(model, config.model.freeze)
    check_micro_batches(config, plan, model, dataset)
    init = None if resumed else initial_weights(config)
    if init is not None:
        load_weights(model, init, source_of_weights(config.model), new_head=True)
    here = on_cpu(config)
    try_training(model, here, len(dataset.classes), dataset.train.image_shape, _precision(config))
    optimizer = build_optimizer(model, here.optim)
    # only its checks
    Schedule(optimizer, config.optim, steps_per_epoch=plan.steps_per_epoch, epochs=config.train.epochs)
    footprint = footprint_of(config, plan.micro_batch_size, dataset, model)
    size = functools.partial(megabytes, digits=0)
    on_host = config.data.residency == "host" and config.device != "cpu"
    images = 0.0 if on_host else footprint.images
    lines = {
        "run_dir": f"{config.run_dir} ({_state(config, resumed)})",
        "data": f"{config.data.name}: {_sizes(dataset)}",
        "model": f"{config.model.name}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters"
        + (f"; {frozen}" if frozen else ""),
        "optimizer": f"{config.optim.name}: {describe_groups(optimizer.param_groups)}",
        "ranks": f"{world_size} ({nodes} nodes x {nproc_per_node})",
        "step": str(plan),
        "total": _steps(config, plan),
        "memory per rank": f"about {size(footprint.training + images)}, plus the backend's: weights, gradients and optimizer "
        f"{size(footprint.state)}, activations of a micro-batch {size(footprint.activations)}, images "
        + size(images)
        + " (data.residency=host)" * on_host,
        "checkpoint": f"{size(footprint.checkpoint)}; keeps {config.checkpoint.keep}: "
        f"{size(footprint.checkpoint * config.checkpoint.keep)}",
    }
    if trackers:
        lines["trackers"] = ", ".join(trackers)
    if names := user_defined_names(flatten(to_dict(config))):
        lines["user-defined"] = ", ".join(names)
    notes = advice(config.train, plan, on_gpus=config.device in ("auto", "cuda"))
    return "\n".join([*(f"{name:<15} {text}" for name, text in lines.items()), *notes])


def _state(config: Config, resumed: Loaded | None) -> str:
    if not resumed:
        return "new"
    progress = Progress()
    progress.load_state_dict(resumed.state["progress"])
    return f"finished: {progress}" if progress.is_finished(config) else f"resumes from {progress}"


def _sizes(dataset: DataSet) -> str:
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items() if split)
    channels, height, width = dataset.train.image_shape
    kind = " grayscale" if channels == 1 else ""
    return f"{sizes}{kind} images of {len(dataset.classes)} classes, {height} x {width} pixels"


def _steps(config: Config, plan: BatchPlan) -> str:
    steps = config.train.epochs * plan.steps_per_epoch
    limit = config.train.max_steps
    if limit is not None and limit < steps:
        return f"{limit:,} steps (train.max_steps)"
    patience = config.train.patience_epochs
    early = f", or {patience} epochs without a better validation accuracy" if patience else ""
    return f"{config.train.epochs} epochs, {steps:,} steps{early}"


@dataclass(frozen=True)
class Footprint:
    """The memory of a rank on its device, and the size of a checkpoint, in bytes."""

    state: float
    """Weights, gradients, optimizer state, and averaged weights."""
    activations: float
    """The tensors that autograd keeps for the backward pass of a micro-batch."""
    images: float
    """On the device, or in the host's memory (`data.residency`)."""
    checkpoint: float

    @property
    def training(self) -> float:
        """All but the images."""
        return self.state + self.activations


def footprint_of(config: Config, micro_batch_size: int, dataset: DataSet, model: nn.Module) -> Footprint:
    """Measure the footprint with forward passes over two and four images and an update, on the CPU. Changes the model."""
    optimizer = build_optimizer(model, on_cpu(config).optim)
    weights = _num_bytes(model.state_dict())
    gradients = _num_bytes([parameter for parameter in model.parameters() if parameter.requires_grad])
    two, four = (_saved_bytes(model, count, dataset.train.image_shape, _precision(config)) for count in (2, 4))
    per_image = (four - two) / 2
    optimizer.step()
    moments = _num_bytes(optimizer.state_dict())
    average = weights if config.train.ema_decay else 0
    return Footprint(
        state=weights + gradients + moments + average,
        activations=two + per_image * (micro_batch_size - 2),
        images=_num_bytes([split.images for split in (dataset.train, dataset.test) if split]),
        checkpoint=weights + moments + average,
    )


def on_cpu(config: Config) -> Config:
    """Return the config of a run on a GPU with an optimizer that this machine, which may have none, can also run."""
    if config.optim.implementation != "capturable" or config.device not in ("auto", "cuda"):
        return config
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, implementation="default"))


def _precision(config: Config) -> str:
    """Return the precision of the run, auto as bf16, which most GPUs compute in. It may be slow here, for a few images."""
    return "bf16" if config.precision == "auto" else config.precision


def _saved_bytes(model: nn.Module, count: int, image_shape: ImageShape, precision: str) -> int:
    """Return the bytes that autograd keeps in a forward pass over `count` images, without parameters; then run backward."""
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(precision, torch.device("cpu")):
        logits = model.train()(torch.zeros(count, *image_shape))
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
