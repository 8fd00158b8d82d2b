"""Measurements of `python -m ddp_cifar.benchmark`: training speed compared with the machine's compute speed."""

import dataclasses
import functools
import math
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ddp_cifar.config import Config
from ddp_cifar.distributed.world import World
from ddp_cifar.run.environment import device_name
from ddp_cifar.tracking.base import NullTracker, Scalars
from ddp_cifar.training.build import build_trainer
from ddp_cifar.training.metrics import PHASES, peak_memory
from ddp_cifar.training.throughput import (
    NEVER,
    Rates,
    computation,
    matrix_product,
    model_flops,
    random_dataset,
    seconds_of,
    take_turns,
    timed,
    train_on,
)
from ddp_cifar.training.trainer import Trainer

NUM_IMAGES = 50_000  # the size of CIFAR-10's training set
SLICE_S = 1.0
MATRIX_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Rows of the square matrices to multiply. The size with the highest rate counts."""


class _Phases(NullTracker):
    """Records the seconds of each phase of a step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, scalars: Scalars, step: int) -> None:
        self.rows.append({phase: float(scalars[f"time/{phase}_s"]) for phase in PHASES})


def measure(config: Config, world: World, rounds: int, steps: int | None) -> dict[str, Any]:
    """Return everything that the command reports. Every rank must call it."""
    began = time.perf_counter()
    quiet = {"fingerprint_every": None, "verify_every": None, "profile_steps": None, "max_steps": None, "epochs": NEVER}
    config = _with(config, "train", quiet)
    config = _with(config, "checkpoint", {"every_steps": None, "every_minutes": None})
    size = config.train.global_batch_size  # used to round up, so that every step of an epoch has a full batch
    data = random_dataset(math.ceil(NUM_IMAGES / size) * size, config.data.image_shape)
    trainer = build_trainer(config, world, data)
    train_on(trainer, 2)
    warm_up_s = time.perf_counter() - began
    if steps is None:
        step_s = seconds_of(functools.partial(train_on, trainer, 3), world) / 3
        steps = max(3, math.ceil(SLICE_S / step_s))
    steps = min(steps, trainer.plan.steps_per_epoch)
    phases = _Phases()
    trainer.config = _with(trainer.config, "train", {"log_every": 1 if steps < 20 else 20})
    images = steps * config.train.global_batch_size

    def step_alone() -> None:
        with trainer.train_step.ddp.no_sync():  # gradients are not exchanged
            train_on(trainer, steps)

    contenders: dict[str, tuple[Callable[[], None], float]] = {
        "training": (functools.partial(_with_tracker, trainer, phases, steps), images),
        "computation": (computation(trainer.train_step, len(trainer.dataset.classes), steps), images),
    }
    if trainer.train_step.tree is None and world.world_size > 1:
        contenders["without exchange"] = (step_alone, images)
    for size in MATRIX_SIZES.get(world.device.type, (1024,)):
        product, operations = matrix_product(size, trainer.train_step.precision, world.device)
        repeats = max(1, round(_repeats(product, world)))
        run = functools.partial(_repeat, product, repeats)
        contenders[f"matrix product {size}"] = (run, repeats * operations * world.world_size)
    runs = {name: timed(run, amount, world) for name, (run, amount) in contenders.items()}
    rates = take_turns(runs, rounds)
    phases_of = phases.rows[-max(1, len(phases.rows) * rounds // (rounds + 1)) :]
    memory = max(number for (number,) in world.gather([peak_memory(world.device)]))
    return summarize(
        trainer,
        rates,
        {phase: statistics.median(row[phase] for row in phases_of) for phase in PHASES},
        flops=model_flops(trainer.model, trainer.train_step.image_shape),
        memory=memory,
        warm_up_s=warm_up_s,
        steps=steps,
        hosts=sorted(set(world.gather_objects(socket.gethostname()))),
    )


def summarize(
    trainer: Trainer,
    rates: Rates,
    phases: Mapping[str, float],
    *,
    flops: float,
    memory: int,
    warm_up_s: float,
    steps: int,
    hosts: Sequence[str],
) -> dict[str, Any]:
    """Derive the report from the rates. A ratio is the median of the ratios of all rounds."""
    plan, world, config = trainer.plan, trainer.world, trainer.config

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    products = [name for name in rates if name.startswith("matrix product")]
    best = max(products, key=lambda name: statistics.median(rates[name]))
    images_per_s = statistics.median(rates["training"])
    return {
        "torch": str(torch.__version__),
        "device": device_name(world.device),
        "hosts": list(hosts),
        "world_size": world.world_size,
        "backend": world.backend,
        "threads": torch.get_num_threads(),
        "model": config.model.name,
        "precision": trainer.train_step.precision,
        "compile": config.train.compile,
        "hook": config.comm.hook,
        "global_batch_size": plan.global_batch_size,
        "num_micro_batches": plan.num_micro_batches,
        "micro_batch_size": plan.micro_batch_size,
        "grad_accum_steps": plan.grad_accum_steps,
        "steps_a_slice": steps,
        "rounds": len(rates["training"]),
        "images_per_s": images_per_s,
        "images_per_s_min": min(rates["training"]),
        "images_per_s_max": max(rates["training"]),
        "step_s": plan.global_batch_size / images_per_s,
        "phases_s": dict(phases),
        "data_share": phases["data"] / sum(phases.values()),
        "of_computation": ratio("training", "computation"),
        "exposed_communication": 1 - ratio("training", "without exchange") if "without exchange" in rates else None,
        "flops_an_image": flops,
        "flops_per_s": flops * images_per_s,
        "matrix_flops_per_s": statistics.median(rates[best]),
        "utilization": flops * ratio("training", best),
        "computation_utilization": flops * ratio("computation", best),
        "gradient_bytes": sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad),
        "peak_memory": memory,
        "warm_up_s": warm_up_s,
        "rates": rates,
    }


def _with_tracker(trainer: Trainer, tracker: NullTracker, steps: int) -> None:
    kept, trainer.tracker = trainer.tracker, tracker
    train_on(trainer, steps)
    trainer.tracker = kept


def _with(config: Config, section: str, values: Mapping[str, Any]) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def _repeats(product: Callable[[], None], world: World) -> float:
    """The number of products that fit into half a slice on the slowest rank."""
    product()
    return SLICE_S / 2 / seconds_of(product, world)


def _repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()
