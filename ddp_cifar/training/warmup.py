"""Warm-up before the first step: DDP's final buckets and compiled kernels. Also the advice given if memory runs out."""

import contextlib
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from ddp_cifar.data.augment import transform
from ddp_cifar.data.loader import EvalLoader, TrainLoader
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError, first_line
from ddp_cifar.log import log
from ddp_cifar.models import unchanged_buffers
from ddp_cifar.training.evaluation import forward_pass
from ddp_cifar.training.step import TrainStep

COMPILED_WARM_UP = 3
"""Passes per batch size: the first compiles and runs the kernels, the second records the CUDA graph, the third replays it."""


def warm_up(step: TrainStep, train: TrainLoader, *others: EvalLoader | None) -> None:
    """Compile, if the config requires it, and let DDP build its final buckets. Every rank must call it before the first step."""
    mode = step.config.train.compile
    if mode == "off":
        finalize_ddp_buckets(step)
    else:
        compile_networks(step, mode, train, *others)
        warm_up_compiled(step, train, *others)


def finalize_ddp_buckets(step: TrainStep) -> None:
    """Run one backward pass and discard it, so that DDP builds its final buckets.

    DDP regroups gradients into different buckets after the first backward pass of a process. The order in which gloo sums an
    element depends on its position in a bucket. Without this pass, the first step after a resume would round differently
    from the same step of an uninterrupted run.
    """
    throw_away_pass(step, 2)


def throw_away_pass(step: TrainStep, num_images: int) -> None:
    """Run a forward and backward pass over `num_images` images, as in training, and discard its effects."""
    step.model.train()
    with unchanged_buffers(step.model):
        step.begin([range(rank, rank + 1) for rank in range(step.world.world_size)])
        step.logits(step.trial_images(num_images)).float().sum().backward()
    if step.tree:
        step.tree.end_step()
    step.zero_grad()


def compile_networks(step: TrainStep, mode: str, *loaders: EvalLoader | None) -> None:
    """Compile the model, for training and evaluation, and the augmentation."""
    # compiled inside DDP: it splits the backward graph at its buckets, so that the all-reduce overlaps the backward pass
    for network in (step.model, step.eval_model):
        network.compile(mode=mode, dynamic=False)
    for loader in loaders:
        if loader and not loader.function:  # user-defined code may not compile
            loader.transform = torch.compile(transform, dynamic=False)


def warm_up_compiled(step: TrainStep, train: TrainLoader, *others: EvalLoader | None) -> None:
    """Compile, and record CUDA graphs, for each batch size of an evaluation and of an epoch, on all ranks.

    In training, the time to compile could look like a hang.
    """
    started = time.perf_counter()
    warm_up_evaluation(step, train, *others)
    sizes = step.plan.micro_batch_sizes()
    table = train.augmentations(0)
    with memory_advice(step, logs=None):
        for size in sizes:  # the largest first
            for _ in range(COMPILED_WARM_UP):
                train.gather(torch.arange(size), table, 0)
                throw_away_pass(step, size)
    log.info(
        f"compiled for micro-batches of {', '.join(map(str, sizes))} images in "
        f"{time.perf_counter() - started:.1f} s (not included in images/s)"
    )


def warm_up_evaluation(step: TrainStep, train: TrainLoader, *others: EvalLoader | None) -> None:
    """Evaluate batches of each size that an evaluation has, and discard the results."""
    step.eval_model.eval()
    forward = forward_pass(step.eval_model, step.precision, step.world.device, compiled=True)
    tables: dict[EvalLoader, torch.Tensor | None] = {loader: None for loader in others if loader}
    if step.config.eval.train_accuracy == "full":
        tables[train] = train.augmentations(0)
    for loader, table in tables.items():
        full = min(step.config.eval.batch_size, len(loader))
        for size in {full, len(loader) % full or full}:
            for _ in range(COMPILED_WARM_UP):
                images, _, _ = loader.gather(torch.arange(size), table, 0)
                forward(images)


@contextlib.contextmanager
def memory_advice(step: TrainStep, logs: Path | None) -> Iterator[None]:
    """Raise `UserError` if the body runs out of memory, with a micro-batch size that fits.

    If it is a GPU's memory, its state is written to the folder `logs`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        snapshot = write_snapshot(step.world, logs)  # before any memory is freed
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the pass that failed
        raise UserError(out_of_memory(step) + snapshot) from None


def write_snapshot(world: World, logs: Path | None) -> str:
    """Write the state of this rank's GPU memory to `logs`/rank_N.memory.pickle; return the end of a message that names the file.

    Returns "" if nothing was written: without `logs`, or on the CPU. Does not raise.
    """
    if logs is None or world.device.type != "cuda":
        return ""
    path = logs / f"rank_{world.rank}.memory.pickle"
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as error:  # of any kind, as the function is private; the advice is more important
        log.warning(f"cannot write a snapshot of the memory to {path} ({type(error).__name__}: {first_line(error)})")
        return ""
    return f"; a snapshot of the memory is in {path}; open it at https://pytorch.org/memory_viz"


def out_of_memory(step: TrainStep) -> str:
    """Return a one-line error with the largest micro-batch size that fits, found by trial."""
    fits, too_large = 0, step.plan.micro_batch_size
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if fits_in_memory(step, middle):
            fits = middle
        else:
            too_large = middle
    advice = f"use train.micro_batch_size={fits}" if fits else "not even one image fits; use a GPU with more memory"
    return f"{step.world.device} ran out of memory with {step.plan.micro_batch_size} images per micro-batch; {advice}"


def fits_in_memory(step: TrainStep, size: int) -> bool:
    """True if a micro-batch of `size` images fits in memory."""
    step.optimizer.zero_grad(set_to_none=True)
    if step.world.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        with step.autocast():
            # not `step.model(...)`, which would compile the model for each size
            logits = step.model.forward(step.trial_images(size))
        # not `backward`, in which DDP would wait for the other ranks
        trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
        torch.autograd.grad(logits.float().sum(), trained)
    except (torch.OutOfMemoryError, ValueError):  # BatchNorm raises ValueError for one image
        return False
    return True
