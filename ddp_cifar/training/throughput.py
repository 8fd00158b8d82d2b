"""Measurement of images per second. Contenders take turns in short slices, so that a busy machine slows all of them."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddp_cifar.config import ImageShape
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.distributed.world import World
from ddp_cifar.training.optim import build_optimizer
from ddp_cifar.training.step import TrainStep
from ddp_cifar.training.trainer import Trainer

Rates = dict[str, list[float]]
"""Contender -> its speed in each round, in images/s or operations/s."""

NEVER = 10**9
"""A period, in steps or epochs, that no slice reaches."""

SETTLE_S = 0.3  # lets a contender finish its background work, so that it does not slow the next one


def random_dataset(num_images: int, image_shape: ImageShape = (3, 32, 32), num_classes: int = 10) -> DataSet:
    """Return random images to train on, and none to evaluate on."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_images, *image_shape), dtype=torch.uint8, generator=random)
    labels = torch.randint(num_classes, (num_images,), generator=random)
    return DataSet(Split.of(images, labels), None, tuple(f"class {i}" for i in range(num_classes)))


def train_on(trainer: Trainer, steps: int) -> None:
    """Train for `steps` steps, from the start of the epoch if it has fewer steps left.

    So each slice also draws the epoch's order and crops. A run does this once per epoch.
    """
    if trainer.progress.step_in_epoch + steps > trainer.plan.steps_per_epoch:
        trainer.progress.step_in_epoch = 0
    trainer.last_step = trainer.progress.step + steps
    trainer.train_epoch()


def seconds_of(run: Callable[[], None], world: World) -> float:
    """Return the seconds that `run` takes on the slowest rank, if all ranks start together."""
    world.barrier()
    world.wait_for_device()
    started = time.perf_counter()
    run()
    world.wait_for_device()
    return world.max(time.perf_counter() - started)


def timed(run: Callable[[], None], amount: float, world: World) -> Callable[[], float]:
    """Return a function that runs a slice of `amount` images or operations on all ranks and returns its speed per second."""
    return lambda: amount / seconds_of(run, world)


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rates:
    """Return the speed of each contender in each round. A contender runs its slice of work and returns its speed.

    Contenders take turns, because the speed of a shared machine varies from minute to minute. Every other round runs in
    reverse order.
    """
    for run in contenders.values():
        run()  # warm-up: kernel selection, DDP's final buckets, worker start
    rates: Rates = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in reversed(names) if number % 2 else names:
            time.sleep(SETTLE_S)
            rates[name].append(contenders[name]())
    return rates


def computation(step: TrainStep, num_classes: int, steps: int) -> Callable[[], None]:
    """Return a function that only computes: the passes and updates of this rank in full steps, on fixed images."""
    train, plan = step.config.train, step.plan
    model = copy.deepcopy(step.model)
    compiled = train.compile != "off"
    if compiled:
        model.compile(mode=train.compile, dynamic=False)
        # as in `TrainStep.zero_grad`: a CUDA graph would overwrite gradients that it allocated
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer = build_optimizer(model, step.config.optim, step.precision)
    sizes = plan.sizes(plan.global_batch_size)
    own = [sizes[m] for m in plan.shares(plan.global_batch_size)[step.world.rank]]
    images = torch.randn(max(own), *step.image_shape, device=step.world.device)
    images = images.to(memory_format=torch.channels_last if train.channels_last else torch.contiguous_format)
    labels = torch.randint(num_classes, (len(images),), device=images.device)

    def run() -> None:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=not compiled)
            for size in own:
                if compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                with step.autocast():
                    logits = model(images[:size])
                F.cross_entropy(logits.float(), labels[:size]).backward()
            optimizer.step()

    return run


def model_flops(model: nn.Module, image_shape: Sequence[int]) -> float:
    """Return the floating-point operations of the forward and backward pass of one image.

    torch's FlopCounterMode counts convolutions and matrix products, with two operations per multiply-add.
    """
    shadow = copy.deepcopy(model).to("meta").train()
    images = torch.empty(2, *image_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        shadow(images).sum().backward()
    return float(counter.get_total_flops()) / len(images)


def matrix_product(size: int, precision: str, device: torch.device) -> tuple[Callable[[], None], float]:
    """Return a function that multiplies square matrices of `size` rows in `precision`, and its floating-point operations."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)

    def run() -> None:
        torch.matmul(left, right, out=out)

    return run, 2.0 * size**3
